// Operations on one row of a LayerNorm, of any width. Most of them work on a float copy of the row in cache.
//
// Included once per instruction set, after vec.h.
namespace sgmim {
namespace SGMIM_ISA {

template <class T>
SGMIM_INLINE vf load_part(const T* p, int64_t n) {
  return n == LANES ? load(p) : load_tail(p, n);
}

template <class T>
SGMIM_INLINE void store_part(T* p, vf v, int64_t n) {
  n == LANES ? store(p, v) : store_tail(p, v, n);
}

SGMIM_INLINE int64_t part(int64_t i, int64_t width) { return width - i < LANES ? width - i : LANES; }

template <class T>
SGMIM_INLINE void load_row(const T* source, float* t, int64_t width) {
  for (int64_t i = 0; i < width; i += LANES) store(t + i, load_part(source + i, part(i, width)));
}

template <class T>
SGMIM_INLINE void add_row(const T* source, float* t, int64_t width) {
  for (int64_t i = 0; i < width; i += LANES) store(t + i, load(t + i) + load_part(source + i, part(i, width)));
}

template <class T>
SGMIM_INLINE void store_row(const float* t, T* out, int64_t width) {
  for (int64_t i = 0; i < width; i += LANES) store_part(out + i, load(t + i), part(i, width));
}

// Adds the row t to the caller's column sums.
SGMIM_INLINE void accumulate_row(const float* t, float* sums, int64_t width) {
  for (int64_t i = 0; i < width; i += LANES) {
    const int64_t n = part(i, width);
    store_part(sums + i, load_part(sums + i, n) + load(t + i), n);
  }
}

// Calls step(i, n, sum) for every vector of a row: n <= LANES elements at i. `sum`, 0 to 3, selects one of four partial
// sums: independent accumulators hide the latency of the additions.
template <class Step>
SGMIM_INLINE void for_row(int64_t width, const Step& step) {
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES)
    for (int u = 0; u < 4; ++u) step(i + u * LANES, LANES, u);
  for (; i + LANES <= width; i += LANES) step(i, LANES, 0);
  if (i < width) step(i, width - i, 1);
}

SGMIM_INLINE float total(const vf* sums) { return hsum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// Sets the lanes from n on to 0.
SGMIM_INLINE vf zero_tail(vf v, int64_t n) {
  for (int64_t l = n; l < LANES; ++l) v[l] = 0;
  return v;
}

SGMIM_INLINE float compute_rstd(const float* t, int64_t width, float mean, float eps) {
  vf squares[4] = {};
  for_row(width, [&](int64_t i, int64_t n, int sum) SGMIM_INLINE_LAMBDA {
    const vf d = load(t + i) - mean, inside = n == LANES ? d : zero_tail(d, n);
    squares[sum] += inside * inside;
  });
  return 1.0f / __builtin_sqrtf(total(squares) / width + eps);
}

// Computes the mean and 1 / sqrt(variance + eps) in two passes over the row. Lanes of t past the width must be zero.
SGMIM_INLINE void moments(const float* t, int64_t width, float eps, float& mean, float& rstd) {
  vf sums[4] = {};
  for_row(width, [&](int64_t i, int64_t, int sum) SGMIM_INLINE_LAMBDA { sums[sum] += load(t + i); });
  mean = total(sums) / width;
  rstd = compute_rstd(t, width, mean, eps);
}

SGMIM_INLINE void normalize_row(float* t, int64_t width, float mean, float rstd) {
  for (int64_t i = 0; i < width; i += LANES) store(t + i, (load(t + i) - mean) * rstd);
}

template <class T>
SGMIM_INLINE void affine_row(const float* xhat, const float* weight, const float* bias, T* y, int64_t width) {
  for (int64_t i = 0; i < width; i += LANES) {
    const int64_t n = part(i, width);
    store_part(y + i, load(xhat + i) * load_part(weight + i, n) + load_part(bias + i, n), n);
  }
}

// Replaces dy in g by dx, and adds this row's terms to the gradients of weight and bias.
SGMIM_INLINE void norm_backward_row(
    float* g, const float* xhat, const float* weight, float rstd, float* dweight, float* dbias, int64_t width) {
  vf sum = {}, dot = {};
  for (int64_t i = 0; i < width; i += LANES) {
    const int64_t n = part(i, width);
    const vf dy = load(g + i), x = load(xhat + i);
    store_part(dbias + i, load_part(dbias + i, n) + dy, n);
    store_part(dweight + i, load_part(dweight + i, n) + dy * x, n);
    const vf d = dy * load_part(weight + i, n);  // lanes past the width are zero, since the weight is
    store(g + i, d);
    sum += d;
    dot += d * x;
  }
  const float mean_d = hsum(sum) / width, mean_dx = hsum(dot) / width;
  for (int64_t i = 0; i < width; i += LANES)
    store(g + i, (load(g + i) - mean_d - load(xhat + i) * mean_dx) * rstd);
}

}  // namespace SGMIM_ISA
}  // namespace sgmim
