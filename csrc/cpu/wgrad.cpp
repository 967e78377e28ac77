// wgrad of a linear layer: dw (o, i) = dy (n, o)^T . x (n, i), in float32, from float32 or bfloat16 operands.
//
// The sum runs over the rows. The library's gemms make transposed copies of both operands for it; here panels of rows
// are packed without a transpose. The result of bfloat16 operands is float32, like the parameter's gradient, and is
// never rounded.
//
// The rows are processed in chunks. Of a chunk dy is packed in tiles of TILE_ROWS columns and x in panels of PANEL
// columns. The narrower operand is packed first. Then each thread computes the part of dw of its own columns of the
// wider operand: it packs a block of them, which stays in L2, and multiplies it. Threads with many columns each pack
// the narrower operand for themselves: what another thread has packed would come from that core's cache. Otherwise they
// share it. Every element is summed in the same order, whatever the number of threads. Each chunk reads and writes dw
// once, so chunks are as few as L2 allows, and of about equal size.
#include "cpu/aligned.h"
#include "cpu/launch.h"

#ifndef SGMIM_WGRAD
#define SGMIM_WGRAD
namespace sgmim {
constexpr int64_t WGRAD_UNITS = 1024;  // most units of a chunk: a tile of dy stays in L1, a panel of x in L2
constexpr int64_t WGRAD_CHAIN = 256;  // units summed sequentially: the error grows with the root of their number
constexpr int64_t WGRAD_BLOCK = 96;  // columns of dy in a block: 16 tiles of 6
constexpr int64_t WGRAD_FEW = 32;  // units that are packed at a time, which stay in L1
constexpr int64_t WGRAD_ALONE = 192;  // columns per thread of the wider operand from which no packed operand is shared
constexpr int64_t WGRAD_GRAIN = 1 << 19;  // fewest multiplications of a thread: a few microseconds

// wgrad of one chunk of rows.
struct Wgrad {
  const void *dy, *x;
  int64_t rows, units, outs, ins, rows_after;  // rows_after: of the next chunk
  bool x_is_wider;
  float* packed;  // the narrower operand: dy (tiles, units, TILE_ROWS) or x (panels, units, PANEL)
  float* dw;      // (outs, ins)
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

// Packs WGRAD_FEW units, or as many as there are, from `unit` on of tiles of dy. column: their first one. to: the first
// tile.
template <class T>
SGMIM_INLINE void wgrad_pack_dy(const Wgrad* g, int64_t column, int64_t tiles, int64_t unit, float* to) {
  alignas(64) float line[WGRAD_FEW * WGRAD_BLOCK + LANES];
  const int64_t few = std::min(WGRAD_FEW, g->units - unit);
  const int64_t row = unit * UNIT<T>, rows = std::min(few * UNIT<T>, g->rows - row);
  const T* from = static_cast<const T*>(g->dy) + row * g->outs + column;
  pack_rows<T, WGRAD_BLOCK>(from, g->outs, rows, std::min(WGRAD_BLOCK, g->outs - column), line);
  to += unit * TILE_ROWS;
  for (int64_t t = 0; t < tiles; ++t, to += g->units * TILE_ROWS) {
    const float* tile = line + t * TILE_ROWS;
    int64_t k = 0;
    for (; k < few - 1; ++k)  // one copy of 8 floats, of which the next iteration overwrites the last two
      __builtin_memcpy(to + k * TILE_ROWS, tile + k * WGRAD_BLOCK, 8 * sizeof(float));
    __builtin_memcpy(to + k * TILE_ROWS, tile + k * WGRAD_BLOCK, TILE_ROWS * sizeof(float));
  }
}

// Packs as many units of the panel of x whose first column is `column`.
template <class T>
SGMIM_INLINE void wgrad_pack_x(const Wgrad* g, int64_t column, int64_t unit, float* to) {
  const int64_t row = unit * UNIT<T>, rows = std::min(WGRAD_FEW * UNIT<T>, g->rows - row);
  const T* from = static_cast<const T*>(g->x) + row * g->ins + column;
  pack_rows<T, PANEL>(from, g->ins, rows, std::min(PANEL, g->ins - column), to + unit * PANEL);
}

// Packs the narrower operand: block after block, the steps [begin, end), each of WGRAD_FEW units of one block.
template <class T>
void wgrad_pack(const Wgrad* g, int64_t begin, int64_t end) {
  const int64_t steps = (g->units + WGRAD_FEW - 1) / WGRAD_FEW;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t unit = at % steps * WGRAD_FEW, column = at / steps * (g->x_is_wider ? WGRAD_BLOCK : PANEL);
    float* to = g->packed + column * g->units;
    if (g->x_is_wider)
      wgrad_pack_dy<T>(g, column, (std::min(WGRAD_BLOCK, g->outs - column) + TILE_ROWS - 1) / TILE_ROWS, unit, to);
    else
      wgrad_pack_x<T>(g, column, unit, to);
  }
}

// Multiplies one chain of a whole tile and stores it, from registers: to = chain (+ total) (+ to).
template <class T, bool ADD_TOTAL, bool ADD_TO>
void whole_tile(
    const char* left, const float* right, int64_t depth, const float* total, float* to, int64_t to_row,
    const Ahead& ahead) {
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
  gemm_tile_with<T, TILE_ROWS, TILE_VECTORS>(left, 4, 4 * TILE_ROWS, right, depth, nullptr, 0, false, ahead, end);
}

// Memory for a tile, initialized.
struct WgradTile {
  alignas(64) float total[TILE_ROWS * PANEL] = {}, chain[TILE_ROWS * PANEL] = {};
};

// Computes the tile of dw whose first row is `row`, in columns [column, column + width), from a tile of dy and a panel
// of x.
template <class T>
SGMIM_INLINE void wgrad_tile(
    const Wgrad* g, const float* dy, const float* x, int64_t row, int64_t column, int64_t width, Upcoming& upcoming,
    WgradTile& memory) {
  const int64_t rows = std::min(TILE_ROWS, g->outs - row);
  float *dw = g->dw + row * g->ins + column, *total = memory.total, *chain = memory.chain;
  for (int64_t m = 0; m < rows; ++m)  // prefetch the tile of dw, whose rows are pages apart
    for (int64_t i = 0; i < width; i += LANES) __builtin_prefetch(dw + m * g->ins + i, 1);
  const bool whole = rows == TILE_ROWS && width == PANEL;
  for (int64_t k = 0; k < g->units; k += WGRAD_CHAIN) {
    const int64_t depth = std::min(WGRAD_CHAIN, g->units - k);
    const char* left = reinterpret_cast<const char*>(dy + k * TILE_ROWS);
    const float* right = x + k * PANEL;
    const Ahead ahead = upcoming.during(depth);
    if (whole) {
      const bool last = k + depth == g->units, add = last && g->add;
      const auto multiply = k > 0 ? (add ? whole_tile<T, true, true> : whole_tile<T, true, false>)
                                  : (add ? whole_tile<T, false, true> : whole_tile<T, false, false>);
      multiply(left, right, depth, total, last ? dw : total, last ? g->ins : PANEL, ahead);
      continue;
    }
    gemm_tile<T>(rows, width, left, 4, 4 * TILE_ROWS, right, depth, k ? chain : total, PANEL, false, ahead);
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

// Computes dw for the tiles [begin, end) of dy or, if x is wider, for the vectors [begin, end) of x's columns.
template <class T>
void wgrad_multiply(const Wgrad* g, int64_t begin, int64_t end) {
  const int64_t tiles = (g->outs + TILE_ROWS - 1) / TILE_ROWS, panels = (g->ins + PANEL - 1) / PANEL;
  const int64_t of_tile = g->units * TILE_ROWS, of_panel = g->units * PANEL, size = sizeof(T);
  WgradTile memory;
  if (g->x_is_wider) {
    auto x = Aligned<float>::uninitialized(of_panel);
    for (int64_t column = begin * LANES; column < end * LANES; column += PANEL) {
      const int64_t to = std::min(end * LANES, g->ins), width = std::min(PANEL, to - column);
      const bool last = column + PANEL >= to;  // the next panel is then the first of the next chunk
      const int64_t after = last ? begin * LANES : column + PANEL, rows = last ? g->rows_after : g->rows;
      for (int64_t unit = 0; unit < g->units; unit += WGRAD_FEW)
        wgrad_pack_x<T>(g, column, unit, x.data());
      const T* from = static_cast<const T*>(g->x) + (last ? g->rows * g->ins : 0) + after;
      Upcoming upcoming(from, rows, std::min(PANEL, to - after) * size, g->ins * size, tiles * (g->units / 16));
      for (int64_t t = 0; t < tiles; ++t)
        wgrad_tile<T>(g, g->packed + t * of_tile, x.data(), t * TILE_ROWS, column, width, upcoming, memory);
    }
    return;
  }
  const int64_t blocks = (end - begin + WGRAD_BLOCK / TILE_ROWS - 1) / (WGRAD_BLOCK / TILE_ROWS);
  auto dy = Aligned<float>::uninitialized(WGRAD_BLOCK * g->units);
  for (int64_t block = 0; block < blocks; ++block) {
    const auto edge = [&](int64_t i) { return begin + i * (end - begin) / blocks; };
    const bool end_of_chunk = block + 1 == blocks;  // the next block is then the first of the next chunk
    const int64_t first = edge(block), last = edge(block + 1), after = end_of_chunk ? 0 : block + 1;
    const int64_t rows = end_of_chunk ? g->rows_after : g->rows;
    for (int64_t unit = 0; unit < g->units; unit += WGRAD_FEW)
      wgrad_pack_dy<T>(g, first * TILE_ROWS, last - first, unit, dy.data());
    const T* from = static_cast<const T*>(g->dy) + (end_of_chunk ? g->rows * g->outs : 0) + edge(after) * TILE_ROWS;
    const int64_t bytes = (edge(after + 1) - edge(after)) * TILE_ROWS * size;
    Upcoming upcoming(from, rows, bytes, g->outs * size, (last - first) * panels * (g->units / 16));
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t t = first; t < last; ++t)
        wgrad_tile<T>(
            g, dy.data() + (t - first) * of_tile, g->packed + p * of_panel, t * TILE_ROWS, p * PANEL,
            std::min(PANEL, g->ins - p * PANEL), upcoming, memory);
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
  if (n * outs * ins == 0) {
    std::fill_n(data<float>(dw), dw.numel(), 0.0f);
    return;
  }
  dispatch_float(dy, "dy", [&](auto type) {
    using T = decltype(type);
    SGMIM_CHECK(sizeof(T) == 4 || isa() == Isa::avx512bf16, "wgrad in bfloat16 needs AVX512-BF16");
    WgradShape shape;
    SGMIM_SELECT((wgrad_shape<T>))(&shape);
    const auto pack = SGMIM_SELECT((wgrad_pack<T>)), multiply = SGMIM_SELECT((wgrad_multiply<T>));
    const auto parts = [](int64_t count, int64_t size) { return (count + size - 1) / size; };
    const int64_t all = parts(n, shape.unit), chunks = parts(all, WGRAD_UNITS);
    const int64_t most = parts(all, chunks), depth = most * shape.unit;
    const bool x_is_wider = ins > outs;
    const int64_t padded = x_is_wider ? parts(outs, shape.tile) * shape.tile : parts(ins, shape.panel) * shape.panel;
    const int64_t width = x_is_wider ? WGRAD_BLOCK : shape.panel, narrow = std::min(outs, ins);
    const auto chunk = [&](int64_t first, float* packed) {
      const int64_t rows = std::min(depth, n - first);
      return Wgrad{data<T>(dy) + first * outs, data<T>(x) + first * ins, rows, parts(rows, shape.unit), outs, ins,
                   std::min(depth, n - first - rows), x_is_wider, packed, data<float>(dw), first > 0};
    };
    const int64_t share = x_is_wider ? parts(ins, shape.lanes) : parts(outs, shape.tile);
    const auto grain = [&](int64_t rows) { return WGRAD_GRAIN * share / (rows * outs * ins); };
    if (std::max(outs, ins) >= WGRAD_ALONE * torch::stable::get_num_threads()) {
      return parallel(share, grain(n), [&](int64_t begin, int64_t end) {
        auto packed = Aligned<float>::uninitialized(padded * most);
        for (int64_t first = 0; first < n; first += depth) {
          const Wgrad g = chunk(first, packed.data());
          pack(&g, 0, parts(narrow, width) * parts(g.units, WGRAD_FEW));
          multiply(&g, begin, end);
        }
      });
    }
    auto packed = Aligned<float>::uninitialized(padded * most);
    for (int64_t first = 0; first < n; first += depth) {
      const Wgrad g = chunk(first, packed.data());
      parallel_blocks(narrow, width, parts(g.units, WGRAD_FEW), 64, [&](int64_t begin, int64_t end) {
        pack(&g, begin, end);
      });
      parallel(share, grain(g.rows), [&](int64_t begin, int64_t end) { multiply(&g, begin, end); });
    }
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) { m.def("wgrad(Tensor dy, Tensor x, Tensor(a!) dw) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) { m.impl("wgrad", TORCH_BOX(&wgrad)); }

#endif
}  // namespace sgmim
