// Norms of the structure encoder's first level: the LayerNorm of each embedded patch, and then the LayerNorm of the
// first patch merging over four of them, concatenated. Both are computed in one pass; the tokens between them are not
// stored.
//
// The patches of a cell are in Z-order, so the four tokens of a merging are one row of 4 * width values. The cells
// after the embedded ones are hidden: their tokens are zero after the first norm, whatever their pixels.
#include "cpu/launch.h"
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/structure_embed.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"

#ifndef SGMIM_TWO_NORMS
#define SGMIM_TWO_NORMS
namespace sgmim {
// Weights, biases and statistics of both norms. width: of one token; rows of the second norm have 4 * width values.
struct TwoNorms {
  const float *weight, *bias;              // (width,)
  const float *merge_weight, *merge_bias;  // (4 * width,)
  float *mean, *rstd;                      // (4 * embedded,)
  float *merge_mean, *merge_rstd;          // (embedded + hidden,)
  int64_t width, embedded;                 // embedded: merged rows of embedded patches; the rows after them are hidden
};
}  // namespace sgmim
#endif

namespace sgmim {
namespace SGMIM_ISA {

template <class T>
void embed_norm_rows(
    const T* x,  // (embedded, 4 * width)
    T* y,        // (embedded + hidden, 4 * width), or null: only the statistics are computed
    const TwoNorms* norms, float eps, int64_t begin, int64_t end) {
  const int64_t width = norms->width, wide = 4 * width;
  std::vector<float> row(wide + LANES), token(width + LANES);
  for (int64_t r = begin; r < end; ++r) {
    std::fill(row.begin() + wide, row.end(), 0.0f);  // normalize_row also changed the lanes past the previous row
    if (r < norms->embedded) {
      for (int64_t k = 0; k < 4; ++k) {
        float &mean = norms->mean[4 * r + k], &rstd = norms->rstd[4 * r + k];
        load_row(x + r * wide + k * width, token.data(), width);
        moments(token.data(), width, eps, mean, rstd);
        normalize_row(token.data(), width, mean, rstd);
        affine_row(token.data(), norms->weight, norms->bias, row.data() + k * width, width);
      }
    } else {
      std::fill(row.begin(), row.end(), 0.0f);
    }
    moments(row.data(), wide, eps, norms->merge_mean[r], norms->merge_rstd[r]);
    if (!y) continue;
    normalize_row(row.data(), wide, norms->merge_mean[r], norms->merge_rstd[r]);
    affine_row(row.data(), norms->merge_weight, norms->merge_bias, y + r * wide, wide);
  }
}

// Computes the gradient that the embedded patches receive through the statistics alone: the merged rows' normalised
// values times `merged_scale` of their row, through the first norm, plus the patches' own normalised values times
// `patch_scale`. Does what `norm_backward_row` does in the same two passes as what comes before and after.
template <class T>
void embed_statistics_backward_rows(
    T* x,                       // (embedded, 4 * width); dx replaces it
    const float* merged_scale,  // (embedded,)
    const float* patch_scale,   // (4 * embedded,)
    float* sums,                // (3, width): dweight, dbias, column sums of dx
    const TwoNorms* norms, int64_t begin, int64_t end) {
  const int64_t width = norms->width;
  float *dweight = sums, *dbias = sums + width, *dx_sums = sums + 2 * width;
  const auto add = [](float* to, vf v, int64_t n) SGMIM_INLINE_LAMBDA { store_part(to, load_part(to, n) + v, n); };
  std::vector<float> xhat(width + LANES), dxhat(width + LANES);
  for (int64_t k = 4 * begin; k < 4 * end; ++k) {
    const float merge_mean = norms->merge_mean[k / 4], scale = norms->merge_rstd[k / 4] * merged_scale[k / 4];
    const float mean = norms->mean[k], rstd = norms->rstd[k];
    T* row = x + k * width;
    vf sum = {}, dot = {};
    for (int64_t i = 0; i < width; i += LANES) {
      const int64_t n = part(i, width);
      const vf weight = load_part(norms->weight + i, n), here = (load_part(row + i, n) - mean) * rstd;
      const vf dy = (here * weight + load_part(norms->bias + i, n) - merge_mean) * scale;
      const vf d = dy * weight;  // lanes past the width are zero, since the weight is
      store(xhat.data() + i, here);
      store(dxhat.data() + i, d);
      add(dweight + i, dy * here, n);
      add(dbias + i, dy, n);
      sum += d;
      dot += d * here;
    }
    const float mean_d = hsum(sum) / width, mean_dx = hsum(dot) / width;
    for (int64_t i = 0; i < width; i += LANES) {
      const int64_t n = part(i, width);
      const vf here = load(xhat.data() + i);
      const vf dx = (load(dxhat.data() + i) - mean_d - here * mean_dx) * rstd + here * patch_scale[k];
      add(dx_sums + i, dx, n);
      store_part(row + i, dx, n);
    }
  }
}

template <class T>
void embed_norm_backward_rows(
    T* dy,       // (embedded + hidden, 4 * width); dx replaces the embedded rows
    const T* x,  // (embedded, 4 * width)
    T* y,        // (embedded + hidden, 4 * width): receives the forward's output again
    float* sums,  // (11 * width,): dmerge_weight, dmerge_bias (4 * width each), dweight, dbias, column sums of dx
    const TwoNorms* norms, int64_t begin, int64_t end) {
  const int64_t width = norms->width, wide = 4 * width;
  std::vector<float> xhat(wide + LANES), merged(wide + LANES), g(wide + LANES);
  float* token_sums = sums + 2 * wide;
  for (int64_t r = begin; r < end; ++r) {
    const bool embedded = r < norms->embedded;
    std::fill(merged.begin(), merged.end(), 0.0f);
    if (embedded) {
      for (int64_t k = 0; k < 4; ++k) {
        float* token = xhat.data() + k * width;
        load_row(x + r * wide + k * width, g.data(), width);
        normalize_row(g.data(), width, norms->mean[4 * r + k], norms->rstd[4 * r + k]);
        store_row(g.data(), token, width);
        affine_row(token, norms->weight, norms->bias, merged.data() + k * width, width);
      }
    }
    normalize_row(merged.data(), wide, norms->merge_mean[r], norms->merge_rstd[r]);
    affine_row(merged.data(), norms->merge_weight, norms->merge_bias, y + r * wide, wide);
    load_row(dy + r * wide, g.data(), wide);
    norm_backward_row(g.data(), merged.data(), norms->merge_weight, norms->merge_rstd[r], sums, sums + wide, wide);
    if (!embedded) continue;  // the zeros of a hidden cell are constant
    for (int64_t k = 0; k < 4; ++k) {
      // `merged` is no longer needed, and serves as scratch memory for one token.
      load_row(g.data() + k * width, merged.data(), width);
      norm_backward_row(merged.data(), xhat.data() + k * width, norms->weight, norms->rstd[4 * r + k], token_sums,
                        token_sums + width, width);
      accumulate_row(merged.data(), token_sums + 2 * width, width);
      store_row(merged.data(), dy + r * wide + k * width, width);
    }
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

// Checks that `statistics` is float32, (2, count), with contiguous rows.
static void check_statistics(const Tensor& statistics, const char* name) {
  SGMIM_CHECK(
      statistics.dim() == 2 && statistics.size(0) == 2 && statistics.scalar_type() == ScalarType::Float &&
          (statistics.stride(1) == 1 || statistics.size(1) <= 1),
      name, " must be float32 of shape (2, rows) with contiguous rows");
}

// Checks and collects the arguments of both norms. x: (4 * embedded, width). merge_weight and merge_bias are optional.
static TwoNorms two_norms(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& merge_weight,
    const std::optional<Tensor>& merge_bias, const Tensor& statistics, const Tensor& merge_statistics) {
  check_matrix(x, "x");
  const int64_t width = x.size(1), embedded = x.size(0) / 4;
  check_packed(weight, "weight", ScalarType::Float, width);
  check_packed(bias, "bias", ScalarType::Float, width);
  check_packed(merge_weight, "merge_weight", ScalarType::Float, 4 * width);
  check_packed(merge_bias, "merge_bias", ScalarType::Float, 4 * width);
  check_statistics(statistics, "statistics");
  check_statistics(merge_statistics, "merge_statistics");
  SGMIM_CHECK(
      x.size(0) == 4 * embedded && statistics.size(1) == x.size(0) && merge_statistics.size(1) >= embedded,
      "x, statistics and merge_statistics do not fit each other: they have ",
      x.size(0), ", ", statistics.size(1), " and ", merge_statistics.size(1), " rows");
  return {data<float>(weight),
          data<float>(bias),
          data<float>(merge_weight),
          data<float>(merge_bias),
          data<float>(statistics),
          data<float>(statistics) + statistics.stride(0),
          data<float>(merge_statistics),
          data<float>(merge_statistics) + merge_statistics.stride(0),
          width,
          embedded};
}

static void embed_norm(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& merge_weight, const Tensor& merge_bias,
    double eps, const std::optional<Tensor>& y, const Tensor& statistics, const Tensor& merge_statistics) {
  const TwoNorms norms = two_norms(x, weight, bias, merge_weight, merge_bias, statistics, merge_statistics);
  check_packed(y, "y", x.scalar_type(), merge_statistics.size(1) * 4 * norms.width);
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((embed_norm_rows<T>));
    parallel(merge_statistics.size(1), 8, [&](int64_t begin, int64_t end) {
      kernel(data<T>(x), data<T>(y), &norms, eps, begin, end);
    });
  });
}

static void embed_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& merge_weight,
    const Tensor& merge_bias, const Tensor& statistics, const Tensor& merge_statistics, const Tensor& y,
    const Tensor& sums) {
  const TwoNorms norms = two_norms(x, weight, bias, merge_weight, merge_bias, statistics, merge_statistics);
  check_matrix(y, "y");
  check_packed(y, "y", x.scalar_type(), merge_statistics.size(1) * 4 * norms.width);
  SGMIM_CHECK(y.size(1) == 4 * norms.width, "y must have ", 4 * norms.width, " columns, got ", y.size(1));
  check_packed(dy, "dy", x.scalar_type(), y.numel());
  check_packed(sums, "sums", ScalarType::Float, 11 * norms.width);
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((embed_norm_backward_rows<T>));
    column_sums(y.size(0), sums.numel(), data<float>(sums), [&](int64_t begin, int64_t end, float* partial) {
      kernel(data<T>(dy), data<T>(x), data<T>(y), partial, &norms, begin, end);
    });
  });
}

static void embed_statistics_backward(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& statistics, const Tensor& merge_statistics,
    const Tensor& merged_scale, const Tensor& patch_scale, const Tensor& sums) {
  const TwoNorms norms = two_norms(x, weight, bias, std::nullopt, std::nullopt, statistics, merge_statistics);
  check_packed(merged_scale, "merged_scale", ScalarType::Float, merge_statistics.size(1));
  check_packed(patch_scale, "patch_scale", ScalarType::Float, 4 * norms.embedded);
  check_packed(sums, "sums", ScalarType::Float, 3 * norms.width);
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((embed_statistics_backward_rows<T>));
    column_sums(norms.embedded, sums.numel(), data<float>(sums), [&](int64_t begin, int64_t end, float* partial) {
      kernel(data<T>(x), data<float>(merged_scale), data<float>(patch_scale), partial, &norms, begin, end);
    });
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def(
      "embed_norm(Tensor x, Tensor weight, Tensor bias, Tensor merge_weight, Tensor merge_bias, float eps, "
      "Tensor(a!)? y, Tensor(b!) statistics, Tensor(c!) merge_statistics) -> ()");
  m.def(
      "embed_statistics_backward(Tensor(a!) x, Tensor weight, Tensor bias, Tensor statistics, "
      "Tensor merge_statistics, Tensor merged_scale, Tensor patch_scale, Tensor(b!) sums) -> ()");
  m.def(
      "embed_norm_backward(Tensor(a!) dy, Tensor x, Tensor weight, Tensor bias, Tensor merge_weight, "
      "Tensor merge_bias, Tensor statistics, Tensor merge_statistics, Tensor(b!) y, Tensor(c!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("embed_norm", TORCH_BOX(&embed_norm));
  m.impl("embed_statistics_backward", TORCH_BOX(&embed_statistics_backward));
  m.impl("embed_norm_backward", TORCH_BOX(&embed_norm_backward));
}

#endif
}  // namespace sgmim
