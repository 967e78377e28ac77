// Attention inside the windows of a token grid: cyclic shift, padding, partition and their reverse are index
// arithmetic on the rows of qkv, so nothing is rolled, padded or copied, and no (windows, heads, n, n) tensor exists.
//
// One (window, head) at a time lives in float scratch, 48 queries at once: keys and values transposed, logits, softmax,
// result. The backward computes the probabilities again, which from a saved log-sum would be less exact: with SwinV2's
// logits of up to 100 its rounding alone is 1e-5 of them. Gradients that are summed over windows (bias, padding row,
// logit scale) go through blocks of windows that depend on the shape alone: the same bits for any number of threads.
#include "cpu/launch.h"

#include <cmath>
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/window_attention.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"
#include "cpu/small_product.h"

#ifndef SGMIM_WINDOW_GRID
#define SGMIM_WINDOW_GRID
namespace sgmim {
struct WindowGrid {
  int64_t batch, height, width;                             // of the token grid
  int64_t window_h, window_w, shift_h, shift_w;             // shift: tokens that the windows are moved by
  int64_t heads, head_width;
  const float* logit_scale;                                 // (heads,) factors of the cosines, or null: dot products
  const float* bias;                                        // (heads, tokens, keys) or (keys,), -inf past the tokens
  int64_t bias_head, bias_row;                              // strides of the bias
  int64_t keys;                                             // tokens of a window, padded for the widest vectors

  int64_t tokens() const { return window_h * window_w; }
  int64_t channels() const { return heads * head_width; }
  int64_t down() const { return (height + window_h - 1) / window_h; }
  int64_t across() const { return (width + window_w - 1) / window_w; }
  int64_t windows() const { return batch * down() * across(); }

  // Rows of the grid that the tokens of a window are, -1 for padding; and the group of each: tokens of different
  // groups are not neighbours, the cyclic shift has brought them together. Returns whether there are several groups.
  bool locate(int64_t window, int64_t* rows, int64_t* group) const {
    const int64_t column = window % across(), row = window / across() % down();
    const int64_t first = window / (across() * down()) * height * width;
    const bool low = shift_h > 0 && row == down() - 1, right = shift_w > 0 && column == across() - 1;
    for (int64_t r = 0; r < window_h; ++r)
      for (int64_t c = 0; c < window_w; ++c) {
        const int64_t i = row * window_h + r, j = column * window_w + c, t = r * window_w + c;
        const bool inside = i < height && j < width;
        rows[t] = inside ? first + (i + shift_h) % height * width + (j + shift_w) % width : -1;
        group[t] = (low && r >= window_h - shift_h) + 2 * (right && c >= window_w - shift_w);
      }
    return low || right;
  }
};

// What the backward sums over windows, for one block of them.
struct WindowSums {
  float* bias;         // (heads, tokens, padded keys) or null
  float* pad;          // (3 * channels) or null
  float* logit_scale;  // (heads,) or null
};
}  // namespace sgmim
#endif

namespace sgmim {
namespace SGMIM_ISA {

constexpr int64_t QUERIES = 48;  // rows of logits at a time
constexpr float TINY = 1e-12f;   // least norm of a vector, as in torch.nn.functional.normalize
constexpr float APART = -100.0f; // added to the logits of tokens that are not neighbours, as in timm

SGMIM_INLINE int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// One window and head: where its tokens are, and copies of its matrices.
template <class T>
class WindowHead {
 public:
  WindowHead(const WindowGrid& grid, const T* qkv, const T* pad)
      : grid_(grid), qkv_(qkv), pad_(pad), n(grid.tokens()), ns(padded(n)), d(grid.head_width), ds(padded(d)),
        rows(n), group(n), norms_(2 * n), penalty_(4 * ns), floats_(4 * n * ds + 2 * ds * ns) {
    q = floats_.data();
    k = q + n * ds;
    v = k + n * ds;
    extra = v + n * ds;
    kt = extra + n * ds;
    vt = kt + ds * ns;
  }

  void enter(int64_t window) {
    apart_ = grid_.locate(window, rows.data(), group.data());
    if (!apart_) return;
    for (int64_t g = 0; g < 4; ++g)
      for (int64_t t = 0; t < n; ++t) penalty_[g * ns + t] = group[t] == g ? 0.0f : APART;
  }

  // Queries (scaled), keys and values of a head.
  void load_head(int64_t head) {
    const float scale = grid_.logit_scale ? grid_.logit_scale[head] : 1.0f / __builtin_sqrtf(d);
    const int64_t width = grid_.channels();
    load_rows(head * d, q, scale, norms_.data());
    load_rows(width + head * d, k, 1.0f, norms_.data() + n);
    for (int64_t t = 0; t < n; ++t) copy_row(t, 2 * width + head * d, v + t * ds);
    transpose(k, kt);
  }

  // Logits of the queries [first, first + count) of a head: q . k^T + bias + mask.
  void logits(int64_t head, int64_t first, int64_t count, float* s) const {
    product<false>(q + first * ds, ds, 1, kt, ns, s, ns, count, ns, d);
    for (int64_t r = 0; r < count; ++r) {
      const float* bias = grid_.bias + head * grid_.bias_head + (first + r) * grid_.bias_row;
      const float* mask = penalty_.data() + group[first + r] * ns;
      float* row = s + r * ns;
      for (int64_t j = 0; j < ns; j += LANES) {
        vf x = load(row + j) + load(bias + j);
        if (apart_) x += load(mask + j);
        store(row + j, x);
      }
    }
  }

  // out (d, n) = source (n, d)^T; lanes past n stay zero.
  void transpose(const float* source, float* out) const {
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) {
      const float *a = source + t * ds, *b = a + ds, *c = b + ds, *e = c + ds;
      for (int64_t i = 0; i < d; ++i) {
        float* to = out + i * ns + t;
        to[0] = a[i], to[1] = b[i], to[2] = c[i], to[3] = e[i];
      }
    }
    for (; t < n; ++t)
      for (int64_t i = 0; i < d; ++i) out[i * ns + t] = source[t * ds + i];
  }

  // Gradient of the scaled, normalised vectors `source` as the gradient of what came in, in place. Returns the sum of
  // gradient . vector, which is that of the logit scale's logarithm where the vectors are the queries.
  float normalize_backward(const float* source, float scale, bool key, float* gradient, int64_t count, int64_t first) {
    float total = 0;
    if (!grid_.logit_scale) {
      for (int64_t i = 0; i < count * ds; i += LANES) store(gradient + i, load(gradient + i) * scale);
      return total;
    }
    for (int64_t t = 0; t < count; ++t) {
      const float* x = source + t * ds;  // scale * unit vector
      float* g = gradient + t * ds;
      vf dot = {};
      for (int64_t i = 0; i < ds; i += LANES) dot += load(x + i) * load(g + i);
      const float along = hsum(dot), norm = norms_[key * n + first + t];
      total += along;
      const float back = norm > TINY ? along / scale : 0.0f, factor = 1.0f / (norm > TINY ? norm : TINY);
      for (int64_t i = 0; i < ds; i += LANES)
        store(g + i, (load(g + i) * scale - load(x + i) * back) * factor);
    }
    return total;
  }

 private:
  // Where a token's numbers are: in the grid, or those of the padding row; null where padding is zero.
  const T* at(int64_t t, int64_t column) const {
    if (rows[t] >= 0) return qkv_ + rows[t] * 3 * grid_.channels() + column;
    return pad_ ? pad_ + column : nullptr;
  }

  void copy_row(int64_t t, int64_t column, float* out) const {
    const T* source = at(t, column);
    for (int64_t i = 0; i < d; i += LANES) store(out + i, source ? load_part(source + i, part(i, d)) : vf{});
  }

  // Times `scale`, and of unit length first for cosines.
  void load_rows(int64_t column, float* out, float scale, float* norms) const {
    for (int64_t t = 0; t < n; ++t) {
      float *row = out + t * ds, factor = scale;
      copy_row(t, column, row);
      if (grid_.logit_scale) {
        vf squares = {};
        for (int64_t i = 0; i < ds; i += LANES) squares += load(row + i) * load(row + i);
        norms[t] = __builtin_sqrtf(hsum(squares));
        factor = scale / (norms[t] > TINY ? norms[t] : TINY);
      }
      if (factor != 1.0f)
        for (int64_t i = 0; i < ds; i += LANES) store(row + i, load(row + i) * factor);
    }
  }

  const WindowGrid& grid_;
  const T *qkv_, *pad_;
  bool apart_ = false;

 public:
  const int64_t n, ns, d, ds;         // tokens of a window, width of a head, and both padded to whole vectors
  std::vector<int64_t> rows, group;   // (n,)
  float *q, *k, *v, *extra, *kt, *vt; // (n, ds) and, transposed, (ds, ns)

 private:
  std::vector<float> norms_, penalty_, floats_;
};

// e^(x - max x) of a row of logits, in place; returns their sum.
SGMIM_INLINE float exponentials(float* row, int64_t ns) {
  vf top = load(row);
  for (int64_t j = LANES; j < ns; j += LANES) top = vmax(top, load(row + j));
  const float highest = hmax(top);
  vf sum = {};
  for (int64_t j = 0; j < ns; j += LANES) {
    const vf e = exp(load(row + j) - highest);
    store(row + j, e);
    sum += e;
  }
  return hsum(sum);
}

template <class T>
void window_attention_range(
    const WindowGrid* grid,
    const T* qkv,  // (batch * height * width, 3 * channels)
    const T* pad,  // (3 * channels), or null: zeros
    T* out,        // (batch * height * width, channels)
    int64_t begin, int64_t end) {
  WindowHead<T> w(*grid, qkv, pad);
  const int64_t n = w.n, ns = w.ns, d = w.d, ds = w.ds;
  std::vector<float> p(QUERIES * ns), o(QUERIES * ds);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % grid->heads;
    if (item == begin || head == 0) w.enter(item / grid->heads);
    w.load_head(head);
    for (int64_t first = 0; first < n; first += QUERIES) {
      const int64_t count = n - first < QUERIES ? n - first : QUERIES;
      w.logits(head, first, count, p.data());
      float inverse[QUERIES];
      for (int64_t r = 0; r < count; ++r) inverse[r] = 1.0f / exponentials(p.data() + r * ns, ns);
      product<false>(p.data(), ns, 1, w.v, ds, o.data(), ds, count, ds, n);
      for (int64_t r = 0; r < count; ++r) {
        if (w.rows[first + r] < 0) continue;
        T* to = out + w.rows[first + r] * grid->channels() + head * d;
        for (int64_t i = 0; i < d; i += LANES)
          store_part(to + i, load(o.data() + r * ds + i) * inverse[r], part(i, d));
      }
    }
  }
}

template <class T>
void window_attention_backward_range(
    const WindowGrid* grid, const T* qkv, const T* pad,
    const T* dout,  // (batch * height * width, channels)
    T* dqkv,        // (batch * height * width, 3 * channels)
    const WindowSums* sums, int64_t first_head, int64_t last_head, int64_t begin, int64_t end) {
  WindowHead<T> w(*grid, qkv, pad);
  const int64_t n = w.n, ns = w.ns, d = w.d, ds = w.ds, width = grid->channels();
  std::vector<float> p(QUERIES * ns), dp(QUERIES * ns), dq(QUERIES * ds), dk(n * ds), dv(n * ds);
  float* grad = w.extra;
  for (int64_t window = begin; window < end; ++window) {
    w.enter(window);
    for (int64_t head = first_head; head < last_head; ++head) {
      w.load_head(head);
      w.transpose(w.v, w.vt);
      for (int64_t t = 0; t < n; ++t)
        for (int64_t i = 0; i < d; i += LANES)
          store(grad + t * ds + i,
                w.rows[t] < 0 ? vf{} : load_part(dout + w.rows[t] * width + head * d + i, part(i, d)));
      std::fill(dk.begin(), dk.end(), 0.0f);
      std::fill(dv.begin(), dv.end(), 0.0f);
      const float scale = grid->logit_scale ? grid->logit_scale[head] : 1.0f / __builtin_sqrtf(d);
      for (int64_t first = 0; first < n; first += QUERIES) {
        const int64_t count = n - first < QUERIES ? n - first : QUERIES;
        w.logits(head, first, count, p.data());
        product<false>(grad + first * ds, ds, 1, w.vt, ns, dp.data(), ns, count, ns, d);
        for (int64_t r = 0; r < count; ++r) {
          float *row = p.data() + r * ns, *drow = dp.data() + r * ns;
          if (w.rows[first + r] < 0) {  // nobody reads what padding attends to
            std::fill(row, row + ns, 0.0f);
            std::fill(drow, drow + ns, 0.0f);
            continue;
          }
          const float inverse = 1.0f / exponentials(row, ns);
          vf dot = {};
          for (int64_t j = 0; j < ns; j += LANES) {
            const vf e = load(row + j) * inverse;
            store(row + j, e);
            dot += e * load(drow + j);
          }
          const float mean = hsum(dot);
          for (int64_t j = 0; j < ns; j += LANES) store(drow + j, load(row + j) * (load(drow + j) - mean));
          if (sums->bias) accumulate_row(drow, sums->bias + (head * n + first + r) * grid->keys, ns);
        }
        product<true>(p.data(), 1, ns, grad + first * ds, ds, dv.data(), ds, n, ds, count);
        product<true>(dp.data(), 1, ns, w.q + first * ds, ds, dk.data(), ds, n, ds, count);
        product<false>(dp.data(), ns, 1, w.k, ds, dq.data(), ds, count, ds, n);
        const float along = w.normalize_backward(w.q + first * ds, scale, false, dq.data(), count, first);
        if (sums->logit_scale) sums->logit_scale[head] += along;
        for (int64_t r = 0; r < count; ++r)
          if (w.rows[first + r] >= 0)
            for (int64_t i = 0; i < d; i += LANES)
              store_part(dqkv + w.rows[first + r] * 3 * width + head * d + i, load(dq.data() + r * ds + i), part(i, d));
      }
      w.normalize_backward(w.k, 1.0f, true, dk.data(), n, 0);
      for (int64_t t = 0; t < n; ++t) {
        const int64_t column = width + head * d;
        if (w.rows[t] >= 0) {
          for (int64_t i = 0; i < d; i += LANES) {
            T* to = dqkv + w.rows[t] * 3 * width + column + i;
            store_part(to, load(dk.data() + t * ds + i), part(i, d));
            store_part(to + width, load(dv.data() + t * ds + i), part(i, d));
          }
        } else if (sums->pad) {
          accumulate_row(dk.data() + t * ds, sums->pad + column, d);
          accumulate_row(dv.data() + t * ds, sums->pad + column + width, d);
        }
      }
    }
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

// The grid of a call, and the bias spread out to a padded row of keys per head and query.
class GridWithBias {
 public:
  GridWithBias(
      const Tensor& qkv, const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
      const std::optional<Tensor>& logit_scale, int64_t heads, int64_t window_h, int64_t window_w, int64_t shift_h,
      int64_t shift_w) {
    SGMIM_CHECK(0 <= shift_h && shift_h < window_h && 0 <= shift_w && shift_w < window_w, "shift is not in the window");
    grid = {qkv.size(0), qkv.size(1), qkv.size(2), window_h, window_w, shift_h, shift_w, heads,
            qkv.size(3) / (3 * heads), data<float>(logit_scale), nullptr, 0, 0, (window_h * window_w + 15) / 16 * 16};
    const int64_t n = grid.tokens(), keys = grid.keys;
    if (index.has_value()) check_rows(*index, bias->size(0), "index");
    const int64_t rows = bias.has_value() ? heads * n : 1;
    dense_.assign(rows * keys, -__builtin_inff());
    const int64_t* at = data<int64_t>(index);
    const float* values = data<float>(bias);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < n; ++j)
        dense_[r * keys + j] = !values ? 0.0f : at ? values[at[r % n * n + j] * heads + r / n] : values[r * n + j];
    grid.bias = dense_.data();
    if (values) grid.bias_head = n * keys, grid.bias_row = keys;
  }

  WindowGrid grid;

 private:
  std::vector<float> dense_;
};

static void window_attention(
    const Tensor& qkv, const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
    const std::optional<Tensor>& logit_scale, const std::optional<Tensor>& pad, int64_t heads, int64_t window_h,
    int64_t window_w, int64_t shift_h, int64_t shift_w, const Tensor& out) {
  const GridWithBias call(qkv, bias, index, logit_scale, heads, window_h, window_w, shift_h, shift_w);
  dispatch_float(qkv, "qkv", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((window_attention_range<T>));
    parallel(call.grid.windows() * heads, 4, [&](int64_t begin, int64_t end) {
      kernel(&call.grid, data<T>(qkv), data<T>(pad), data<T>(out), begin, end);
    });
  });
}

// dbias: as bias; dpad: (3 * channels); dlogit_scale: (heads,), of the scale's logarithm. Each may be missing.
static void window_attention_backward(
    const Tensor& dout, const Tensor& qkv, const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
    const std::optional<Tensor>& logit_scale, const std::optional<Tensor>& pad, int64_t heads,
    int64_t window_h, int64_t window_w, int64_t shift_h, int64_t shift_w, const Tensor& dqkv,
    const std::optional<Tensor>& dbias, const std::optional<Tensor>& dpad, const std::optional<Tensor>& dlogit_scale) {
  const GridWithBias call(qkv, bias, index, logit_scale, heads, window_h, window_w, shift_h, shift_w);
  const int64_t n = call.grid.tokens(), keys = call.grid.keys, windows = call.grid.windows();
  const int64_t width = 3 * call.grid.channels();
  const int64_t bias_size = dbias.has_value() ? heads * n * keys : 0;
  const int64_t size = bias_size + (dpad.has_value() ? width : 0) + (dlogit_scale.has_value() ? heads : 0);
  // As many blocks of windows as fit into 2M floats; few of them are split by heads, whose sums lie apart anyway.
  const int64_t blocks =
      std::clamp<int64_t>((int64_t{2} << 20) / std::max<int64_t>(size, 1), 1, std::min<int64_t>(windows, 64));
  const int64_t groups = blocks >= 32 ? 1 : heads;
  std::vector<float> sums(blocks * size, 0.0f);
  dispatch_float(qkv, "qkv", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((window_attention_backward_range<T>));
    parallel(blocks * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / groups, group = task % groups;
        float* at = sums.data() + block * size;
        WindowSums mine{dbias.has_value() ? at : nullptr, dpad.has_value() ? at + bias_size : nullptr,
                        dlogit_scale.has_value() ? at + size - heads : nullptr};
        kernel(&call.grid, data<T>(qkv), data<T>(pad), data<T>(dout), data<T>(dqkv), &mine,
               group * heads / groups, (group + 1) * heads / groups, block * windows / blocks,
               (block + 1) * windows / blocks);
      }
    });
  });
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[b * size + i];
  if (float* to = data<float>(dpad)) std::copy_n(sums.data() + bias_size, width, to);
  if (float* to = data<float>(dlogit_scale)) std::copy_n(sums.data() + size - heads, heads, to);
  float* to = data<float>(dbias);
  if (!to) return;
  const int64_t* at = data<int64_t>(index);
  std::fill_n(to, dbias->numel(), 0.0f);
  for (int64_t r = 0; r < heads * n; ++r)
    for (int64_t j = 0; j < n; ++j) to[at ? at[r % n * n + j] * heads + r / n : r * n + j] += sums[r * keys + j];
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def(
      "window_attention(Tensor qkv, Tensor? bias, Tensor? index, Tensor? logit_scale, Tensor? pad, int heads, "
      "int window_h, int window_w, int shift_h, int shift_w, Tensor(a!) out) -> ()");
  m.def(
      "window_attention_backward(Tensor dout, Tensor qkv, Tensor? bias, Tensor? index, Tensor? logit_scale, "
      "Tensor? pad, int heads, int window_h, int window_w, int shift_h, int shift_w, Tensor(a!) dqkv, "
      "Tensor(b!)? dbias, Tensor(c!)? dpad, Tensor(d!)? dlogit_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}

#endif
}  // namespace sgmim
