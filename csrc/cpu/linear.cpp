// fprop and dgrad of a linear layer, y (n, outs) = x . weight, without a transposed copy of the weight. In float32 with
// AVX-512, in bfloat16 with AVX512-BF16.
//
// The weight of a bfloat16 gemm may be float32: it is rounded while a panel is packed, so that no bfloat16 copy is
// written and read again. Accumulators go through an epilogue in float32: bias, layer scale and residual from registers
// where a tile is whole; GELU, or its derivative with the gradient of the bias before it, from L1.
//
// A unit of work is a block of y, one chunk of rows by the PANEL columns of one panel of the weight, whatever the
// number of threads. The units of a panel are consecutive, so that each thread packs about its share of the panels.
// With many rows each thread instead computes rows of its own and packs the whole weight, which is small beside them:
// rows that two cores read cost more than packing, above all on cores that share no L3.
#include "cpu/aligned.h"
#include "cpu/launch.h"

#ifndef SGMIM_LINEAR
#define SGMIM_LINEAR
namespace sgmim {
constexpr int64_t CHUNK = 240;       // most rows of y in a unit of work: 40 tiles
constexpr int64_t MANY_ROWS = 4;     // each thread has rows of its own from n = MANY_ROWS * outs on,
constexpr int64_t MANY_CHUNKS = 16;  // provided there are this many chunks per thread, which balances the load
constexpr int64_t PACKED = 1 << 17;  // 4-byte units of weights that are packed at a time: 512 KiB, which fit L2

enum class Epilogue { none, gelu, gelu_backward };

// Epilogue and its operands. It is computed in float32, before the result is rounded.
struct EpilogueArgs {
  Epilogue kind = Epilogue::none;
  const float* bias = nullptr;     // (outs,), or null
  const float* scale = nullptr;    // (outs,), multiplies the result before the residual is added, or null
  const void* residual = nullptr;  // (n, outs), dtype of y, or null
  void* y = nullptr;               // (n, outs): the result; gelu: the pre-activation; gelu_backward: its gradient
  const void* pre_activation = nullptr;  // (n, outs), dtype of x; read by gelu_backward
  void* activated = nullptr;       // (n, outs), dtype of x: GELU of the pre-activation; written by both GELU epilogues
  float* partial = nullptr;        // (chunks, outs): column sums of y per chunk; written by gelu_backward
};

// Division of the rows of y into chunks of about equal size.
struct Chunks {
  static constexpr int64_t TILE = 6;  // TILE_ROWS

  int64_t rows, count;

  static Chunks of(int64_t n) {
    const int64_t fewest = std::max<int64_t>((n + CHUNK - 1) / CHUNK, 1), each = (n + fewest - 1) / fewest;
    const int64_t rows = std::max<int64_t>((each + TILE - 1) / TILE, 1) * TILE;
    return {rows, (n + rows - 1) / rows};
  }
};

// A bias that is not given.
struct Zeros {
  alignas(64) float values[64];
};
constexpr Zeros ZEROS{};

struct Linear {
  const void* x;  // (n, ins)
  const void* weight;
  int64_t n, ins, outs;
  Chunks chunks;
  EpilogueArgs epilogue;
};
}  // namespace sgmim
#endif

#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/linear.cpp"
#include "cpu/foreach_isa.h"

#if SGMIM_VECTOR_BYTES == 64
#include "cpu/vec.h"
#include "cpu/norm_row.h"
#include "cpu/vectors.h"
#include "cpu/gelu_at.h"
#include "cpu/gemm_tile.h"
#include "cpu/gemm_pack.h"

namespace sgmim {
namespace SGMIM_ISA {

static_assert(Chunks::TILE == TILE_ROWS && PANEL <= 64);

// Prefetches the cache lines that the epilogue of these rows and columns will read and write, so that they arrive
// during the gemm. Each row has a few lines, pages apart from those of the next.
template <class X, class Y>
SGMIM_INLINE void prefetch(
    const EpilogueArgs& e, int64_t outs, int64_t first, int64_t rows, int64_t column, int64_t width) {
  const auto lines = [&](const void* matrix, int64_t at, int64_t size) SGMIM_INLINE_LAMBDA {
    if (!matrix) return;
    const char* from = static_cast<const char*>(matrix) + at * size;
    for (int64_t i = 0; i < width * size; i += 64) __builtin_prefetch(from + i);
  };
  for (int64_t r = first; r < first + rows; ++r) {
    const int64_t at = r * outs + column;
    lines(e.y, at, sizeof(Y));
    lines(e.residual, at, sizeof(Y));
    lines(e.pre_activation, at, sizeof(X));
    lines(e.activated, at, sizeof(X));
  }
}

// Applies the epilogue to N vectors of each row, from `column` on, of which each has n elements.
template <int N, class X, class Y>
SGMIM_INLINE void epilogue_vectors(
    const EpilogueArgs& e, int64_t outs, int64_t chunk, int64_t first, int64_t rows, int64_t column, int64_t n,
    const float* sums) {
  using V = Vectors<N>;
  const auto read = [&](const auto* from) SGMIM_INLINE_LAMBDA { return load_vectors<V>(from, n); };
  const auto write = [&](auto* to, const V& from) SGMIM_INLINE_LAMBDA { store_vectors(to, from, n); };
  V total = {};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (first + r) * outs + column;
    V sum = read(sums + r * PANEL);
    Y* y = static_cast<Y*>(e.y) + at;
    X* activated = static_cast<X*>(e.activated) + at;
    if (e.kind == Epilogue::gelu_backward) {
      const Gelu<N> here = gelu_at<X>(read(static_cast<const X*>(e.pre_activation) + at));
      sum = sum * here.derivative;
      total = total + sum;
      write(activated, here.value);
      write(y, sum);
      continue;
    }
    if (e.bias) sum = sum + read(e.bias + column);
    if (e.scale) sum = sum * read(e.scale + column);
    if (e.residual) sum = sum + read(static_cast<const Y*>(e.residual) + at);
    write(y, sum);
    if (e.kind == Epilogue::gelu) write(activated, gelu_at<X>(read(y)).value);  // of the rounded y
  }
  if (e.kind == Epilogue::gelu_backward) {
    float* partial = e.partial + chunk * outs + column;
    write(partial, read(partial) + total);
  }
}

// Applies the epilogue to rows [first, first + rows), all of one chunk, and columns [column, column + width), whose
// accumulators are `sums`, (rows, PANEL).
template <class X, class Y>
SGMIM_INLINE void epilogue(
    const EpilogueArgs& e, int64_t outs, int64_t chunk, int64_t first, int64_t rows, int64_t column, int64_t width,
    const float* sums) {
  if (width == PANEL) return epilogue_vectors<TILE_VECTORS, X, Y>(e, outs, chunk, first, rows, column, LANES, sums);
  for (int64_t i = 0; i < width; i += LANES)
    epilogue_vectors<1, X, Y>(e, outs, chunk, first, rows, column + i, part(i, width), sums + i);
}

// Computes a whole tile, plus `tile` if `add`, and applies the epilogue while it is in registers. at: its offset in y.
template <class X, class Y, bool SCALE, bool RESIDUAL>
SGMIM_INLINE void whole_tile_of(
    const EpilogueArgs& e, const char* left, int64_t left_row, const float* right, int64_t depth, const float* tile,
    bool add, int64_t column, int64_t at, int64_t outs, const Ahead& ahead) {
  const float *bias = e.bias ? e.bias + column : ZEROS.values, *scale = SCALE ? e.scale + column : nullptr;
  const Y* residual = RESIDUAL ? static_cast<const Y*>(e.residual) + at : nullptr;
  Y* y = static_cast<Y*>(e.y) + at;
  const auto end = [&](const vf(&sum)[TILE_ROWS][TILE_VECTORS]) SGMIM_INLINE_LAMBDA {
#pragma GCC unroll 6
    for (int m = 0; m < TILE_ROWS; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < TILE_VECTORS; ++n) {
        vf total = sum[m][n] + load(bias + n * LANES);
        if constexpr (SCALE) total *= load(scale + n * LANES);
        if constexpr (RESIDUAL) total += load(residual + m * outs + n * LANES);
        store(y + m * outs + n * LANES, total);
      }
  };
  gemm_tile_with<X, TILE_ROWS, TILE_VECTORS>(left, left_row, 4, right, depth, tile, PANEL, add, ahead, end);
}

template <class X, class Y, class... Args>
SGMIM_INLINE void whole_tile(const EpilogueArgs& e, const Args&... args) {
  if (e.scale)
    e.residual ? whole_tile_of<X, Y, true, true>(e, args...) : whole_tile_of<X, Y, true, false>(e, args...);
  else
    e.residual ? whole_tile_of<X, Y, false, true>(e, args...) : whole_tile_of<X, Y, false, false>(e, args...);
}

// Prefetches the weight's panels [first, last) over `steps` steps. weight: as in `linear_units`.
template <class W, bool TRANSPOSED>
SGMIM_INLINE Upcoming upcoming_panels(const Linear* g, int64_t first, int64_t last, int64_t steps) {
  const int64_t column = first * PANEL, columns = std::max<int64_t>(std::min(last * PANEL, g->outs) - column, 0);
  const int64_t size = sizeof(W);
  const W* weight = static_cast<const W*>(g->weight);
  if (TRANSPOSED) return {weight + column, g->ins, columns * size, g->outs * size, steps};
  return {weight + column * g->ins, 1, columns * g->ins * size, 0, steps};
}

// Computes the units of work [begin, end). Packs as many whole panels at a time as fit L2. weight: (outs, ins) or, if
// TRANSPOSED, (ins, outs).
template <class X, class W, class Y, bool TRANSPOSED>
void linear_units(const Linear* g, int64_t begin, int64_t end) {
  const int64_t units = g->ins / UNIT<X>, chunks = g->chunks.count;
  const int64_t fit = units > DEPTH ? 1 : PACKED / std::max<int64_t>(units * PANEL, 1);  // `sums` has room for one
  const int64_t most = std::clamp<int64_t>(fit, 1, (end - begin + chunks - 1) / chunks);
  auto packed = Aligned<float>::uninitialized(most * units * PANEL);
  auto sums = Aligned<float>::uninitialized(g->chunks.rows * PANEL);
  const X* x = static_cast<const X*>(g->x);
  const W* weight = static_cast<const W*>(g->weight);
  const EpilogueArgs& e = g->epilogue;
  for (int64_t at = begin; at < end;) {
    const int64_t panel = at / chunks, begin_chunk = at % chunks, whole = begin_chunk > 0 ? 0 : (end - at) / chunks;
    const int64_t groups = (whole + most - 1) / most;  // of about equal size
    const int64_t to = panel + (whole > 0 ? (whole + groups - 1) / groups : 1);
    const int64_t end_chunk = whole > 0 ? chunks : std::min(chunks, begin_chunk + end - at);
    for (int64_t p = panel; p < to; ++p) {
      const int64_t column = p * PANEL, width = std::min(PANEL, g->outs - column);
      float* into = packed.data() + (p - panel) * units * PANEL;
      if (TRANSPOSED)
        pack_rows<X, PANEL>(weight + column, g->outs, g->ins, width, into);
      else
        pack_columns<X>(weight + column * g->ins, g->ins, g->ins, width, into);
    }
    const int64_t n = std::min(end_chunk * g->chunks.rows, g->n) - begin_chunk * g->chunks.rows;
    const int64_t tiles = (n + TILE_ROWS - 1) / TILE_ROWS * (to - panel);
    const int64_t after = at + (to - panel) * (end_chunk - begin_chunk), next = after < end ? 2 * to - panel : to;
    auto upcoming = upcoming_panels<W, TRANSPOSED>(g, to, next, tiles * (units / 16));
    for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
      const int64_t first = chunk * g->chunks.rows, last = std::min(first + g->chunks.rows, g->n);
      for (int64_t k = 0; k < units; k += DEPTH) {
        const int64_t depth = std::min(DEPTH, units - k);
        for (int64_t r = first; r < last; r += TILE_ROWS)
          for (int64_t p = panel; p < to; ++p) {
            const int64_t column = p * PANEL, width = std::min(PANEL, g->outs - column);
            const int64_t rows = std::min(TILE_ROWS, last - r);
            float* tile = sums.data() + (units > DEPTH ? (r - first) * PANEL : 0);
            const char* from = reinterpret_cast<const char*>(x + r * g->ins) + 4 * k;
            const float* right = packed.data() + ((p - panel) * units + k) * PANEL;
            const int64_t row = sizeof(X) * g->ins;
            const Ahead ahead = upcoming.during(depth);
            if (k + depth == units) prefetch<X, Y>(e, g->outs, r, rows, column, width);
            if (k + depth == units && rows == TILE_ROWS && width == PANEL && e.kind == Epilogue::none) {
              whole_tile<X, Y>(e, from, row, right, depth, tile, k > 0, column, r * g->outs + column, g->outs, ahead);
              continue;
            }
            gemm_tile<X>(rows, width, from, row, 4, right, depth, tile, PANEL, k > 0, ahead);
            if (k + depth == units) epilogue<X, Y>(e, g->outs, chunk, r, rows, column, width, tile);
          }
      }
    }
    at = after;
  }
}

}  // namespace SGMIM_ISA
}  // namespace sgmim
#endif

#ifdef SGMIM_ONCE
namespace sgmim {

#if defined(SGMIM_MANY_ISAS)
// Returns the gemm restricted to the chunks [begin, end).
template <class X, class Y>
static Linear restrict_to_chunks(const Linear& g, int64_t begin, int64_t end) {
  const int64_t first = begin * g.chunks.rows;
  const auto from = [&](auto* matrix, int64_t size) {
    return matrix ? (decltype(matrix))((uintptr_t)matrix + first * g.outs * size) : matrix;
  };
  Linear own = g;
  own.x = static_cast<const X*>(g.x) + first * g.ins;
  own.n = std::min(end * g.chunks.rows, g.n) - first;
  own.chunks.count = end - begin;
  EpilogueArgs& e = own.epilogue;
  e.residual = from(e.residual, sizeof(Y));
  e.y = from(e.y, sizeof(Y));
  e.pre_activation = from(e.pre_activation, sizeof(X));
  e.activated = from(e.activated, sizeof(X));
  if (e.partial) e.partial += begin * g.outs;
  return own;
}

template <class X, class W, class Y>
static void launch_typed(const Linear& g, bool transposed) {
  const auto run = [&](auto kernel, int64_t panel) {
    const int64_t panels = (g.outs + panel - 1) / panel, count = g.chunks.count;
    if (g.n < MANY_ROWS * g.outs || count < MANY_CHUNKS * torch::stable::get_num_threads()) {
      constexpr int64_t lanes = avx512bf16::LANES;
      const int64_t vectors = (g.outs + lanes - 1) / lanes, whole = panel / lanes;
      return parallel_blocks(
          vectors, whole, count, whole, [&](int64_t begin, int64_t end) { kernel(&g, begin, end); });
    }
    parallel(count, 1, [&](int64_t begin, int64_t end) {
      const Linear own = restrict_to_chunks<X, Y>(g, begin, end);
      kernel(&own, 0, panels * own.chunks.count);
    });
  };
#if !defined(SGMIM_WIDEST_ONLY)
  if (isa() == Isa::avx512)
    return run(
        transposed ? &avx512::linear_units<X, W, Y, true> : &avx512::linear_units<X, W, Y, false>, avx512::PANEL);
#endif
  run(transposed ? &avx512bf16::linear_units<X, W, Y, true> : &avx512bf16::linear_units<X, W, Y, false>,
      avx512bf16::PANEL);
}
#endif

// Checks the arguments and runs the gemm. `transposed`: weight is (ins, outs), as in a dgrad.
static void launch(
    [[maybe_unused]] const Tensor& x, [[maybe_unused]] const Tensor& weight, [[maybe_unused]] bool transposed,
    [[maybe_unused]] const Tensor& y, [[maybe_unused]] EpilogueArgs epilogue) {
  const bool wide = x.scalar_type() == ScalarType::Float;
  SGMIM_CHECK(
      isa() == Isa::avx512bf16 || (wide && isa() == Isa::avx512), "linear needs ", wide ? "AVX-512" : "AVX512-BF16",
      ", which this CPU does not have or SGMIM_FAST_CPU_ISA disables");
#if defined(SGMIM_MANY_ISAS)
  check_matrix(x, "x");
  check_matrix(weight, "weight");
  const int64_t n = x.size(0), ins = x.size(1), outs = weight.size(transposed ? 1 : 0);
  check_packed(x, "x", x.scalar_type(), n * ins);
  SGMIM_CHECK(weight.size(transposed ? 0 : 1) == ins, "weight must have ", ins,
              " input channels, as x has columns");
  SGMIM_CHECK(wide || ins % 2 == 0, "x must have an even number of columns, got ", ins);
  check_matrix(y, "y");
  SGMIM_CHECK(y.size(0) == n && y.size(1) == outs, "y must be ", n, " x ", outs, ", got ", y.size(0), " x ", y.size(1));
  epilogue.y = y.data_ptr();
  const Linear g{x.data_ptr(), weight.data_ptr(), n, ins, outs, Chunks::of(n), epilogue};
  if (wide) {
    check_packed(weight, "weight", ScalarType::Float, outs * ins);
    check_packed(y, "y", ScalarType::Float, n * outs);
    return launch_typed<float, float, float>(g, transposed);
  }
  dispatch_float(weight, "weight", [&](auto weight_type) {
    dispatch_float(y, "y", [&](auto type) {
      launch_typed<Bf16, decltype(weight_type), decltype(type)>(g, transposed);
    });
  });
#endif
}

static void linear(
    const Tensor& x, const Tensor& weight, bool transposed, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& residual, const Tensor& y) {
  check_matrix(y, "y");
  check_packed(bias, "bias", ScalarType::Float, y.size(1));
  check_packed(scale, "scale", ScalarType::Float, y.size(1));
  check_packed(residual, "residual", y.scalar_type(), y.numel());
  EpilogueArgs e;
  e.bias = data<float>(bias);
  e.scale = data<float>(scale);
  e.residual = residual.has_value() ? residual->data_ptr() : nullptr;
  launch(x, weight, transposed, y, e);
}

static void linear_gelu(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& pre_activation, const Tensor& activated) {
  check_matrix(pre_activation, "pre_activation");
  check_packed(pre_activation, "pre_activation", x.scalar_type(), pre_activation.numel());
  check_packed(bias, "bias", ScalarType::Float, pre_activation.size(1));
  check_packed(activated, "activated", x.scalar_type(), pre_activation.numel());
  EpilogueArgs e;
  e.kind = Epilogue::gelu;
  e.bias = data<float>(bias);
  e.activated = activated.data_ptr();
  launch(x, weight, false, pre_activation, e);
}

static void dgrad_gelu(
    const Tensor& dy, const Tensor& weight, const Tensor& pre_activation, const Tensor& dpre_activation,
    const Tensor& activated, const Tensor& sums) {
  check_matrix(pre_activation, "pre_activation");
  const int64_t outs = pre_activation.size(1), chunks = Chunks::of(pre_activation.size(0)).count;
  check_packed(pre_activation, "pre_activation", dy.scalar_type(), pre_activation.numel());
  check_packed(dpre_activation, "dpre_activation", dy.scalar_type(), pre_activation.numel());
  check_packed(activated, "activated", dy.scalar_type(), pre_activation.numel());
  check_packed(sums, "sums", ScalarType::Float, outs);
  std::vector<float> partial(chunks * outs, 0.0f);
  EpilogueArgs e;
  e.kind = Epilogue::gelu_backward;
  e.pre_activation = pre_activation.data_ptr();
  e.activated = activated.data_ptr();
  e.partial = partial.data();
  launch(dy, weight, true, dpre_activation, e);
  for (int64_t i = 0; i < outs; ++i) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += partial[c * outs + i];
    data<float>(sums)[i] = static_cast<float>(total);
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def(
      "linear(Tensor x, Tensor weight, bool transposed, Tensor? bias, Tensor? scale, Tensor? residual, "
      "Tensor(a!) y) -> ()");
  m.def("linear_gelu(Tensor x, Tensor weight, Tensor bias, Tensor(a!) pre_activation, Tensor(b!) activated) -> ()");
  m.def(
      "dgrad_gelu(Tensor dy, Tensor weight, Tensor pre_activation, Tensor(a!) dpre_activation, Tensor(b!) activated, "
      "Tensor(c!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_gelu", TORCH_BOX(&linear_gelu));
  m.impl("dgrad_gelu", TORCH_BOX(&dgrad_gelu));
}

}  // namespace sgmim
#endif
