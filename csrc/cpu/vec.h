// Float vectors of the current instruction set: loads, stores, reductions, exp and the normal distribution function.
//
// Included once per instruction set by each kernel file, so there is no include guard. Everything is a compiler vector
// type: one source for SSE2, AVX2, AVX-512 and NEON. bfloat16 is widened on load and rounded to nearest on store.
namespace sgmim {
namespace SGMIM_ISA {

#define SGMIM_INLINE static inline __attribute__((always_inline))

constexpr int64_t LANES = SGMIM_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(SGMIM_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(SGMIM_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(SGMIM_VECTOR_BYTES)));
typedef int8_t vb __attribute__((vector_size(SGMIM_VECTOR_BYTES / 4)));
typedef uint16_t vh __attribute__((vector_size(SGMIM_VECTOR_BYTES / 2)));

SGMIM_INLINE vf set1(float x) { return x - vf{}; }

SGMIM_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

SGMIM_INLINE vf load(const Bf16* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

SGMIM_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

SGMIM_INLINE void store(Bf16* p, vf v) {
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  vi is_nan = v != v;
  rounded = (rounded & ~(vu)is_nan) | (0x7fc0u & (vu)is_nan);
  vh h = __builtin_convertvector(rounded, vh);
  __builtin_memcpy(p, &h, sizeof h);
}

// The last `n` < LANES elements of a row: missing lanes are zero, and are not written.
template <class T>
SGMIM_INLINE vf load_tail(const T* p, int64_t n) {
  T buffer[LANES] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
SGMIM_INLINE void store_tail(T* p, vf v, int64_t n) {
  T buffer[LANES];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

SGMIM_INLINE vf select(vi condition, vf yes, vf no) { return (vf)(((vi)yes & condition) | ((vi)no & ~condition)); }
SGMIM_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }
SGMIM_INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }
SGMIM_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }

typedef float v4 __attribute__((vector_size(16)));

SGMIM_INLINE float hsum(vf v) {
  v4 parts[LANES / 4], s = {};
  __builtin_memcpy(parts, &v, sizeof v);
  for (int64_t i = 0; i < LANES / 4; ++i) s += parts[i];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

SGMIM_INLINE float hmax(vf v) {
  float s = v[0];
  for (int64_t i = 1; i < LANES; ++i) s = v[i] > s ? v[i] : s;
  return s;
}

#if defined(__clang__)
#define SGMIM_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SGMIM_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (v4i){i, j, k, l})
#endif
typedef int32_t v4i __attribute__((vector_size(16)));

// A 4 x 4 block: to = from^T.
SGMIM_INLINE void transpose4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  v4 a, b, c, d;
  __builtin_memcpy(&a, from, 16);
  __builtin_memcpy(&b, from + from_stride, 16);
  __builtin_memcpy(&c, from + 2 * from_stride, 16);
  __builtin_memcpy(&d, from + 3 * from_stride, 16);
  const v4 ab = SGMIM_SHUFFLE(a, b, 0, 4, 1, 5), cd = SGMIM_SHUFFLE(c, d, 0, 4, 1, 5);
  const v4 ab2 = SGMIM_SHUFFLE(a, b, 2, 6, 3, 7), cd2 = SGMIM_SHUFFLE(c, d, 2, 6, 3, 7);
  const v4 rows[4] = {
      SGMIM_SHUFFLE(ab, cd, 0, 1, 4, 5), SGMIM_SHUFFLE(ab, cd, 2, 3, 6, 7), SGMIM_SHUFFLE(ab2, cd2, 0, 1, 4, 5),
      SGMIM_SHUFFLE(ab2, cd2, 2, 3, 6, 7)};
  for (int r = 0; r < 4; ++r) __builtin_memcpy(to + r * to_stride, &rows[r], 16);
}

// e^x for x <= 88; below -87 the result is 0. Cody-Waite reduction, degree-6 polynomial: 1 ulp.
SGMIM_INLINE vf exp(vf x) {
  const vi underflow = x < -87.0f;
  x = vmin(set1(88.0f), x);  // in this order NaN stays NaN
  x = vmax(set1(-87.0f), x);
  const vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low mantissa bits are round(x / ln 2)
  const vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = set1(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi exponent = (((vi)shifted - 0x4b400000) + 127) << 23;
  return select(underflow, vf{}, p * (vf)exponent);
}

// Standard normal distribution function and density: cdf(x) and pdf(x) = e^(-x^2/2) / sqrt(2 pi).
//
// cdf(-y sqrt 2) = e^(-y^2) erfcx(y) / 2 with erfcx(y) = P((y-2)/(y+2)) / (1 + 2y); P is a weighted least-squares fit
// of degree 10 over 0 <= y <= 10 made for this file, relative error 1e-8 before rounding.
struct Normal {
  vf cdf, pdf;
};

SGMIM_INLINE Normal normal(vf x) {
  const vf y = vmin(vabs(x) * 0.707106781f, set1(10.0f));
  const vf t = (y - 2.0f) / (y + 2.0f);
  vf p = set1(2.203432326730939e-05f);
  p = p * t + -0.0003722093137802718f;
  p = p * t + -0.0012515895047620594f;
  p = p * t + 0.00128103843931092f;
  p = p * t + 0.008639188035393054f;
  p = p * t + -0.00804727930191735f;
  p = p * t + -0.054205527516576396f;
  p = p * t + 0.16405352558479377f;
  p = p * t + -0.16603132453457825f;
  p = p * t + -0.09276391083477935f;
  p = p * t + 1.2769783916504256f;
  const vf e = exp(x * x * -0.5f);
  const vf lower = 0.5f * e * (p / (1.0f + 2.0f * y));
  Normal result;
  result.cdf = select(x > 0.0f, 1.0f - lower, lower);
  result.pdf = 0.398942280f * e;
  return result;
}

}  // namespace SGMIM_ISA
}  // namespace sgmim
