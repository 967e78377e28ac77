// Attention of relational guidance: an image's visible cells attend to its shown cells and to one key that represents
// all hidden cells.
//
// Per image and head there are V queries and K shown keys of width d (scale d^-1/2). All matrices of one head are in
// float scratch memory (V=14, K=22, d=128: 60 KB; 76, 120, 96: 190 KB), so each tensor is read and written once. The
// hidden cells share one key and one value. log(number of hidden cells) is added to their logit, since n equal logits l
// contribute n e^l to the sum of exponentials.
#include "cpu/aligned.h"
#include "cpu/launch.h"

#include <cmath>

// Defined outside of any instruction set, because of its inline functions (see foreach_isa.h).
#ifndef SGMIM_ATTENTION_SHAPE
#define SGMIM_ATTENTION_SHAPE
namespace sgmim {
struct AttentionShape {
  const int64_t* query_offsets;  // (images + 1,): first packed row of q of each image
  const int64_t* key_offsets;    // (images + 1,): the same of k and v, whose row key_offsets[images] is the hidden one
  int64_t images, cells, heads, width;
  bool keep_hidden;

  int64_t rows() const { return query_offsets[images]; }
  int64_t head_width() const { return width / heads; }
  int64_t hidden_cells(int64_t image) const {
    return keep_hidden ? cells - (key_offsets[image + 1] - key_offsets[image]) : 0;
  }
};
}  // namespace sgmim
#endif

#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/relational_guidance.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"
#include "cpu/small_gemm.h"

namespace sgmim {
namespace SGMIM_ISA {

// Float scratch memory for the matrices of one head, with rows padded with zeros to whole vectors.
class Scratch {
 public:
  float* take(int64_t rows, int64_t columns) {
    buffers_.emplace_back(rows * padded(columns));
    return buffers_.back().data();
  }
  static int64_t padded(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

 private:
  std::vector<Aligned<float>> buffers_;
};

template <class T>
SGMIM_INLINE void load_matrix(
    const T* source, int64_t stride, int64_t rows, int64_t columns, float scale, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; i += LANES)
      store(out + r * out_stride + i, load_part(source + r * stride + i, part(i, columns)) * scale);
}

template <class T>
SGMIM_INLINE void store_matrix(
    const float* source, int64_t source_stride, int64_t rows, int64_t columns, float scale, T* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; i += LANES)
      store_part(out + r * stride + i, load(source + r * source_stride + i) * scale, part(i, columns));
}

// out (columns, rows) = source^T
SGMIM_INLINE void transpose(
    const float* source, int64_t source_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = source[r * source_stride + c];
}

// Loads the keys (or values) of one image and head: the shown rows, then the hidden row if there are hidden cells.
template <class T>
SGMIM_INLINE void load_keys(
    const T* source, const AttentionShape& shape, int64_t image, int64_t head, float* out, int64_t out_stride) {
  const int64_t first = shape.key_offsets[image], shown = shape.key_offsets[image + 1] - first;
  const int64_t d = shape.head_width();
  load_matrix(source + first * shape.width + head * d, shape.width, shown, d, 1.0f, out, out_stride);
  if (shape.hidden_cells(image) > 0)
    load_matrix(source + shape.key_offsets[shape.images] * shape.width + head * d, shape.width, 1, d, 1.0f,
                out + shown * out_stride, out_stride);
}

template <class T>
void attention_heads(
    const T* q,                   // (visible rows, width)
    const T* k,                   // (shown rows + 1, width), the last row being that of the hidden cells
    const T* v,                   // like k
    T* out,                       // (visible rows, width)
    float* lse,  // (2, visible rows, heads): logsumexp of the logits in two parts, row_max and log(row_sum)
    const AttentionShape* shape, int64_t begin, int64_t end) {
  const int64_t d = shape->head_width(), ds = Scratch::padded(d);
  const float scale = 1.0f / __builtin_sqrtf(d);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / shape->heads, head = item % shape->heads;
    const int64_t first = shape->query_offsets[image], queries = shape->query_offsets[image + 1] - first;
    const int64_t hidden = shape->hidden_cells(image);
    const int64_t shown = shape->key_offsets[image + 1] - shape->key_offsets[image];
    const int64_t keys = shown + (hidden > 0), ks = Scratch::padded(keys);
    if (queries == 0) continue;
    T* target = out + first * shape->width + head * d;
    Scratch scratch;
    float *qs = scratch.take(queries, d), *keys_rows = scratch.take(keys, d), *kt = scratch.take(d, keys);
    float *p = scratch.take(queries, keys), *o = scratch.take(queries, d);
    load_matrix(q + first * shape->width + head * d, shape->width, queries, d, scale, qs, ds);
    load_keys(k, *shape, image, head, keys_rows, ds);
    transpose(keys_rows, ds, keys, d, kt, ks);
    small_gemm(qs, ds, kt, ks, p, ks, queries, ks, d);
    for (int64_t r = 0; r < queries; ++r) {
      float* row = p + r * ks;
      if (hidden > 0) row[shown] += __builtin_logf(hidden);
      for (int64_t j = keys; j < ks; ++j) row[j] = -__builtin_inff();
      vf max = set1(-__builtin_inff());
      for (int64_t j = 0; j < ks; j += LANES) max = vmax(max, load(row + j));
      const float row_max = keys ? hmax(max) : 0.0f;
      vf sum = {};
      for (int64_t j = 0; j < ks; j += LANES) {
        const vf e = exp(load(row + j) - row_max);
        store(row + j, e);
        sum += e;
      }
      const float row_sum = hsum(sum);  // 0 only if no cell is shown and hidden cells are dropped
      const int64_t at = (first + r) * shape->heads + head;
      lse[at] = row_sum > 0 ? row_max : 0.0f;
      lse[shape->rows() * shape->heads + at] = row_sum > 0 ? __builtin_logf(row_sum) : 0.0f;
      const float inverse_sum = row_sum > 0 ? 1.0f / row_sum : 0.0f;
      for (int64_t j = 0; j < ks; j += LANES) store(row + j, load(row + j) * inverse_sum);
    }
    load_keys(v, *shape, image, head, keys_rows, ds);
    small_gemm(p, ks, keys_rows, ds, o, ds, queries, ds, keys);
    store_matrix(o, ds, queries, d, 1.0f, target, shape->width);
  }
}

template <class T>
void attention_backward_heads(
    const T* dout,  // (visible rows, width)
    const T* q, const T* k, const T* v,
    const float* lse,  // (2, visible rows, heads)
    T* dq,             // (visible rows, width)
    T* dk,             // (shown rows + 1, width), of which this writes the shown rows
    T* dv,             // like dk
    float* hidden_dk,  // (images, width): each image's term of the hidden row's gradient
    float* hidden_dv, const AttentionShape* shape, int64_t begin, int64_t end) {
  const int64_t d = shape->head_width(), ds = Scratch::padded(d), width = shape->width;
  const float scale = 1.0f / __builtin_sqrtf(d);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / shape->heads, head = item % shape->heads;
    const int64_t first = shape->query_offsets[image], queries = shape->query_offsets[image + 1] - first;
    const int64_t first_key = shape->key_offsets[image], shown = shape->key_offsets[image + 1] - first_key;
    const int64_t hidden = shape->hidden_cells(image);
    const int64_t keys = shown + (hidden > 0), ks = Scratch::padded(keys), qs = Scratch::padded(queries);
    const int64_t at = first * width + head * d;
    Scratch scratch;
    float *query = scratch.take(queries, d), *key = scratch.take(keys, d), *kt = scratch.take(d, keys);
    float *grad = scratch.take(queries, d), *p = scratch.take(queries, keys), *dp = scratch.take(queries, keys);
    float *pt = scratch.take(keys, queries), *result = scratch.take(queries > keys ? queries : keys, d);
    load_matrix(q + at, width, queries, d, scale, query, ds);
    load_matrix(dout + at, width, queries, d, 1.0f, grad, ds);

    // dp = dout . v^T
    load_keys(v, *shape, image, head, key, ds);
    transpose(key, ds, keys, d, kt, ks);
    small_gemm(grad, ds, kt, ks, dp, ks, queries, ks, d);

    // p = exp(logits - logsumexp)
    load_keys(k, *shape, image, head, key, ds);
    transpose(key, ds, keys, d, kt, ks);
    small_gemm(query, ds, kt, ks, p, ks, queries, ks, d);
    for (int64_t r = 0; r < queries; ++r) {
      float *row = p + r * ks, *drow = dp + r * ks;
      if (hidden > 0) row[shown] += __builtin_logf(hidden);
      const int64_t lse_at = (first + r) * shape->heads + head;
      const float row_max = lse[lse_at], log_sum = lse[shape->rows() * shape->heads + lse_at];
      for (int64_t j = 0; j < ks; j += LANES) store(row + j, exp(load(row + j) - row_max - log_sum));
      // The sum equals dout . out, but is rounded differently: like this, a single key's gradient is exactly 0.
      for (int64_t j = keys; j < ks; ++j) row[j] = drow[j] = 0.0f;
      vf dot = {};
      for (int64_t j = 0; j < ks; j += LANES) dot += load(row + j) * load(drow + j);
      const float delta = hsum(dot);
      for (int64_t j = 0; j < ks; j += LANES) store(drow + j, load(row + j) * (load(drow + j) - delta));
    }

    // dv = p^T . dout
    transpose(p, ks, queries, keys, pt, qs);
    small_gemm(pt, qs, grad, ds, result, ds, keys, ds, queries);
    store_matrix(result, ds, shown, d, 1.0f, dv + first_key * width + head * d, width);
    if (hidden > 0) store_matrix(result + shown * ds, ds, 1, d, 1.0f, hidden_dv + image * width + head * d, width);

    // dk = ds^T . q, where q is already scaled
    transpose(dp, ks, queries, keys, pt, qs);
    small_gemm(pt, qs, query, ds, result, ds, keys, ds, queries);
    store_matrix(result, ds, shown, d, 1.0f, dk + first_key * width + head * d, width);
    if (hidden > 0) store_matrix(result + shown * ds, ds, 1, d, 1.0f, hidden_dk + image * width + head * d, width);

    // dq = scale * ds . k
    small_gemm(dp, ks, key, ds, result, ds, queries, ds, keys);
    store_matrix(result, ds, queries, d, scale, dq + at, width);
  }
}

// Sums the images' terms of the hidden row, in order.
template <class T>
void hidden_row(const float* shares, T* row, int64_t images, int64_t width) {
  for (int64_t i = 0; i < width; i += LANES) {
    vf sum = {};
    const int64_t n = part(i, width);
    for (int64_t b = 0; b < images; ++b) sum += load_part(shares + b * width + i, n);
    store_part(row + i, sum, n);
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

static AttentionShape attention_shape(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse, const Tensor& query_offsets,
    const Tensor& key_offsets, int64_t cells, int64_t heads, bool keep_hidden) {
  check_matrix(q, "q");
  check_matrix(k, "k");
  const int64_t width = q.size(1);
  SGMIM_CHECK(k.size(0) > 0 && k.size(1) == width, "k must have shape (shown cells + 1, ", width, ")");
  SGMIM_CHECK(heads > 0 && width % heads == 0, "heads must divide the width ", width, ", got ", heads);
  check_packed(k, "k", q.scalar_type(), k.numel());
  check_packed(v, "v", q.scalar_type(), k.numel());
  check_packed(lse, "lse", ScalarType::Float, 2 * q.size(0) * heads);
  SGMIM_CHECK(query_offsets.numel() == key_offsets.numel(),
              "visible.offsets and shown.offsets must have the same length");
  check_offsets(query_offsets, q.size(0), "visible.offsets");
  check_offsets(key_offsets, k.size(0) - 1, "shown.offsets");
  return {data<int64_t>(query_offsets), data<int64_t>(key_offsets), query_offsets.numel() - 1, cells, heads, q.size(1),
          keep_hidden};
}

// query_rows and key_rows are the cells of the packed rows. They are only checked.
static void attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& query_rows, const Tensor& query_offsets,
    const Tensor& key_rows, const Tensor& key_offsets, int64_t cells, int64_t heads, bool keep_hidden,
    const Tensor& out, const Tensor& lse) {
  const AttentionShape shape = attention_shape(q, k, v, lse, query_offsets, key_offsets, cells, heads, keep_hidden);
  check_packed(out, "out", q.scalar_type(), q.numel());
  check_image_rows(query_rows, query_offsets, cells, "visible.index");
  check_image_rows(key_rows, key_offsets, cells, "shown.index");
  dispatch_float(q, "q", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((attention_heads<T>));
    parallel(shape.images * heads, 1, [&](int64_t begin, int64_t end) {
      kernel(data<T>(q), data<T>(k), data<T>(v), data<T>(out), data<float>(lse), &shape, begin, end);
    });
  });
}

static void attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
    const Tensor& query_offsets, const Tensor& key_offsets, int64_t cells, int64_t heads, bool keep_hidden,
    const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const AttentionShape shape = attention_shape(q, k, v, lse, query_offsets, key_offsets, cells, heads, keep_hidden);
  const int64_t width = q.size(1);
  for (const auto& [tensor, name] : {std::pair{&dout, "dout"}, std::pair{&dq, "dq"}})
    check_packed(*tensor, name, q.scalar_type(), q.numel());
  for (const auto& [tensor, name] : {std::pair{&dk, "dk"}, std::pair{&dv, "dv"}})
    check_packed(*tensor, name, q.scalar_type(), k.numel());
  std::vector<float> hidden_dk(shape.images * width, 0.0f), hidden_dv(shape.images * width, 0.0f);
  dispatch_float(q, "q", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((attention_backward_heads<T>));
    parallel(shape.images * heads, 1, [&](int64_t begin, int64_t end) {
      kernel(data<T>(dout), data<T>(q), data<T>(k), data<T>(v), data<float>(lse), data<T>(dq), data<T>(dk), data<T>(dv),
             hidden_dk.data(), hidden_dv.data(), &shape, begin, end);
    });
    const auto sum = SGMIM_SELECT((hidden_row<T>));
    const int64_t last = shape.key_offsets[shape.images] * width;
    sum(hidden_dk.data(), data<T>(dk) + last, shape.images, width);
    sum(hidden_dv.data(), data<T>(dv) + last, shape.images, width);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor query_rows, Tensor query_offsets, Tensor key_rows, "
      "Tensor key_offsets, int cells, int heads, bool keep_hidden, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor query_offsets, "
      "Tensor key_offsets, int cells, int heads, bool keep_hidden, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

#endif
}  // namespace sgmim
