// Attention inside the windows of a token grid: cyclic shift, padding, partition and their reverse are index
// arithmetic on the rows of qkv, so nothing is rolled, padded or copied, and no (windows, heads, n, n) tensor exists.
//
// One (window, head) at a time lives in float scratch, 48 queries at once. Logits are kept transposed, (keys, queries):
// the softmax then runs along vectors of queries and needs no sum across a vector. The backward computes the
// probabilities again, which from a saved log-sum would be less exact: with SwinV2's logits of up to 100 its rounding
// alone is 1e-5 of them. Gradients that are summed over windows (bias, padding row, logit scale) go through blocks of
// windows that depend on the shape alone: the same bits for any number of threads.
#include "cpu/launch.h"
#include "cpu/window_grid.h"

#include <cmath>
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/window_attention.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"
#include "cpu/small_gemm.h"
#include "cpu/window_head.h"

namespace sgmim {
namespace SGMIM_ISA {

template <class T>
void window_attention_range(
    const WindowGrid* grid,
    const T* qkv,  // (batch * height * width, 3 * channels)
    const T* pad,  // (3 * channels), or null: zeros
    T* out,        // (batch * height * width, channels)
    int64_t begin, int64_t end) {
  WindowHead<T> w(*grid, qkv, pad);
  const int64_t n = w.n, d = w.d, ds = w.ds;
  Aligned<float> p(n * QUERIES), o(QUERIES * ds);
  float inverse[QUERIES];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % grid->heads;
    if (item == begin || head == 0) w.enter(item / grid->heads);
    w.load_head(head);
    for (int64_t first = 0; first < n; first += QUERIES) {
      const int64_t count = n - first < QUERIES ? n - first : QUERIES;
      w.exponentials(head, first, count, p.data(), inverse);
      gemm<false>(p.data(), 1, QUERIES, w.v, ds, o.data(), ds, count, ds, n);
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
  Aligned<float> p(n * QUERIES), dp(n * QUERIES), dq(n * ds), dk(n * ds), dv(n * ds);
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
      std::fill_n(dk.data(), n * ds, 0.0f);
      std::fill_n(dv.data(), n * ds, 0.0f);
      for (int64_t first = 0; first < n; first += QUERIES) {
        const int64_t count = n - first < QUERIES ? n - first : QUERIES;
        w.exponentials(head, first, count, p.data(), inverse);
        gemm<false>(w.v, ds, 1, w.grad_t + first, ns, dp.data(), QUERIES, n, padded(count), d);
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
        gemm<true>(p.data(), QUERIES, 1, w.grad + first * ds, ds, dv.data(), ds, n, ds, count);
        gemm<true>(dp.data(), QUERIES, 1, w.q + first * ds, ds, dk.data(), ds, n, ds, count);
        gemm<false>(dp.data(), 1, QUERIES, w.k, ds, dq.data() + first * ds, ds, count, ds, n);
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
}  // namespace sgmim

#ifdef SGMIM_HAS_BF16
#include "cpu/window_pairs.h"
#endif

#ifdef SGMIM_ONCE
namespace sgmim {

// The grid of a call, and the bias spread out per head, transposed, its rows padded with zeros.
class GridWithBias {
 public:
  GridWithBias(
      const Tensor& qkv, const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
      const std::optional<Tensor>& logit_scale, const std::optional<Tensor>& pad, int64_t heads, int64_t window_h, int64_t window_w, int64_t shift_h,
      int64_t shift_w) {
    SGMIM_CHECK(qkv.dim() == 4 && heads > 0 && qkv.size(3) % (3 * heads) == 0, "qkv must be (B, H, W, 3 * heads * d)");
    check_packed(qkv, "qkv", qkv.scalar_type(), qkv.numel());
    SGMIM_CHECK(0 < window_h && window_h <= INT16_MAX && 0 < window_w && window_w <= INT16_MAX, "a window of ", window_h, " x ", window_w, " tokens");
    check_packed(logit_scale, "logit_scale", ScalarType::Float, heads);
    check_packed(pad, "pad", qkv.scalar_type(), qkv.size(3));
    SGMIM_CHECK(0 <= shift_h && shift_h < window_h && 0 <= shift_w && shift_w < window_w, "shift is not in the window");
    const int64_t n = window_h * window_w, ns = (n + 15) / 16 * 16;
    grid = {qkv.size(0), qkv.size(1), qkv.size(2), window_h, window_w, shift_h, shift_w, heads,
            qkv.size(3) / (3 * heads), data<float>(logit_scale), nullptr, ns};
    if (!bias.has_value()) return;
    const int64_t entries = index.has_value() ? bias->size(0) : n * n;
    check_packed(*bias, "bias", ScalarType::Float, entries * heads);
    if (index.has_value()) {
      check_rows(*index, entries, "index");
      check_packed(*index, "index", ScalarType::Long, n * n);
    }
    dense_ = Aligned<float>(heads * n * ns);
    grid.bias = dense_.data();
    const int64_t* at = data<int64_t>(index);
    const float* values = data<float>(bias);
    float* dense = dense_.data();
    parallel(heads * n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t head = row / n, j = row % n;
        for (int64_t i = 0; i < n; ++i)
          dense[row * ns + i] = at ? values[at[i * n + j] * heads + head] : values[(head * n + i) * n + j];
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
  Aligned<float> dense_{0};
};

static void window_attention(
    const Tensor& qkv, const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
    const std::optional<Tensor>& logit_scale, const std::optional<Tensor>& pad, int64_t heads, int64_t window_h,
    int64_t window_w, int64_t shift_h, int64_t shift_w, const Tensor& out) {
  const GridWithBias call(qkv, bias, index, logit_scale, pad, heads, window_h, window_w, shift_h, shift_w);
  check_packed(out, "out", qkv.scalar_type(), qkv.numel() / 3);
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
  const GridWithBias call(qkv, bias, index, logit_scale, pad, heads, window_h, window_w, shift_h, shift_w);
  check_packed(dout, "dout", qkv.scalar_type(), qkv.numel() / 3);
  check_packed(dqkv, "dqkv", qkv.scalar_type(), qkv.numel());
  SGMIM_CHECK(bias.has_value() || !dbias.has_value(), "dbias is wanted of no bias");
  if (dbias.has_value()) check_packed(*dbias, "dbias", ScalarType::Float, bias->numel());
  check_packed(dpad, "dpad", ScalarType::Float, qkv.size(3));
  check_packed(dlogit_scale, "dlogit_scale", ScalarType::Float, heads);
  const int64_t windows = call.grid.windows(), width = 3 * call.grid.channels();
  const int64_t bias_size = dbias.has_value() ? heads * call.grid.tokens() * call.grid.padded_tokens : 0;
  const int64_t numbers = bias_size + (dpad.has_value() ? width : 0) + (dlogit_scale.has_value() ? heads : 0);
  const int64_t size = (numbers + 15) / 16 * 16;
  // 64 blocks of windows and groups of heads: few blocks, since each has sums of its own to be filled and added up, and at
  // least four heads, which lie side by side; fewer blocks and single heads where the sums would exceed 2M floats.
  const int64_t most = std::max<int64_t>((int64_t{2} << 20) / std::max<int64_t>(size, 1), 1);
  int64_t groups = std::clamp<int64_t>(heads / 4, 1, 64);
  int64_t blocks = std::clamp<int64_t>(64 / groups, 1, std::max<int64_t>(windows, 1));
  if (blocks > most) {
    blocks = most;
    groups = heads;
  }
  Aligned<float> storage(blocks * size);
  float* sums = storage.data();
  dispatch_float(qkv, "qkv", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((window_attention_backward_range<T>));
    parallel(blocks * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / groups, group = task % groups;
        float* at = sums + block * size;
        WindowSums mine{dbias.has_value() ? at : nullptr, dpad.has_value() ? at + bias_size : nullptr,
                        dlogit_scale.has_value() ? at + numbers - heads : nullptr};
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
  if (float* to = data<float>(dpad)) std::copy_n(sums + bias_size, width, to);
  if (float* to = data<float>(dlogit_scale)) std::copy_n(sums + numbers - heads, heads, to);
  if (dbias.has_value()) GridWithBias::gradient(call.grid, sums, index, *dbias);
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

}  // namespace sgmim
#endif
