// Packing of a gemm's operands into panels of units. Included once per instruction set, after gemm_tile.h (see there).
namespace sgmim {
namespace SGMIM_ISA {

// LANES elements as bfloat16 (floats are rounded), one per 32-bit lane, in its lower half.
SGMIM_INLINE vu half_bits(const Bf16* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h);
}

SGMIM_INLINE vu half_bits(const float* p) {
  Bf16 rounded[LANES];
  store(rounded, load(p));
  return half_bits(rounded);
}

// Units of T for LANES columns: elements of one row (float), or pairs from two rows, `next` elements apart (bfloat16).
template <class T, class S>
SGMIM_INLINE vf unit_of_rows(const S* row, int64_t next) {
  if (sizeof(T) == 4) return load(row);
  return (vf)(half_bits(row) | half_bits(row + next) << 16);
}

// Packs an operand whose rows run along the summed dimension: `rows` rows of n <= WIDTH columns, `row_stride` elements
// apart, become (units, WIDTH), with zeros past n and past the rows.
template <class T, int64_t WIDTH, class S>
SGMIM_INLINE void pack_rows(const S* from, int64_t row_stride, int64_t rows, int64_t n, float* to) {
  S buffer[2][WIDTH + LANES] = {};
  for (int64_t r = 0; r < rows; r += UNIT<T>, to += WIDTH) {
    const S* row = from + r * row_stride;
    int64_t next = row_stride;
    for (int64_t u = 0; u < UNIT<T>; ++u)  // rows may be pages apart
      for (int64_t i = 0; i < WIDTH; i += 64 / sizeof(S)) __builtin_prefetch(row + (32 + u) * row_stride + i);
    if (n < WIDTH || r + UNIT<T> > rows) {  // go through a buffer that has zeros past the matrix
      for (int64_t u = 0; u < UNIT<T>; ++u) {
        if (r + u < rows)
          __builtin_memcpy(buffer[u], row + u * row_stride, n * sizeof(S));
        else
          __builtin_memset(buffer[u], 0, n * sizeof(S));
      }
      row = buffer[0];
      next = WIDTH + LANES;
    }
    for (int64_t i = 0; i < WIDTH; i += LANES) store(to + i, unit_of_rows<T>(row + i, next));
  }
}

#if SGMIM_VECTOR_BYTES == 64
// 16 units of consecutive elements.
template <class T, class S>
SGMIM_INLINE __m512i units_of_row(const S* p) {
#if defined(SGMIM_HAS_BF16)
  if constexpr (sizeof(T) == 2 && sizeof(S) == 4)
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + 16), _mm512_loadu_ps(p));
#endif
  return _mm512_loadu_si512(p);
}

// Packs an operand whose rows are the columns of the panel: n <= PANEL rows of `depth` elements, whole units, become
// (units, PANEL), with zeros past n.
template <class T, class S>
SGMIM_INLINE void pack_columns(const S* from, int64_t row_stride, int64_t depth, int64_t n, float* to) {
  constexpr int64_t NUMBERS = 16 * UNIT<T>;
  for (int64_t first = 0; first < PANEL; first += 16)
    for (int64_t k = 0; k < depth; k += NUMBERS) {
      __m512i r[16];
      const int64_t count = std::min(depth - k, NUMBERS);
      for (int64_t i = 0; i < 16; ++i) {
        const S* row = from + (first + i) * row_stride + k;
        S buffer[NUMBERS] = {};
        for (int64_t l = 0; l < NUMBERS; l += 64 / sizeof(S)) __builtin_prefetch(row + 4 * NUMBERS + l);
        if (first + i < n && count < NUMBERS) __builtin_memcpy(buffer, row, count * sizeof(S));
        r[i] = units_of_row<T>(first + i < n && count == NUMBERS ? row : buffer);
      }
      transpose16(r);
      for (int64_t i = 0; i < count / UNIT<T>; ++i)
        _mm512_storeu_si512(to + (k / UNIT<T> + i) * PANEL + first, r[i]);
    }
}
#endif

}  // namespace SGMIM_ISA
}  // namespace sgmim
