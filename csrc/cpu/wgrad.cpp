// wgrad of a linear layer: dw (o, i) = dy (n, o)^T . x (n, i), in float32, from float32 or bfloat16 operands.
//
// The sum runs over the rows. The library's gemms make transposed copies of both operands for it; here panels of rows
// are packed without a transpose. The result of bfloat16 operands is float32, like the parameter's gradient, and is
// never rounded.
//
// The rows are processed in chunks. Of a chunk dy is packed in tiles of TILE_ROWS columns and x in panels of PANEL
// columns; then their product is added to dw, block by block. Every element is summed in the same order, whatever the
// number of threads. Each chunk reads and writes dw once, so chunks are as few as L2 allows, and of about equal size.
//
// Threads divide positions, integers in proportion to the work, not blocks, of which the last is often narrow.
#include "cpu/aligned.h"
#include "cpu/launch.h"

#ifndef SGMIM_WGRAD
#define SGMIM_WGRAD
namespace sgmim {
constexpr int64_t WGRAD_UNITS = 1024;  // most units of a chunk: a tile of dy stays in L1, a panel of x in L2
constexpr int64_t WGRAD_CHAIN = 256;  // units summed sequentially: the error grows with the root of their number
constexpr int64_t WGRAD_BLOCK = 96;  // columns of dy in a block: 16 tiles of 6
constexpr int64_t WGRAD_FEW = 32;  // units that are packed at a time, which stay in L1
constexpr int64_t WGRAD_GRAIN = 1 << 19;  // fewest multiplications of a thread: a few microseconds

// wgrad of one chunk of rows. The packed operands are (tiles, units, TILE_ROWS) and (panels, units, PANEL).
struct Wgrad {
  const void *dy, *x;
  int64_t rows, units, outs, ins;
  float *packed_dy, *packed_x;
  float* dw;  // (outs, ins)
  bool add;
};
// Sizes of a kernel's registers, which the launcher needs.
struct WgradShape {
  int64_t unit, tile, lanes, panel;  // rows in a unit, columns of dy in a tile, of x in a vector and in a panel
};
}  // namespace sgmim
#endif

#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/wgrad.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"
#include "cpu/gemm_tile.h"
#include "cpu/gemm_pack.h"

namespace sgmim {
namespace SGMIM_ISA {

template <class T>
void wgrad_shape(WgradShape* shape) {
  *shape = {UNIT<T>, TILE_ROWS, LANES, PANEL};
}

// Divides `columns` columns by `units` units into strips of `width` columns, and those into steps of WGRAD_FEW units.
// Calls body(column, count, unit, few) for the steps at positions [begin, end), with count columns and few units.
template <class Body>
SGMIM_INLINE void foreach_strip(
    int64_t begin, int64_t end, int64_t columns, int64_t width, int64_t units, const Body& body) {
  const int64_t steps = (units + WGRAD_FEW - 1) / WGRAD_FEW;
  for (int64_t column = begin / (width * steps) * width; column < columns; column += width) {
    const int64_t count = std::min(width, columns - column), start = column * steps;
    if (start >= end) return;
    const int64_t first = std::max<int64_t>(begin - start + count - 1, 0) / count;
    const int64_t last = std::min((end - start + count - 1) / count, steps);
    for (int64_t step = first; step < last; ++step)
      body(column, count, step * WGRAD_FEW, std::min(WGRAD_FEW, units - step * WGRAD_FEW));
  }
}

// Packs the positions [begin, end) of dy: its columns times steps of WGRAD_FEW units.
template <class T>
void wgrad_pack_dy(const Wgrad* g, int64_t begin, int64_t end) {
  alignas(64) float line[WGRAD_FEW * WGRAD_BLOCK + LANES];
  const auto pack = [&](int64_t column, int64_t count, int64_t unit, int64_t few) SGMIM_INLINE_LAMBDA {
    const int64_t row = unit * UNIT<T>, rows = std::min(few * UNIT<T>, g->rows - row);
    pack_rows<T, WGRAD_BLOCK>(static_cast<const T*>(g->dy) + row * g->outs + column, g->outs, rows, count, line);
    for (int64_t t = 0; t < count; t += TILE_ROWS) {
      float* to = g->packed_dy + (column + t) * g->units + unit * TILE_ROWS;
      int64_t k = 0;
      for (; k < few - 1; ++k)  // one copy of 8 floats, of which the next iteration overwrites the last two
        __builtin_memcpy(to + k * TILE_ROWS, line + k * WGRAD_BLOCK + t, 8 * sizeof(float));
      __builtin_memcpy(to + k * TILE_ROWS, line + k * WGRAD_BLOCK + t, TILE_ROWS * sizeof(float));
    }
  };
  foreach_strip(begin, end, g->outs, WGRAD_BLOCK, g->units, pack);
}

// Packs the positions [begin, end) of x: its columns times steps of WGRAD_FEW units.
template <class T>
void wgrad_pack_x(const Wgrad* g, int64_t begin, int64_t end) {
  const auto pack = [&](int64_t column, int64_t count, int64_t unit, int64_t few) SGMIM_INLINE_LAMBDA {
    const int64_t row = unit * UNIT<T>, rows = std::min(few * UNIT<T>, g->rows - row);
    pack_rows<T, PANEL>(
        static_cast<const T*>(g->x) + row * g->ins + column, g->ins, rows, count,
        g->packed_x + column * g->units + unit * PANEL);
  };
  foreach_strip(begin, end, g->ins, PANEL, g->units, pack);
}

// Multiplies one chain of a whole tile and stores it, from registers: to = chain (+ total) (+ to).
template <class T, bool ADD_TOTAL, bool ADD_TO>
void whole_tile(
    const char* left, const float* right, int64_t depth, const float* total, float* to, int64_t to_row) {
  const auto end = [&](const vf(&sum)[TILE_ROWS][TILE_VECTORS]) SGMIM_INLINE_LAMBDA {
#pragma GCC unroll 6
    for (int m = 0; m < TILE_ROWS; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < TILE_VECTORS; ++n) {
        float* at = to + m * to_row + n * LANES;
        vf v = sum[m][n];
        if (ADD_TOTAL) v += load(total + m * PANEL + n * LANES);
        if (ADD_TO) v += load(at);
        store(at, v);
      }
  };
  gemm_tile_with<T, TILE_ROWS, TILE_VECTORS>(left, 4, 4 * TILE_ROWS, right, depth, nullptr, 0, false, {}, end);
}

// Computes and stores the tile of dw whose first row is `row`, in columns [column, column + width). total and chain:
// initialized memory for a tile each.
template <class T>
SGMIM_INLINE void wgrad_tile(
    const Wgrad* g, int64_t row, int64_t column, int64_t width, float* total, float* chain) {
  const int64_t rows = std::min(TILE_ROWS, g->outs - row);
  float* dw = g->dw + row * g->ins + column;
  for (int64_t m = 0; m < rows; ++m)  // prefetch the tile of dw, whose rows are pages apart
    for (int64_t i = 0; i < width; i += LANES) __builtin_prefetch(dw + m * g->ins + i, 1);
  const bool whole = rows == TILE_ROWS && width == PANEL;
  for (int64_t k = 0; k < g->units; k += WGRAD_CHAIN) {
    const int64_t depth = std::min(WGRAD_CHAIN, g->units - k);
    const char* left = reinterpret_cast<const char*>(g->packed_dy + row * g->units + k * TILE_ROWS);
    const float* right = g->packed_x + column * g->units + k * PANEL;
    if (whole) {
      const bool last = k + depth == g->units, add = last && g->add;
      const auto multiply = k > 0 ? (add ? whole_tile<T, true, true> : whole_tile<T, true, false>)
                                  : (add ? whole_tile<T, false, true> : whole_tile<T, false, false>);
      multiply(left, right, depth, total, last ? dw : total, last ? g->ins : PANEL);
      continue;
    }
    gemm_tile<T>(rows, width, left, 4, 4 * TILE_ROWS, right, depth, k ? chain : total, PANEL, false);
    for (int64_t i = 0; k > 0 && i < rows * PANEL; i += LANES) store(total + i, load(total + i) + load(chain + i));
  }
  for (int64_t m = 0; !whole && m < rows; ++m)
    for (int64_t i = 0; i < width; i += LANES) {
      const int64_t n = part(i, width);
      float* c = dw + m * g->ins + i;
      const vf sum = load(total + m * PANEL + i);
      store_part(c, g->add ? load_part(c, n) + sum : sum, n);
    }
}

// Computes the tiles of dw at positions [begin, end): a tile has as many as it is vectors wide. They are ordered by
// block of dy's columns, panel and tile. If x is wider than dy, all of dy is one block, and threads share few panels.
template <class T>
void wgrad_multiply(const Wgrad* g, int64_t begin, int64_t end) {
  const int64_t tiles = (g->outs + TILE_ROWS - 1) / TILE_ROWS, vectors = (g->ins + LANES - 1) / LANES;
  const int64_t height = g->ins > g->outs ? tiles : WGRAD_BLOCK / TILE_ROWS;
  alignas(64) float total[TILE_ROWS * PANEL] = {}, chain[TILE_ROWS * PANEL] = {};
  for (int64_t at = begin; at < end;) {
    const int64_t block = at / (height * vectors) * height, count = std::min(height, tiles - block);
    const int64_t panel = (at - block * vectors) / (TILE_VECTORS * count);
    const int64_t wide = std::min(TILE_VECTORS, vectors - panel * TILE_VECTORS);
    const int64_t start = block * vectors + panel * TILE_VECTORS * count;
    const int64_t first = (at - start + wide - 1) / wide, last = std::min((end - start + wide - 1) / wide, count);
    for (int64_t t = first; t < last; ++t)
      wgrad_tile<T>(
          g, (block + t) * TILE_ROWS, panel * PANEL, std::min(PANEL, g->ins - panel * PANEL), total, chain);
    at = start + count * wide;
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

static void wgrad(const Tensor& dy, const Tensor& x, const Tensor& dw) {
  check_matrix(dy, "dy");
  check_matrix(x, "x");
  check_matrix(dw, "dw");
  const int64_t n = dy.size(0), outs = dy.size(1), ins = x.size(1);
  check_packed(x, "x", dy.scalar_type(), n * ins);
  check_packed(dw, "dw", ScalarType::Float, outs * ins);
  dispatch_float(dy, "dy", [&](auto type) {
    using T = decltype(type);
    SGMIM_CHECK(sizeof(T) == 4 || isa() == Isa::avx512bf16, "wgrad in bfloat16 needs AVX512-BF16");
    WgradShape shape;
    SGMIM_SELECT((wgrad_shape<T>))(&shape);
    const auto pack_dy = SGMIM_SELECT((wgrad_pack_dy<T>)), pack_x = SGMIM_SELECT((wgrad_pack_x<T>));
    const auto multiply = SGMIM_SELECT((wgrad_multiply<T>));
    const int64_t all = (n + shape.unit - 1) / shape.unit, chunks = (all + WGRAD_UNITS - 1) / WGRAD_UNITS;
    const int64_t most = chunks ? (all + chunks - 1) / chunks : 0, depth = most * shape.unit;
    const auto padded = [](int64_t columns, int64_t width) { return (columns + width - 1) / width * width; };
    auto packed_dy = Aligned<float>::uninitialized(padded(outs, WGRAD_BLOCK) * most);
    auto packed_x = Aligned<float>::uninitialized(padded(ins, shape.panel) * most);
    if (n == 0) std::fill_n(data<float>(dw), dw.numel(), 0.0f);
    for (int64_t first = 0; first < n; first += depth) {
      const int64_t rows = std::min(depth, n - first), units = (rows + shape.unit - 1) / shape.unit;
      const Wgrad g{
          data<T>(dy) + first * outs, data<T>(x) + first * ins, rows, units, outs, ins,
          packed_dy.data(), packed_x.data(), data<float>(dw), first > 0};
      // One parallel region packs both operands, with one barrier. Of the wider operand each thread packs about the
      // part that it will multiply.
      constexpr int64_t SHARES = 1 << 10;
      const int64_t steps = (units + WGRAD_FEW - 1) / WGRAD_FEW;
      parallel(SHARES, 1, [&](int64_t begin, int64_t end) {
        pack_dy(&g, begin * outs * steps / SHARES, end * outs * steps / SHARES);
        pack_x(&g, begin * ins * steps / SHARES, end * ins * steps / SHARES);
      });
      const int64_t positions = padded(outs, shape.tile) / shape.tile * (padded(ins, shape.lanes) / shape.lanes);
      const int64_t grain = WGRAD_GRAIN / (shape.tile * shape.lanes * rows);
      parallel(positions, grain, [&](int64_t begin, int64_t end) { multiply(&g, begin, end); });
    }
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) { m.def("wgrad(Tensor dy, Tensor x, Tensor(a!) dw) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) { m.impl("wgrad", TORCH_BOX(&wgrad)); }

#endif
}  // namespace sgmim
