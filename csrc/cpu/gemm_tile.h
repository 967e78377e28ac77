// Register tile of a gemm over packed operands. Included once per instruction set, after vec.h.
//
// Operands consist of units of four bytes: a float or, with AVX512-BF16, two bfloat16 that are adjacent along the
// summed dimension, which one instruction multiplies and accumulates. Without that instruction units are always floats.
// A panel of the right operand has PANEL columns: (depth, PANEL) units.
namespace sgmim {
namespace SGMIM_ISA {

constexpr int64_t TILE_ROWS = 6, TILE_VECTORS = LANES == 16 ? 4 : 2, PANEL = TILE_VECTORS * LANES;
constexpr int64_t DEPTH = 512;  // units of the summed dimension per step: a panel of this depth stays in L2

// Elements of the summed dimension in a unit.
template <class T>
constexpr int64_t UNIT = 4 / sizeof(T);

template <class T>
SGMIM_INLINE vf multiply_add(vf sum, float left, vf right) {
#if defined(SGMIM_HAS_BF16)
  if (sizeof(T) == 2) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)set_bits(left), (__m512bh)right);
#endif
  return sum + set1(left) * right;
}

// Cache lines to prefetch during a tile, `count` per 16 units: runs of `run` adjacent lines, `stride` bytes apart.
struct Ahead {
  const char* at = nullptr;
  int64_t count = 0, run = 1, stride = 0, left = 1;  // left: lines of the current run, from `at` on

  void prefetch() {
    for (int64_t i = 0; i < count; ++i) {
      __builtin_prefetch(at);
      at += 64;
      if (--left > 0) continue;
      at += stride - 64 * run;
      left = run;
    }
  }
};

// Prefetches part of a matrix, which is packed next, evenly over the tiles until then: a core reads it from memory at
// half the rate at which it packs it from L2.
class Upcoming {
 public:
  // at: its first element; bytes: of a row; stride: bytes between rows; steps: of 16 units in all the tiles until then.
  Upcoming(const void* at, int64_t rows, int64_t bytes, int64_t stride, int64_t steps)
      : at_(static_cast<const char*>(at)), run_(std::max<int64_t>((bytes + 63) / 64, 1)), stride_(stride),
        lines_(bytes > 0 ? rows * run_ : 0),
        per_step_(std::min((lines_ + steps - 1) / std::max<int64_t>(steps, 1), MOST)) {}

  // Returns the lines to prefetch during a tile of `depth` units.
  Ahead during(int64_t depth) {
    if (next_ >= lines_) return {};
    const int64_t row = next_ / run_, in = next_ % run_;
    next_ += per_step_ * (depth / 16);
    return {at_ + row * stride_ + in * 64, per_step_, run_, stride_, run_ - in};
  }

 private:
  static constexpr int64_t MOST = 8;  // lines per step, more of which would delay the gemm

  const char* at_;
  int64_t run_, stride_, lines_, per_step_, next_ = 0;
};

// Calls epilogue(sum) with the vectors of a . b, (ROWS, VECTORS), in registers. They are added to c (ROWS, VECTORS *
// LANES) before, if `add`. Unit k of row m of a is at a + m * a_row + k * a_unit, in bytes.
template <class T, int ROWS, int VECTORS, class Epilogue>
SGMIM_INLINE void gemm_tile_with(
    const char* a, int64_t a_row, int64_t a_unit, const float* b, int64_t depth, const float* c, int64_t c_row,
    bool add, Ahead ahead, const Epilogue& epilogue) {
  vf sum[ROWS][VECTORS] = {};
  if (add)
    for (int m = 0; m < ROWS; ++m)
      for (int n = 0; n < VECTORS; ++n) sum[m][n] = load(c + m * c_row + n * LANES);
  const char* row[ROWS];
  for (int m = 0; m < ROWS; ++m) row[m] = a + m * a_row;
  const auto add_unit = [&](int64_t k) SGMIM_INLINE_LAMBDA {
    vf right[VECTORS];
    for (int n = 0; n < VECTORS; ++n) right[n] = load(b + k * PANEL + n * LANES);
    for (int m = 0; m < ROWS; ++m) {
      float left;
      __builtin_memcpy(&left, row[m] + k * a_unit, 4);
      for (int n = 0; n < VECTORS; ++n) sum[m][n] = multiply_add<T>(sum[m][n], left, right[n]);
    }
  };
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
    // Prefetch the rows of the next tile: where rows are not packed, their lines of 16 units are far apart.
    for (int m = 0; m < ROWS; ++m) __builtin_prefetch(row[m] + TILE_ROWS * a_row + k * a_unit);
    ahead.prefetch();
    for (int u = 0; u < 16; ++u) add_unit(k + u);
  }
  for (; k < depth; ++k) add_unit(k);
  epilogue(sum);
}

// c (ROWS, VECTORS * LANES) (+)= a . b
template <class T, int ROWS, int VECTORS>
SGMIM_INLINE void gemm_tile_of(
    const char* a, int64_t a_row, int64_t a_unit, const float* b, int64_t depth, float* c, int64_t c_row, bool add,
    const Ahead& ahead) {
  const auto write = [&](const vf(&sum)[ROWS][VECTORS]) SGMIM_INLINE_LAMBDA {
    for (int m = 0; m < ROWS; ++m)
      for (int n = 0; n < VECTORS; ++n) store(c + m * c_row + n * LANES, sum[m][n]);
  };
  gemm_tile_with<T, ROWS, VECTORS>(a, a_row, a_unit, b, depth, c, c_row, add, ahead, write);
}

// The same for 1 to TILE_ROWS rows and 1 to PANEL columns. Columns of c from there to PANEL are undefined afterwards.
template <class T>
void gemm_tile(
    int64_t rows, int64_t columns, const char* a, int64_t a_row, int64_t a_unit, const float* b, int64_t depth,
    float* c, int64_t c_row, bool add, const Ahead& ahead) {
  if (rows == TILE_ROWS && columns <= PANEL - LANES) {
    if (columns <= LANES) return gemm_tile_of<T, TILE_ROWS, 1>(a, a_row, a_unit, b, depth, c, c_row, add, ahead);
    if (TILE_VECTORS == 4 && columns <= 2 * LANES)
      return gemm_tile_of<T, TILE_ROWS, 2>(a, a_row, a_unit, b, depth, c, c_row, add, ahead);
    if (TILE_VECTORS == 4) return gemm_tile_of<T, TILE_ROWS, 3>(a, a_row, a_unit, b, depth, c, c_row, add, ahead);
  }
  switch (rows) {
    case 6: return gemm_tile_of<T, 6, TILE_VECTORS>(a, a_row, a_unit, b, depth, c, c_row, add, ahead);
    case 5: return gemm_tile_of<T, 5, TILE_VECTORS>(a, a_row, a_unit, b, depth, c, c_row, add, ahead);
    case 4: return gemm_tile_of<T, 4, TILE_VECTORS>(a, a_row, a_unit, b, depth, c, c_row, add, ahead);
    case 3: return gemm_tile_of<T, 3, TILE_VECTORS>(a, a_row, a_unit, b, depth, c, c_row, add, ahead);
    case 2: return gemm_tile_of<T, 2, TILE_VECTORS>(a, a_row, a_unit, b, depth, c, c_row, add, ahead);
    default: return gemm_tile_of<T, 1, TILE_VECTORS>(a, a_row, a_unit, b, depth, c, c_row, add, ahead);
  }
}

}  // namespace SGMIM_ISA
}  // namespace sgmim
