// wgrad of a linear layer: dw (o, i) = dy (n, o)^T . x (n, i), in float32, from float32 or bfloat16 operands.
//
// The sum runs over the rows. The library's gemms make transposed copies of both operands for it; here panels of rows
// are packed without a transpose. The result of bfloat16 operands is float32, like the parameter's gradient, and is
// never rounded.
//
// The rows are processed in chunks. Of a chunk dy is packed in tiles of TILE_ROWS columns and x in panels of PANEL
// columns; then their product is added to dw, block by block. Every element is summed in the same order, whatever the
// number of threads. Each chunk reads and writes dw once, so chunks are as few as L2 allows, and of about equal size.
#include "cpu/aligned.h"
#include "cpu/launch.h"

#ifndef SGMIM_WGRAD
#define SGMIM_WGRAD
namespace sgmim {
// wgrad of one chunk of rows. The packed operands are (tiles, units, TILE_ROWS) and (panels, units, PANEL).
struct Wgrad {
  const void *dy, *x;
  int64_t rows, outs, ins;
  float *packed_dy, *packed_x;
  float* dw;  // (outs, ins)
  bool add;
  bool by_panel;  // whether consecutive blocks of dw share a panel of x, or a block of dy's columns
};
// Block sizes of a kernel, which the launcher needs to distribute the blocks over threads.
struct WgradShape {
  int64_t unit, block, panel;  // rows in a unit, columns of dy in a block, columns of x in a panel
};
constexpr int64_t WGRAD_UNITS = 1024;  // most units of a chunk: a tile of dy stays in L1, a panel of x in L2
constexpr int64_t WGRAD_CHAIN = 256;  // units summed sequentially: the error grows with the root of their number
constexpr int64_t WGRAD_BLOCK = 96;  // columns of dy in a block: 16 tiles of 6
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
  *shape = {UNIT<T>, WGRAD_BLOCK, PANEL};
}

// Packs the blocks [begin, end) of dy's columns, tile after tile, in steps of a few units, which stay in L1.
template <class T>
void wgrad_pack_dy(const Wgrad* g, int64_t begin, int64_t end) {
  constexpr int64_t FEW = 32;
  const int64_t units = (g->rows + UNIT<T> - 1) / UNIT<T>;
  alignas(64) float line[FEW * WGRAD_BLOCK + LANES];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * WGRAD_BLOCK, count = std::min(WGRAD_BLOCK, g->outs - first);
    for (int64_t from = 0; from < units; from += FEW) {
      const int64_t row = from * UNIT<T>, rows = std::min(FEW * UNIT<T>, g->rows - row);
      const int64_t few = std::min(FEW, units - from);
      pack_rows<T, WGRAD_BLOCK>(static_cast<const T*>(g->dy) + row * g->outs + first, g->outs, rows, count, line);
      for (int64_t t = 0; t < count; t += TILE_ROWS) {
        float* to = g->packed_dy + (first + t) * units + from * TILE_ROWS;
        int64_t k = 0;
        for (; k < few - 1; ++k)  // one copy of 8 floats, of which the next iteration overwrites the last two
          __builtin_memcpy(to + k * TILE_ROWS, line + k * WGRAD_BLOCK + t, 8 * sizeof(float));
        __builtin_memcpy(to + k * TILE_ROWS, line + k * WGRAD_BLOCK + t, TILE_ROWS * sizeof(float));
      }
    }
  }
}

template <class T>
void wgrad_pack_x(const Wgrad* g, int64_t begin, int64_t end) {
  const int64_t units = (g->rows + UNIT<T> - 1) / UNIT<T>;
  for (int64_t p = begin; p < end; ++p)
    pack_rows<T, PANEL>(
        static_cast<const T*>(g->x) + p * PANEL, g->ins, g->rows, std::min(PANEL, g->ins - p * PANEL),
        g->packed_x + p * PANEL * units);
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
  gemm_tile_with<T, TILE_ROWS, TILE_VECTORS>(left, 4, 4 * TILE_ROWS, right, depth, nullptr, 0, false, end);
}

// Computes the blocks [begin, end) of dw.
template <class T>
void wgrad_multiply(const Wgrad* g, int64_t begin, int64_t end) {
  const int64_t units = (g->rows + UNIT<T> - 1) / UNIT<T>;
  const int64_t blocks = (g->outs + WGRAD_BLOCK - 1) / WGRAD_BLOCK, panels = (g->ins + PANEL - 1) / PANEL;
  alignas(64) float total[TILE_ROWS * PANEL] = {}, chain[TILE_ROWS * PANEL] = {};
  for (int64_t at = begin; at < end; ++at) {
    const int64_t block = g->by_panel ? at % blocks : at / panels, panel = g->by_panel ? at / blocks : at % panels;
    const int64_t first = block * WGRAD_BLOCK, column = panel * PANEL;
    const int64_t last = std::min(first + WGRAD_BLOCK, g->outs), width = std::min(PANEL, g->ins - column);
    for (int64_t o = first; o < last; o += TILE_ROWS) {
      const int64_t rows = std::min(TILE_ROWS, last - o);
      for (int64_t m = 0; m < rows; ++m)  // prefetch the tile of dw, whose rows are pages apart
        for (int64_t i = 0; i < width; i += LANES) __builtin_prefetch(g->dw + (o + m) * g->ins + column + i, 1);
      float* dw = g->dw + o * g->ins + column;
      const bool whole = rows == TILE_ROWS && width == PANEL;
      for (int64_t k = 0; k < units; k += WGRAD_CHAIN) {
        const int64_t depth = std::min(WGRAD_CHAIN, units - k);
        const char* left = reinterpret_cast<const char*>(g->packed_dy + o * units + k * TILE_ROWS);
        const float* right = g->packed_x + column * units + k * PANEL;
        if (whole) {
          const bool last = k + depth == units, add = last && g->add;
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
    const int64_t blocks = (outs + shape.block - 1) / shape.block, panels = (ins + shape.panel - 1) / shape.panel;
    const int64_t all = (n + shape.unit - 1) / shape.unit, chunks = (all + WGRAD_UNITS - 1) / WGRAD_UNITS;
    const int64_t units = chunks ? (all + chunks - 1) / chunks : 0, depth = units * shape.unit;
    auto packed_dy = Aligned<float>::uninitialized(blocks * shape.block * units);
    auto packed_x = Aligned<float>::uninitialized(panels * shape.panel * units);
    if (n == 0) std::fill_n(data<float>(dw), dw.numel(), 0.0f);
    for (int64_t first = 0; first < n; first += depth) {
      const Wgrad g{
          data<T>(dy) + first * outs, data<T>(x) + first * ins, std::min(depth, n - first), outs, ins,
          packed_dy.data(), packed_x.data(), data<float>(dw), first > 0,
          ins > outs};
      // One parallel region packs both operands, with one barrier. Of the wider operand each thread packs about the
      // part that it will multiply.
      const int64_t shares = std::max(blocks, panels);
      parallel(shares, 1, [&](int64_t begin, int64_t end) {
        pack_dy(&g, begin * blocks / shares, end * blocks / shares);
        pack_x(&g, begin * panels / shares, end * panels / shares);
      });
      parallel(blocks * panels, 1, [&](int64_t begin, int64_t end) { multiply(&g, begin, end); });
    }
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) { m.def("wgrad(Tensor dy, Tensor x, Tensor(a!) dw) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) { m.impl("wgrad", TORCH_BOX(&wgrad)); }

#endif
}  // namespace sgmim
