// One window and head of window_attention: where its tokens are in the grid, copies of its matrices, and the softmax.
//
// Included once per instruction set, after vec.h and small_gemm.h.
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
      for (int64_t t = 0; t < n; ++t) apart_.data()[g * ns + t] = group_[t] == g ? 0.0f : APART;
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
  void exponentials(int64_t head, int64_t first, int64_t count, float* p, float* inverse) {
    gemm<false>(k, ds, 1, qt + first, ns, p, QUERIES, n, padded(count), d);
    const float* bias = grid_.bias ? grid_.bias + head * n * ns + first : nullptr;
    const float* apart = apart_.data();
    for (int64_t c = 0; c < count; c += LANES) {
      vf highest = set1(-__builtin_inff());
      for (int64_t j = 0; j < n; ++j) {
        vf x = load(p + j * QUERIES + c);
        if (bias) x += load(bias + j * ns + c);
        if (masked_) x += load(apart + group_[j] * ns + first + c);
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
  std::vector<float> norms_;           // (2, n) of queries and keys
  Aligned<float> apart_, floats_;      // (4, ns), what keys of a group add to each query; the matrices
};

}  // namespace SGMIM_ISA
}  // namespace sgmim
