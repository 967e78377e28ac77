// Attention inside the windows of a token grid: cyclic shift, padding, partition and their reverse are index
// arithmetic on the rows of qkv, so nothing is rolled, padded or copied, and no (windows, heads, n, n) tensor exists.
//
// One (window, head) at a time lives in float scratch, 48 queries at once. Logits are kept transposed, (keys, queries):
// the softmax then runs along vectors of queries and needs no sum across a vector. The backward computes the probabilities again, which from a saved log-sum would be less exact: with SwinV2's
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
  const float* bias;                                        // (heads, keys, padded queries), or null
  int64_t padded_tokens;                                    // tokens of a window, padded for the widest vectors

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
  float* bias;         // (heads, keys, padded queries) or null
  float* pad;          // (3 * channels) or null
  float* logit_scale;  // (heads,) or null
};
}  // namespace sgmim
#endif

namespace sgmim {
namespace SGMIM_ISA {

constexpr int64_t QUERIES = 48;   // columns of logits at a time, whole vectors of any instruction set
constexpr float TINY = 1e-12f;    // least norm of a vector, as in torch.nn.functional.normalize
constexpr float APART = -100.0f;  // added to the logits of tokens that are not neighbours, as in timm

SGMIM_INLINE int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// One window and head: where its tokens are, and copies of its matrices. Their rows are padded with zeros.
template <class T>
class WindowHead {
 public:
  WindowHead(const WindowGrid& grid, const T* qkv, const T* pad)
      : n(grid.tokens()), ns(grid.padded_tokens), d(grid.head_width), ds(padded(d)), rows(n), grid_(grid), qkv_(qkv),
        pad_(pad), group_(n), norms_(2 * n), apart_(4 * ns), floats_(4 * n * ds + 2 * d * ns) {
    q = floats_.data();
    k = q + n * ds;
    v = k + n * ds;
    grad = v + n * ds;
    qt = grad + n * ds;
    grad_t = qt + d * ns;
  }

  void enter(int64_t window) {
    masked_ = grid_.locate(window, rows.data(), group_.data());
    if (!masked_) return;
    for (int64_t g = 0; g < 4; ++g)
      for (int64_t t = 0; t < n; ++t) apart_[g * ns + t] = group_[t] == g ? 0.0f : APART;
  }

  // Queries (scaled), keys and values of a head.
  void load_head(int64_t head) {
    const int64_t width = grid_.channels();
    scale = grid_.logit_scale ? grid_.logit_scale[head] : 1.0f / __builtin_sqrtf(d);
    load_rows(qkv_, 3 * width, head * d, pad_, q);
    load_rows(qkv_, 3 * width, width + head * d, pad_, k);
    load_rows(qkv_, 3 * width, 2 * width + head * d, pad_, v);
    if (grid_.logit_scale) {
      normalize(q, scale, norms_.data());
      normalize(k, 1.0f, norms_.data() + n);
    } else {
      for (int64_t i = 0; i < n * ds; i += LANES) store(q + i, load(q + i) * scale);
    }
    transpose(q, qt);
  }

  // The gradient of the result; 0 outside the grid.
  void load_grad(int64_t head, const T* dout) {
    load_rows(dout, grid_.channels(), head * d, static_cast<const T*>(nullptr), grad);
    transpose(grad, grad_t);
  }

  // Softmax over the keys for the queries [first, first + count): e^(logit - highest), (n, QUERIES), and the inverse of
  // the sums.
  void exponentials(int64_t head, int64_t first, int64_t count, float* p, float* inverse) const {
    product<false>(k, ds, 1, qt + first, ns, p, QUERIES, n, padded(count), d);
    const float* bias = grid_.bias ? grid_.bias + head * n * ns + first : nullptr;
    for (int64_t c = 0; c < count; c += LANES) {
      vf highest = set1(-__builtin_inff());
      for (int64_t j = 0; j < n; ++j) {
        vf x = load(p + j * QUERIES + c);
        if (bias) x += load(bias + j * ns + c);
        if (masked_) x += load(apart_.data() + group_[j] * ns + first + c);
        store(p + j * QUERIES + c, x);
        highest = vmax(highest, x);
      }
      vf sum = {};
      for (int64_t j = 0; j < n; ++j) {
        const vf e = exp(load(p + j * QUERIES + c) - highest);
        store(p + j * QUERIES + c, e);
        sum += e;
      }
      store(inverse + c, 1.0f / sum);
    }
  }

  // Gradient of the scaled unit vectors `x` as the gradient of what came in, in place; without cosines only scaled.
  // Returns the sum of gradient . x: for the queries that is the gradient of the logit scale's logarithm.
  float normalize_backward(const float* x, const float* norms, float factor, float* g, int64_t count) const {
    float total = 0;
    for (int64_t t = 0; t < count; ++t, x += ds, g += ds) {
      float along = 0, inverse = 1.0f;
      if (grid_.logit_scale) {
        vf dot = {};
        for (int64_t i = 0; i < ds; i += LANES) dot += load(x + i) * load(g + i);
        total += along = hsum(dot);
        inverse = 1.0f / (norms[t] > TINY ? norms[t] : TINY);
        if (!(norms[t] > TINY)) along = 0;
      }
      for (int64_t i = 0; i < ds; i += LANES)
        store(g + i, (load(g + i) * factor - load(x + i) * (along / factor)) * inverse);
    }
    return total;
  }

  const float* norms(bool of_keys) const { return norms_.data() + of_keys * n; }

 private:
  // Rows of (*, width) that the window's tokens are, columns [column, column + d); `outside` is the row past the grid.
  template <class S>
  void load_rows(const S* source, int64_t width, int64_t column, const S* outside, float* out) const {
    for (int64_t t = 0; t < n; ++t) {
      const S* row = rows[t] >= 0 ? source + rows[t] * width + column : outside ? outside + column : nullptr;
      int64_t i = 0;
      if (!row) {
        for (; i < ds; i += LANES) store(out + t * ds + i, vf{});
        continue;
      }
      for (int64_t next = 0; next < d; next += 64 / sizeof(S)) __builtin_prefetch(row + d + next);  // of the next head
      for (; i + LANES <= d; i += LANES) store(out + t * ds + i, load(row + i));
      if (i < d) store(out + t * ds + i, load_tail(row + i, d - i));
    }
  }

  void normalize(float* x, float factor, float* norms) const {
    for (int64_t t = 0; t < n; ++t, x += ds) {
      vf squares = {};
      for (int64_t i = 0; i < ds; i += LANES) squares += load(x + i) * load(x + i);
      norms[t] = __builtin_sqrtf(hsum(squares));
      const float by = factor / (norms[t] > TINY ? norms[t] : TINY);
      for (int64_t i = 0; i < ds; i += LANES) store(x + i, load(x + i) * by);
    }
  }

  // out (d, ns) = source (n, ds)^T
  void transpose(const float* source, float* out) const {
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) {
      const float* from = source + t * ds;
      int64_t i = 0;
      for (; i + 4 <= d; i += 4) transpose4(from + i, ds, out + i * ns + t, ns);
      for (; i < d; ++i)
        for (int64_t r = 0; r < 4; ++r) out[i * ns + t + r] = from[r * ds + i];
    }
    for (; t < n; ++t)
      for (int64_t i = 0; i < d; ++i) out[i * ns + t] = source[t * ds + i];
  }

 public:
  const int64_t n, ns, d, ds;          // tokens of a window, width of a head, and both padded to whole vectors
  std::vector<int64_t> rows;           // (n,): where the tokens are in the grid, -1 outside
  float scale;                         // of the queries
  float *q, *k, *v, *grad;             // (n, ds)
  float *qt, *grad_t;                  // (d, ns)

 private:
  const WindowGrid& grid_;
  const T *qkv_, *pad_;
  bool masked_ = false;
  std::vector<int64_t> group_;         // (n,)
  std::vector<float> norms_, apart_;   // (2, n) of queries and keys; (4, ns), what keys of a group add to each query
  std::vector<float> floats_;
};

template <class T>
void window_attention_range(
    const WindowGrid* grid,
    const T* qkv,  // (batch * height * width, 3 * channels)
    const T* pad,  // (3 * channels), or null: zeros
    T* out,        // (batch * height * width, channels)
    int64_t begin, int64_t end) {
  WindowHead<T> w(*grid, qkv, pad);
  const int64_t n = w.n, d = w.d, ds = w.ds;
  std::vector<float> p(n * QUERIES), o(QUERIES * ds);
  float inverse[QUERIES];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % grid->heads;
    if (item == begin || head == 0) w.enter(item / grid->heads);
    w.load_head(head);
    for (int64_t first = 0; first < n; first += QUERIES) {
      const int64_t count = n - first < QUERIES ? n - first : QUERIES;
      w.exponentials(head, first, count, p.data(), inverse);
      product<false>(p.data(), 1, QUERIES, w.v, ds, o.data(), ds, count, ds, n);
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
  std::vector<float> p(n * QUERIES), dp(n * QUERIES), dq(n * ds), dk(n * ds), dv(n * ds);
  float inverse[QUERIES];
  const auto write = [&](const float* rows, int64_t t, int64_t column) {
    for (int64_t i = 0; i < d; i += LANES)
      store_part(dqkv + w.rows[t] * 3 * width + column + i, load(rows + t * ds + i), part(i, d));
  };
  for (int64_t window = begin; window < end; ++window) {
    w.enter(window);
    for (int64_t head = first_head; head < last_head; ++head) {
      w.load_head(head);
      w.load_grad(head, dout);
      for (int64_t t = 0; t < n; ++t)  // written at the end of this head
        for (int64_t i = 0; i < 3 * d && w.rows[t] >= 0; i += 64 / sizeof(T))
          __builtin_prefetch(dqkv + w.rows[t] * 3 * width + i / d * width + head * d + i % d, 1);
      std::fill(dk.begin(), dk.end(), 0.0f);
      std::fill(dv.begin(), dv.end(), 0.0f);
      for (int64_t first = 0; first < n; first += QUERIES) {
        const int64_t count = n - first < QUERIES ? n - first : QUERIES;
        w.exponentials(head, first, count, p.data(), inverse);
        product<false>(w.v, ds, 1, w.grad_t + first, ns, dp.data(), QUERIES, n, padded(count), d);
        for (int64_t c = 0; c < count; c += LANES) {
          const vf normal = load(inverse + c);
          vf mean = {};
          for (int64_t j = 0; j < n; ++j) {
            const vf x = load(p.data() + j * QUERIES + c) * normal;
            store(p.data() + j * QUERIES + c, x);
            mean += x * load(dp.data() + j * QUERIES + c);
          }
          float* dbias = sums->bias ? sums->bias + head * n * ns + first + c : nullptr;
          for (int64_t j = 0; j < n; ++j) {
            float* at = dp.data() + j * QUERIES + c;
            const vf ds_j = load(p.data() + j * QUERIES + c) * (load(at) - mean);
            store(at, ds_j);
            if (dbias) store(dbias + j * ns, load(dbias + j * ns) + ds_j);
          }
        }
        product<true>(p.data(), QUERIES, 1, w.grad + first * ds, ds, dv.data(), ds, n, ds, count);
        product<true>(dp.data(), QUERIES, 1, w.q + first * ds, ds, dk.data(), ds, n, ds, count);
        product<false>(dp.data(), 1, QUERIES, w.k, ds, dq.data() + first * ds, ds, count, ds, n);
      }
      const float along = w.normalize_backward(w.q, w.norms(false), w.scale, dq.data(), n);
      if (sums->logit_scale) sums->logit_scale[head] += along;
      w.normalize_backward(w.k, w.norms(true), 1.0f, dk.data(), n);
      for (int64_t t = 0; t < n; ++t) {
        if (w.rows[t] >= 0) {
          write(dq.data(), t, head * d);
          write(dk.data(), t, width + head * d);
          write(dv.data(), t, 2 * width + head * d);
        } else if (sums->pad) {  // of its queries nobody sees the result
          accumulate_row(dk.data() + t * ds, sums->pad + width + head * d, d);
          accumulate_row(dv.data() + t * ds, sums->pad + 2 * width + head * d, d);
        }
      }
    }
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

// The grid of a call, and the bias spread out per head, transposed, its rows padded with zeros.
class GridWithBias {
 public:
  GridWithBias(
      const Tensor& qkv, const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
      const std::optional<Tensor>& logit_scale, int64_t heads, int64_t window_h, int64_t window_w, int64_t shift_h,
      int64_t shift_w) {
    SGMIM_CHECK(0 <= shift_h && shift_h < window_h && 0 <= shift_w && shift_w < window_w, "shift is not in the window");
    const int64_t n = window_h * window_w, ns = (n + 15) / 16 * 16;
    grid = {qkv.size(0), qkv.size(1), qkv.size(2), window_h, window_w, shift_h, shift_w, heads,
            qkv.size(3) / (3 * heads), data<float>(logit_scale), nullptr, ns};
    if (!bias.has_value()) return;
    if (index.has_value()) check_rows(*index, bias->size(0), "index");
    dense_.assign(heads * n * ns, 0.0f);
    grid.bias = dense_.data();
    const int64_t* at = data<int64_t>(index);
    const float* values = data<float>(bias);
    parallel(heads * n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t head = row / n, j = row % n;
        for (int64_t i = 0; i < n; ++i)
          dense_[row * ns + i] = at ? values[at[i * n + j] * heads + head] : values[(head * n + i) * n + j];
      }
    });
  }

  // sums (heads, keys, padded queries) as the gradient of what came in, in an order of its own for each number.
  static void gradient(const WindowGrid& grid, const float* sums, const std::optional<Tensor>& index, const Tensor& to) {
    const int64_t n = grid.tokens(), ns = grid.padded_tokens, heads = grid.heads;
    const int64_t* at = data<int64_t>(index);
    float* out = data<float>(to);
    std::fill_n(out, to.numel(), 0.0f);
    parallel(heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head)
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < n; ++j)
            out[at ? at[i * n + j] * heads + head : (head * n + i) * n + j] += sums[(head * n + j) * ns + i];
    });
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
  const int64_t windows = call.grid.windows(), width = 3 * call.grid.channels();
  const int64_t bias_size = dbias.has_value() ? heads * call.grid.tokens() * call.grid.padded_tokens : 0;
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
  parallel(size, 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t b = 1; b < blocks; ++b)
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[b * size + i];
  });
  if (float* to = data<float>(dpad)) std::copy_n(sums.data() + bias_size, width, to);
  if (float* to = data<float>(dlogit_scale)) std::copy_n(sums.data() + size - heads, heads, to);
  if (dbias.has_value()) GridWithBias::gradient(call.grid, sums.data(), index, *dbias);
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
