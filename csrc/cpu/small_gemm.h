// C (+)= A . B for the small matrices of one attention head, all in cache. Register tile: 6 rows x 2 vectors.
//
// Included once per instruction set, after vec.h. A: (rows, depth), element (m, t) at a[m * a_stride + t * a_step], so
// that A^T is A with the two exchanged; B: (depth, columns); C: (rows, columns). B and C have rows padded to whole
// vectors, so `columns` is a multiple of LANES.
namespace sgmim {
namespace SGMIM_ISA {

template <bool ADD, int ROWS, int VECTORS>
SGMIM_INLINE void product_tile(
    const float* a, int64_t a_stride, int64_t a_step, const float* b, int64_t b_stride, float* c, int64_t c_stride,
    int64_t depth) {
  vf sum[ROWS][VECTORS] = {};
  for (int64_t t = 0; t < depth; ++t) {
    vf right[VECTORS];  // in this order 6 x 2 sums, 2 of these and one element of A are all that 16 registers hold
    for (int n = 0; n < VECTORS; ++n) right[n] = load(b + t * b_stride + n * LANES);
    for (int m = 0; m < ROWS; ++m) {
      const vf left = set1(a[m * a_stride + t * a_step]);
      for (int n = 0; n < VECTORS; ++n) sum[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < VECTORS; ++n) {
      float* out = c + m * c_stride + n * LANES;
      store(out, ADD ? load(out) + sum[m][n] : sum[m][n]);
    }
}

template <bool ADD, int ROWS>
void product_rows(
    const float* a, int64_t a_stride, int64_t a_step, const float* b, int64_t b_stride, float* c, int64_t c_stride,
    int64_t columns, int64_t depth) {
  int64_t n = 0;
  for (; n + 2 * LANES <= columns; n += 2 * LANES)
    product_tile<ADD, ROWS, 2>(a, a_stride, a_step, b + n, b_stride, c + n, c_stride, depth);
  if (n < columns) product_tile<ADD, ROWS, 1>(a, a_stride, a_step, b + n, b_stride, c + n, c_stride, depth);
}

template <int N>
struct Rows {
  static constexpr int value = N;
};

// tile(Rows<6>, first) for six of the rows at a time, and likewise for those that are left.
template <class F>
SGMIM_INLINE void by_six_rows(int64_t rows, const F& tile) {
  int64_t first = 0;
  for (; first + 6 <= rows; first += 6) tile(Rows<6>{}, first);
  switch (rows - first) {
    case 5: return tile(Rows<5>{}, first);
    case 4: return tile(Rows<4>{}, first);
    case 3: return tile(Rows<3>{}, first);
    case 2: return tile(Rows<2>{}, first);
    case 1: return tile(Rows<1>{}, first);
  }
}

template <bool ADD>
SGMIM_INLINE void gemm(
    const float* a, int64_t a_stride, int64_t a_step, const float* b, int64_t b_stride, float* c, int64_t c_stride,
    int64_t rows, int64_t columns, int64_t depth) {
  by_six_rows(rows, [&](auto count, int64_t m) SGMIM_INLINE_LAMBDA {
    product_rows<ADD, decltype(count)::value>(
        a + m * a_stride, a_stride, a_step, b, b_stride, c + m * c_stride, c_stride, columns, depth);
  });
}

// C = A . B, A row by row.
SGMIM_INLINE void small_gemm(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t rows,
    int64_t columns, int64_t depth) {
  gemm<false>(a, a_stride, 1, b, b_stride, c, c_stride, rows, columns, depth);
}

}  // namespace SGMIM_ISA
}  // namespace sgmim
