// Float vectors of the current instruction set: loads, stores, reductions and exp.
//
// Included once per instruction set by each kernel file, so there is no include guard. Based on the compiler's vector
// types: one source for SSE2, AVX2, AVX-512 and NEON. bfloat16 is widened on load and rounded to nearest on store.
namespace sgmim {
namespace SGMIM_ISA {

#define SGMIM_INLINE static inline __attribute__((always_inline))
#define SGMIM_INLINE_LAMBDA __attribute__((always_inline))

constexpr int64_t LANES = SGMIM_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(SGMIM_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(SGMIM_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(SGMIM_VECTOR_BYTES)));
typedef int8_t vb __attribute__((vector_size(SGMIM_VECTOR_BYTES / 4)));
typedef uint16_t vh __attribute__((vector_size(SGMIM_VECTOR_BYTES / 2)));

SGMIM_INLINE vf set1(float x) { return x - vf{}; }

// Broadcasts the four bytes of x to every lane, bit for bit.
SGMIM_INLINE vf set_bits(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return (vf)(bits - vi{});
}

SGMIM_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Zero-extends to 32 bits. GCC 12 would split a conversion of whole vectors into halves.
SGMIM_INLINE vu widen(vh h) {
#if SGMIM_VECTOR_BYTES == 64
  return (vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#elif SGMIM_VECTOR_BYTES == 32
  return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}

SGMIM_INLINE vf load(const Bf16* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vf)(widen(h) << 16);
}

SGMIM_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

SGMIM_INLINE void store(Bf16* p, vf v) {
#if defined(SGMIM_HAS_BF16)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);  // flushes subnormals, below 1.2e-38, to 0
#else
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  vi is_nan = v != v;
  rounded = (rounded & ~(vu)is_nan) | (0x7fc0u & (vu)is_nan);
#if SGMIM_VECTOR_BYTES == 64
  const __m256i h = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)rounded);
#else
  const vh h = __builtin_convertvector(rounded, vh);
#endif
#endif
  __builtin_memcpy(p, &h, sizeof h);
}

// Loads and stores of the last `n` < LANES elements of a row: the other lanes are zero, and are not written.
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

// Both return b if either is NaN, as x86's instructions do. GCC 12 would compile the comparison to two instructions.
#if SGMIM_VECTOR_BYTES == 64
SGMIM_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
SGMIM_INLINE vf vmin(vf a, vf b) { return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
#elif SGMIM_VECTOR_BYTES == 32
SGMIM_INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
SGMIM_INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
SGMIM_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
SGMIM_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
#endif
SGMIM_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }

// 1 / a of positive normal numbers, with at least 11 correct bits.
#if SGMIM_VECTOR_BYTES == 64
SGMIM_INLINE vf rough_inverse(vf a) { return (vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)a); }
#elif SGMIM_VECTOR_BYTES == 32
SGMIM_INLINE vf rough_inverse(vf a) { return (vf)_mm256_rcp_ps((__m256)a); }
#else
SGMIM_INLINE vf rough_inverse(vf a) { return 1.0f / a; }
#endif

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

// Transposes a 4 x 4 block: to = from^T.
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
  return underflow ? vf{} : p * (vf)exponent;
}

// 2^x for x <= 127; below -126 the result is 0. The reduced argument, x minus its nearest integer, is exact: 1 ulp.
SGMIM_INLINE vf exp2(vf x) {
  const vi underflow = x < -126.0f;
  x = vmin(set1(127.0f), x);  // in this order NaN stays NaN
  x = vmax(set1(-126.0f), x);
  const vf shifted = x + 12582912.0f;  // 1.5 * 2^23: the low mantissa bits are round(x)
  const vf r = x - (shifted - 12582912.0f);
  vf p = set1(1.535341268e-4f) * r + 1.339887469e-3f;
  p = p * r + 9.618437171e-3f;
  p = p * r + 5.55033247e-2f;
  p = p * r + 2.402264792e-1f;
  p = p * r + 6.931472029e-1f;
  p = p * r + 1.0f;
  const vi exponent = (((vi)shifted - 0x4b400000) + 127) << 23;
  return underflow ? vf{} : p * (vf)exponent;
}

// 2^r for |r| <= 1/2 with a relative error of 8e-5, a 25th of a rounding to bfloat16.
SGMIM_INLINE vf coarse_exp2(vf r) {
  vf e = set1(0.05517156422f) * r + 0.2426111102f;
  e = e * r + 0.6932610273f;
  return e * r + 0.9999280572f;
}

#if SGMIM_VECTOR_BYTES == 64
// Transposes 16 x 16 numbers of 32 bits. Uses the masked intrinsics, since GCC 12 warns about an unused operand in the
// others.
SGMIM_INLINE void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_maskz_unpacklo_epi32(0xffff, r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_maskz_unpacklo_epi64(0xff, t[i], t[i + 2]);
    r[i + 1] = _mm512_maskz_unpackhi_epi64(0xff, t[i], t[i + 2]);
    r[i + 2] = _mm512_maskz_unpacklo_epi64(0xff, t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_maskz_unpackhi_epi64(0xff, t[i + 1], t[i + 3]);
  }
  // r[4 i + j] now holds columns j, 4 + j, 8 + j and 12 + j of the rows 4 i to 4 i + 3, in blocks of four.
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_maskz_shuffle_i32x4(0xffff, r[j], r[4 + j], 0x88),
                  odd = _mm512_maskz_shuffle_i32x4(0xffff, r[j], r[4 + j], 0xdd);
    const __m512i even2 = _mm512_maskz_shuffle_i32x4(0xffff, r[8 + j], r[12 + j], 0x88);
    const __m512i odd2 = _mm512_maskz_shuffle_i32x4(0xffff, r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_maskz_shuffle_i32x4(0xffff, even, even2, 0x88);
    t[4 + j] = _mm512_maskz_shuffle_i32x4(0xffff, odd, odd2, 0x88);
    t[8 + j] = _mm512_maskz_shuffle_i32x4(0xffff, even, even2, 0xdd);
    t[12 + j] = _mm512_maskz_shuffle_i32x4(0xffff, odd, odd2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#endif

}  // namespace SGMIM_ISA
}  // namespace sgmim
