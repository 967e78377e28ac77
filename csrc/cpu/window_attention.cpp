// Attention inside the windows of a token grid. Cyclic shift, padding, window partition and their reverse are index
// arithmetic on the rows of qkv: nothing is rolled, padded or copied, and no (windows, heads, n, n) tensor exists.
//
// Each (window, head) is computed in float scratch memory, 48 queries at a time. Logits are stored transposed, (keys,
// queries): the softmax then runs along vectors of queries and needs no reduction across lanes. The backward recomputes
// the softmax from the logits. Starting from a saved logsumexp would be less accurate: with SwinV2's logits of up to
// 100 its rounding alone is 1e-5 of the probabilities. Gradients that are summed over windows (bias, padding row, logit
// scale, qkv bias) are summed per block of windows. Blocks depend on the shape alone, so that the result has the same
// bits for any number of threads.
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
void window_attention_tasks(
    const WindowGrid* grid,
    const T* qkv,  // (batch * height * width, 3 * channels)
    const T* pad,  // (3 * channels,): qkv of a padding token, or null: zeros
    T* out,        // (batch * height * width, channels)
    const WindowTasks* tasks, int64_t begin, int64_t end) {
  WindowHead<T> w(*grid, qkv, pad);
  const int64_t n = w.n, d = w.d, ds = w.ds;
  Aligned<float> floats(n * QUERIES + QUERIES * ds);
  float *p = floats.data(), *o = p + n * QUERIES;
  alignas(64) float row_max[QUERIES], inverse_sum[QUERIES];
  w.for_each(*tasks, begin, end, [&](int64_t, int64_t head) SGMIM_INLINE_LAMBDA {
    w.load_head(head);
    for (int64_t first = 0; first < n; first += QUERIES) {
      const int64_t count = n - first < QUERIES ? n - first : QUERIES;
      w.logits(head, first, count, p, row_max);
      by_three_vectors(count, [&](auto vectors, int64_t c) SGMIM_INLINE_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        vf max[V], sum[V] = {};
        for (int v = 0; v < V; ++v) max[v] = load(row_max + c + v * LANES);
        for (int64_t j = 0; j < n; ++j)
          for (int v = 0; v < V; ++v) {
            float* at = p + j * QUERIES + c + v * LANES;
            const vf e = exp2(load(at) - max[v]);
            store(at, e);
            sum[v] += e;
          }
        for (int v = 0; v < V; ++v) store(inverse_sum + c + v * LANES, 1.0f / sum[v]);
      });
      gemm<false>(p, 1, QUERIES, w.v, ds, o, ds, count, ds, n);
      write_results(o, inverse_sum, w.rows.data() + first, count, ds, d, grid->channels(), out + head * d);
    }
  });
}

template <class T>
void window_attention_backward_tasks(
    const WindowGrid* grid, const T* qkv, const T* pad,
    const T* dout,           // (batch * height * width, channels)
    T* dqkv,                 // (batch * height * width, 3 * channels)
    T* out,                  // (batch * height * width, channels): the attention's result, or null
    const WindowSums* sums,  // of each block
    const WindowTasks* tasks, int64_t begin, int64_t end) {
  WindowHead<T> w(*grid, qkv, pad);
  const int64_t n = w.n, ns = w.ns, d = w.d, ds = w.ds, width = grid->channels();
  Aligned<float> floats(2 * n * QUERIES + 3 * n * ds + QUERIES * ds);
  float *p = floats.data(), *dp = p + n * QUERIES, *dq = dp + n * QUERIES, *dk = dq + n * ds, *dv = dk + n * ds;
  float* o = dv + n * ds;
  alignas(64) float row_max[QUERIES];
  w.for_each(*tasks, begin, end, [&](int64_t task, int64_t head) SGMIM_INLINE_LAMBDA {
    const WindowSums& mine = sums[tasks->block(task)];
    w.load_head(head);
    w.load_grad(head, dout);
    for (int64_t first = 0; first < n; first += QUERIES) {
      const int64_t count = n - first < QUERIES ? n - first : QUERIES, row = grid->bias_row(first);
      w.prefetch_gradients(dqkv, head, first, count);
      w.logits(head, first, count, p, row_max);
      gemm<false>(w.v, ds, 1, w.grad_t + first, ns, dp, QUERIES, n, padded(count), d);
      by_three_vectors(count, [&](auto vectors, int64_t c) SGMIM_INLINE_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        vf delta[V], inverse_sum[V];
        softmax_and_delta<Exact>(p + c, dp + c, row_max + c, n, inverse_sum, delta);
        float* dbias = mine.bias ? mine.bias + grid->bias_at(head, first, 0) + c : nullptr;
        for (int64_t j = 0; j < n; ++j)
          for (int v = 0; v < V; ++v) {
            const int64_t at = j * QUERIES + c + v * LANES;
            const vf x = load(p + at) * inverse_sum[v], dx = x * (load(dp + at) - delta[v]);
            store(p + at, x);
            store(dp + at, dx);
            if (dbias) store(dbias + j * row + v * LANES, load(dbias + j * row + v * LANES) + dx);
          }
      });
      const auto sum = first > 0 ? &gemm_of_head<true, float> : &gemm_of_head<false, float>;
      sum(p, QUERIES, w.grad + first * ds, ds, dv, n, count);
      sum(dp, QUERIES, w.q + first * ds, ds, dk, n, count);
      gemm<false>(dp, 1, QUERIES, w.k, ds, dq + first * ds, ds, count, ds, n);
      if (out) {
        gemm<false>(p, 1, QUERIES, w.v, ds, o, ds, count, ds, n);
        write_results(o, nullptr, w.rows.data() + first, count, ds, d, width, out + head * d);
      }
    }
    const float along = w.normalize_backward(w.q, w.norms(false), w.scale, dq, n);
    if (mine.logit_scale) mine.logit_scale[head] += along;
    w.normalize_backward(w.k, w.norms(true), 1.0f, dk, n);
    write_gradients(dq, dk, dv, w.rows, d, ds, head * d, width, dqkv, mine);
  });
}

}  // namespace SGMIM_ISA
}  // namespace sgmim

#ifdef SGMIM_HAS_BF16
#include "cpu/window_pairs.h"
#endif

#ifdef SGMIM_ONCE
namespace sgmim {

constexpr float MAX_LOGIT_SCALE = 4.605170186f;  // log 100, the bound of the parameter in SwinV2

// The grid of one call, the factors of its cosines, e^min(logit_scale, log 100), and its dense bias: the bias of every
// head times log2(e), in the layout of WindowGrid::bias_at, with rows padded with zeros.
class GridWithBias {
 public:
  GridWithBias(
      const Tensor& qkv, const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
      const std::optional<Tensor>& logit_scale, const std::optional<Tensor>& pad, int64_t heads, int64_t window_h,
      int64_t window_w, int64_t shift_h, int64_t shift_w) {
    SGMIM_CHECK(qkv.dim() == 4 && heads > 0 && qkv.size(3) % (3 * heads) == 0, "qkv must be (B, H, W, 3 * heads * d)");
    check_packed(qkv, "qkv", qkv.scalar_type(), qkv.numel());
    SGMIM_CHECK(0 < window_h && window_h <= INT16_MAX && 0 < window_w && window_w <= INT16_MAX,
                "window must have sides from 1 to 2^15 - 1, got ", window_h, " x ", window_w);
    check_packed(logit_scale, "logit_scale", ScalarType::Float, heads);
    check_packed(pad, "pad", qkv.scalar_type(), qkv.size(3));
    SGMIM_CHECK(0 <= shift_h && shift_h < window_h && 0 <= shift_w && shift_w < window_w,
                "shift must be at least 0 and less than window, got ", shift_h, " x ", shift_w);
    const int64_t n = window_h * window_w, ns = (n + 15) / 16 * 16;
    grid = {qkv.size(0), qkv.size(1), qkv.size(2), window_h, window_w, shift_h, shift_w, heads,
            qkv.size(3) / (3 * heads), nullptr, nullptr, ns};
    if (const float* parameter = data<float>(logit_scale)) {
      for (int64_t head = 0; head < heads; ++head)
        scales_.push_back(std::exp(parameter[head] > MAX_LOGIT_SCALE ? MAX_LOGIT_SCALE : parameter[head]));
      grid.logit_scale = scales_.data();
    }
    if (!bias.has_value()) return;
    const int64_t entries = index.has_value() ? bias->size(0) : n * n;
    check_packed(*bias, "bias", ScalarType::Float, entries * heads);
    if (index.has_value()) {
      check_rows(*index, entries, "index");
      check_packed(*index, "index", ScalarType::Long, n * n);
    }
    dense_ = Aligned<float>(heads * n * ns);
    grid.bias = dense_.data();
    places_.assign(n * ns, -1);
    const int64_t* at = data<int64_t>(index);
    for (int64_t first = 0; first < n; first += QUERIES)
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = first; i < n && i < first + QUERIES; ++i)
          places_[grid.bias_at(0, first, j) + i - first] = at ? at[i * n + j] : i * n + j;
    entries_ = entries;
    stride_ = at ? heads : 1;
    head_stride_ = at ? 1 : entries;
    const float* values = data<float>(bias);
    float* dense = dense_.data();
    parallel(heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> column(entries);
      for (int64_t head = begin; head < end; ++head) {
        const float* from = values + head * head_stride_;
        for (int64_t e = 0; e < entries; ++e) column[e] = from[e * stride_] * LOG2E;
        for (int64_t place = 0; place < n * ns; ++place)
          dense[head * n * ns + place] = places_[place] >= 0 ? column[places_[place]] : 0.0f;
      }
    });
  }

  // Converts `sums`, the gradient of the dense bias, to the gradient of the bias argument. Every entry is summed in an
  // order that depends on the index alone.
  void gradient(const float* sums, const Tensor& to) const {
    const int64_t all = grid.tokens() * grid.padded_tokens;
    float* out = data<float>(to);
    parallel(grid.heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> column(entries_);
      for (int64_t head = begin; head < end; ++head) {
        std::fill(column.begin(), column.end(), 0.0f);
        for (int64_t place = 0; place < all; ++place)
          if (places_[place] >= 0) column[places_[place]] += sums[head * all + place];
        float* into = out + head * head_stride_;
        for (int64_t e = 0; e < entries_; ++e) into[e * stride_] = column[e];
      }
    });
  }

  // Bytes of one head's dense bias.
  int64_t bytes() const { return grid.bias ? grid.tokens() * grid.padded_tokens * 4 : 0; }

  WindowGrid grid;

 private:
  std::vector<float> scales_;
  Aligned<float> dense_{0};
  std::vector<int32_t> places_;                  // bias entry of each element of a head's dense bias, -1 for padding
  int64_t entries_ = 0, stride_ = 0, head_stride_ = 0;  // entries of a head, their stride, stride between heads
};

static void window_attention(
    const Tensor& qkv, const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
    const std::optional<Tensor>& logit_scale, const std::optional<Tensor>& pad, int64_t heads, int64_t window_h,
    int64_t window_w, int64_t shift_h, int64_t shift_w, const Tensor& out) {
  const GridWithBias call(qkv, bias, index, logit_scale, pad, heads, window_h, window_w, shift_h, shift_w);
  check_packed(out, "out", qkv.scalar_type(), qkv.numel() / 3);
  const WindowTasks tasks(call.grid);
  dispatch_float(qkv, "qkv", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((window_attention_tasks<T>));
    parallel(tasks.count(), 1, [&](int64_t begin, int64_t end) {
      kernel(&call.grid, data<T>(qkv), data<T>(pad), data<T>(out), &tasks, begin, end);
    });
  });
}

// Computes dqkv and, where they are given: out, the attention's result, in float32 only; dbias, of bias's shape; dpad
// (3 * channels,); dlogit_scale (heads,), 0 where logit_scale is above its bound; dqkv_bias (3 * channels,), the
// gradient of a bias added to both qkv and pad.
static void window_attention_backward(
    const Tensor& dout, const Tensor& qkv, const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
    const std::optional<Tensor>& logit_scale, const std::optional<Tensor>& pad, int64_t heads,
    int64_t window_h, int64_t window_w, int64_t shift_h, int64_t shift_w, const Tensor& dqkv,
    const std::optional<Tensor>& out, const std::optional<Tensor>& dbias, const std::optional<Tensor>& dpad,
    const std::optional<Tensor>& dlogit_scale, const std::optional<Tensor>& dqkv_bias) {
  const GridWithBias call(qkv, bias, index, logit_scale, pad, heads, window_h, window_w, shift_h, shift_w);
  check_packed(dout, "dout", qkv.scalar_type(), qkv.numel() / 3);
  check_packed(dqkv, "dqkv", qkv.scalar_type(), qkv.numel());
  check_packed(out, "out", ScalarType::Float, qkv.numel() / 3);
  SGMIM_CHECK(!out.has_value() || qkv.scalar_type() == ScalarType::Float, "out is given with qkv in bfloat16");
  SGMIM_CHECK(bias.has_value() || !dbias.has_value(), "dbias is given without bias");
  SGMIM_CHECK(logit_scale.has_value() || !dlogit_scale.has_value(), "dlogit_scale is given without logit_scale");
  if (dbias.has_value()) check_packed(*dbias, "dbias", ScalarType::Float, bias->numel());
  check_packed(dpad, "dpad", ScalarType::Float, qkv.size(3));
  check_packed(dlogit_scale, "dlogit_scale", ScalarType::Float, heads);
  check_packed(dqkv_bias, "dqkv_bias", ScalarType::Float, qkv.size(3));
  const int64_t width = 3 * call.grid.channels();
  const int64_t bias_size = dbias.has_value() ? heads * call.grid.tokens() * call.grid.padded_tokens : 0;
  const int64_t numbers = bias_size + (dpad.has_value() ? width : 0) + (dlogit_scale.has_value() ? heads : 0);
  const int64_t size = (numbers + 15) / 16 * 16, doubles = dqkv_bias.has_value() ? width : 0;
  // Each block of windows accumulates into its own sums, which are reduced at the end: at most 2M floats in all.
  const int64_t most = (int64_t{2} << 20) / std::max<int64_t>(size + 2 * doubles, 1);
  const WindowTasks tasks(call.grid, call.bytes() + bias_size / heads * 4, most);
  const int64_t blocks = tasks.blocks;
  Aligned<float> storage(blocks * size);
  float* sums = storage.data();
  std::vector<double> qkv_sums(blocks * doubles);
  std::vector<WindowSums> of_blocks;
  for (int64_t b = 0; b < blocks; ++b) {
    float* at = sums + b * size;
    of_blocks.push_back(
        {dbias.has_value() ? at : nullptr, dpad.has_value() ? at + bias_size : nullptr,
         dlogit_scale.has_value() ? at + numbers - heads : nullptr,
         doubles > 0 ? qkv_sums.data() + b * doubles : nullptr});
  }
  dispatch_float(qkv, "qkv", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((window_attention_backward_tasks<T>));
    parallel(tasks.count(), 1, [&](int64_t begin, int64_t end) {
      kernel(
          &call.grid, data<T>(qkv), data<T>(pad), data<T>(dout), data<T>(dqkv), data<T>(out), of_blocks.data(), &tasks,
          begin, end);
    });
  });
  parallel(size, 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t b = 1; b < blocks; ++b)
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[b * size + i];
  });
  if (float* to = data<float>(dpad)) std::copy_n(sums + bias_size, width, to);
  if (float* to = data<float>(dlogit_scale))
    for (int64_t head = 0; head < heads; ++head)
      to[head] = data<float>(logit_scale)[head] <= MAX_LOGIT_SCALE ? sums[numbers - heads + head] : 0.0f;
  if (float* to = data<float>(dqkv_bias))
    for (int64_t i = 0; i < doubles; ++i) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += qkv_sums[b * doubles + i];
      to[i] = static_cast<float>(sum);
    }
  if (dbias.has_value()) call.gradient(sums, *dbias);
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def(
      "window_attention(Tensor qkv, Tensor? bias, Tensor? index, Tensor? logit_scale, Tensor? pad, int heads, "
      "int window_h, int window_w, int shift_h, int shift_w, Tensor(a!) out) -> ()");
  m.def(
      "window_attention_backward(Tensor dout, Tensor qkv, Tensor? bias, Tensor? index, Tensor? logit_scale, "
      "Tensor? pad, int heads, int window_h, int window_w, int shift_h, int shift_w, Tensor(a!) dqkv, "
      "Tensor(b!)? out, Tensor(c!)? dbias, Tensor(d!)? dpad, Tensor(e!)? dlogit_scale, Tensor(f!)? dqkv_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}

}  // namespace sgmim
#endif
