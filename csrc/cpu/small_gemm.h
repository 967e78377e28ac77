// C (+)= A . B for the small matrices of one attention head, which are all in cache. The register tile has 6 rows x 2
// vectors, with AVX-512 6 x 3. (Four vectors, as of 64 columns, are split into 2 + 2, which is faster than 3 + 1.)
//
// Included once per instruction set, after vec.h. A is (rows, depth), with element (m, t) at a[m * a_stride + t *
// a_step], so that exchanging the two strides transposes A; B is (depth, columns); C is (rows, columns). Rows of B and
// C are padded to whole vectors: `columns` is a multiple of LANES. Elements are floats or, with AVX512-BF16, pairs of
// bfloat16 that are adjacent along the summed dimension; one instruction multiplies a pair and adds it to a float.
//
// A tile's accumulators go to epilogue(m, n, sum), which receives `sum`, (rows, vectors), for the tile of C at (m, n).
namespace sgmim {
namespace SGMIM_ISA {

constexpr int64_t MOST_VECTORS = LANES == 16 ? 3 : 2;

SGMIM_INLINE vf broadcast(float x) { return set1(x); }
SGMIM_INLINE vf multiply_add(vf sum, vf left, vf right, float) { return sum + left * right; }

#if defined(SGMIM_HAS_BF16)
typedef uint32_t Pair;

SGMIM_INLINE vf broadcast(Pair x) { return (vf)(x - vu{}); }
SGMIM_INLINE vf multiply_add(vf sum, vf left, vf right, Pair) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}
#endif

template <int ROWS, int VECTORS, class U, class Epilogue>
SGMIM_INLINE void register_tile(
    const U* a, int64_t a_stride, int64_t a_step, const U* b, int64_t b_stride, int64_t depth, int64_t m, int64_t n,
    const Epilogue& epilogue) {
  vf sum[ROWS][VECTORS] = {};
  for (int64_t t = 0; t < depth; ++t) {
    vf right[VECTORS];  // in this order 6 x 2 accumulators, 2 vectors of B and 1 element of A just fit 16 registers
    for (int v = 0; v < VECTORS; ++v) __builtin_memcpy(&right[v], b + t * b_stride + v * LANES, sizeof(vf));
    for (int r = 0; r < ROWS; ++r) {
      const vf left = broadcast(a[r * a_stride + t * a_step]);
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = multiply_add(sum[r][v], left, right[v], U{});
    }
  }
  epilogue(m, n, sum);
}

template <int ROWS, class U, class Epilogue>
void gemm_rows(
    const U* a, int64_t a_stride, int64_t a_step, const U* b, int64_t b_stride, int64_t columns, int64_t depth,
    int64_t m, const Epilogue& epilogue) {
  for (int64_t n = 0; n < columns;) {
    const int64_t left = (columns - n) / LANES;
    const int64_t vectors = left <= MOST_VECTORS ? left : left == MOST_VECTORS + 1 ? (left + 1) / 2 : MOST_VECTORS;
    const U* from = b + n;
    if constexpr (MOST_VECTORS >= 3) {
      if (vectors == 3) register_tile<ROWS, 3>(a, a_stride, a_step, from, b_stride, depth, m, n, epilogue);
    }
    if (vectors == 2) register_tile<ROWS, 2>(a, a_stride, a_step, from, b_stride, depth, m, n, epilogue);
    if (vectors == 1) register_tile<ROWS, 1>(a, a_stride, a_step, from, b_stride, depth, m, n, epilogue);
    n += vectors * LANES;
  }
}

template <int N>
struct Number {
  static constexpr int value = N;
};

// Calls tile(Number<6>, first) for every six rows, and tile(Number<1 to 5>, first) for the remainder.
template <class F>
SGMIM_INLINE void by_six_rows(int64_t rows, const F& tile) {
  int64_t first = 0;
  for (; first + 6 <= rows; first += 6) tile(Number<6>{}, first);
  switch (rows - first) {
    case 5: return tile(Number<5>{}, first);
    case 4: return tile(Number<4>{}, first);
    case 3: return tile(Number<3>{}, first);
    case 2: return tile(Number<2>{}, first);
    case 1: return tile(Number<1>{}, first);
  }
}

template <class U, class Epilogue>
SGMIM_INLINE void gemm_with(
    const U* a, int64_t a_stride, int64_t a_step, const U* b, int64_t b_stride, int64_t rows, int64_t columns,
    int64_t depth, const Epilogue& epilogue) {
  by_six_rows(rows, [&](auto count, int64_t m) SGMIM_INLINE_LAMBDA {
    gemm_rows<decltype(count)::value>(a + m * a_stride, a_stride, a_step, b, b_stride, columns, depth, m, epilogue);
  });
}

// Epilogue that writes C or, if ADD, adds to it.
template <bool ADD>
struct StoreEpilogue {
  float* c;
  int64_t stride;

  template <int ROWS, int VECTORS>
  __attribute__((always_inline)) void operator()(int64_t m, int64_t n, vf (&sum)[ROWS][VECTORS]) const {
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) {
        float* to = c + (m + r) * stride + n + v * LANES;
        store(to, ADD ? load(to) + sum[r][v] : sum[r][v]);
      }
  }
};

template <bool ADD, class U>
SGMIM_INLINE void gemm(
    const U* a, int64_t a_stride, int64_t a_step, const U* b, int64_t b_stride, float* c, int64_t c_stride,
    int64_t rows, int64_t columns, int64_t depth) {
  gemm_with(a, a_stride, a_step, b, b_stride, rows, columns, depth, StoreEpilogue<ADD>{c, c_stride});
}

// C = A . B for row-major A.
SGMIM_INLINE void small_gemm(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t rows,
    int64_t columns, int64_t depth) {
  gemm<false>(a, a_stride, 1, b, b_stride, c, c_stride, rows, columns, depth);
}

}  // namespace SGMIM_ISA
}  // namespace sgmim
