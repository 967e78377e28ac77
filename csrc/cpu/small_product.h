// C = A . B for the small matrices of one attention head, all in cache. Register tile: 4 rows x 2 vectors.
//
// Included once per instruction set, after vec.h. A: (rows, depth); B: (depth, columns); C: (rows, columns). B and C
// have rows padded to whole vectors, so `columns` is a multiple of LANES.
namespace sgmim {
namespace SGMIM_ISA {

template <int ROWS, int VECTORS>
SGMIM_INLINE void product_tile(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t depth) {
  vf sum[ROWS][VECTORS] = {};
  for (int64_t t = 0; t < depth; ++t) {
    for (int n = 0; n < VECTORS; ++n) {
      const vf right = load(b + t * b_stride + n * LANES);
      for (int m = 0; m < ROWS; ++m) sum[m][n] += a[m * a_stride + t] * right;
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < VECTORS; ++n) store(c + m * c_stride + n * LANES, sum[m][n]);
}

template <int ROWS>
SGMIM_INLINE void product_rows(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t columns,
    int64_t depth) {
  int64_t n = 0;
  for (; n + 2 * LANES <= columns; n += 2 * LANES)
    product_tile<ROWS, 2>(a, a_stride, b + n, b_stride, c + n, c_stride, depth);
  if (n < columns) product_tile<ROWS, 1>(a, a_stride, b + n, b_stride, c + n, c_stride, depth);
}

SGMIM_INLINE void small_product(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t rows,
    int64_t columns, int64_t depth) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4)
    product_rows<4>(a + m * a_stride, a_stride, b, b_stride, c + m * c_stride, c_stride, columns, depth);
  for (; m < rows; ++m)
    product_rows<1>(a + m * a_stride, a_stride, b, b_stride, c + m * c_stride, c_stride, columns, depth);
}

}  // namespace SGMIM_ISA
}  // namespace sgmim
