// CUDA version of csrc/cpu/masked_patch_embed.cpp: tokens of a masked stem, forward and backward, one launch each, with
// a warp per row. place_tokens.h has the device functions, which the tests also run on the host.
#include "cuda/groups.h"
#include "cuda/launch.h"
#include "cuda/gemm.h"
#include "place_tokens.h"

namespace sgmim {

namespace {

constexpr uint32_t WARPS = 8;              // most warps of a block
constexpr int64_t MOST_MEMORY = 96 << 10;  // bytes per block: available on all GPUs from compute capability 8.0 on

// Returns the warps of a block of the backward, each of which has sums of its own in shared memory; 0 if not one fits.
int32_t warps_for(int64_t width) {
  int32_t warps = WARPS;
  while (warps > 0 && warps * SUMS * width * int64_t{sizeof(float)} > MOST_MEMORY) warps /= 2;
  return warps;
}

__device__ inline GroupIndex warp_of_launch() {
  const uint32_t warps = blockDim.x / WARP;
  return {int64_t{blockIdx.x} * warps + threadIdx.x / WARP, int64_t{gridDim.x} * warps};
}

// Registers: 47 to 110. No shared memory. Reads the embedded rows once (the norm twice more, from L1) and writes every
// row of the result. For each row it writes 8 bytes of the inverse, and makes two reads of 8 bytes.
template <int32_t MANY, class T>
__global__ void __launch_bounds__(WARPS * WARP, 2) place(Tokens<T> tokens, const float* token, T* out) {
  place_tokens<MANY>(WarpGroup{}, warp_of_launch(), LaunchGroup{}, tokens, token, out);
}

// Registers: 63 to 91. Shared memory: 16 * width bytes per warp.
// Reads the gradient once, and the embedded rows if there is a norm (a second time from L1). Writes dembedded, and at
// most 512 times 16 * width bytes of sums, which it reads once.
template <int32_t MANY, class T>
__global__ void __launch_bounds__(WARPS * WARP, 2)
    take(Tokens<T> tokens, const T* dout, T* dembedded, float* partials, float* sums) {
  extern __shared__ __align__(16) float memory[];
  const GroupIndex in_block{threadIdx.x / WARP, blockDim.x / WARP};
  place_tokens_backward<MANY>(
      WarpGroup{}, in_block, BlockGroup{}, GroupIndex{blockIdx.x, gridDim.x}, LaunchGroup{}, tokens, dout, dembedded,
      partials, sums, memory);
}

// Checks the tensors that both passes share, and collects them. all: out or its gradient, (rows, width).
template <class T>
Tokens<T> describe(
    const std::optional<Tensor>& embedded, const Tensor& visible, const Tensor& inverse,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& statistics, const Tensor& all) {
  const int64_t rows = all.size(0), width = all.size(1), count = visible.numel();
  SGMIM_CHECK(width <= INT32_MAX / 2, "rows of ", width, " numbers are too large");
  check_packed(visible, "visible", ScalarType::Long, all, count);
  check_packed(inverse, "the inverse", ScalarType::Long, all, rows);
  Tokens<T> tokens{};
  if (embedded) {
    check_packed(*embedded, "embedded", all.scalar_type(), all, count * width);
    tokens.embedded = pointer<const T>(*embedded);
  }
  if (weight) {
    SGMIM_CHECK(embedded && statistics, "a norm needs the embedded rows and their statistics");
    check_packed(*weight, "the norm's weight", ScalarType::Float, all, width);
    check_packed(*statistics, "the statistics", ScalarType::Float, all, 2 * count);
    tokens.weight = pointer<const float>(*weight);
    tokens.statistics = pointer<float>(*statistics);
  }
  tokens.visible = pointer<const int64_t>(visible);
  tokens.inverse = pointer<int64_t>(inverse);
  tokens.count = count;
  tokens.rows = rows;
  tokens.width = static_cast<int32_t>(width);
  return tokens;
}

template <class T>
bool wide(const Tokens<T>& tokens, std::initializer_list<const void*> others) {
  return tokens.width % (16 / sizeof(T)) == 0 && on_sixteen_bytes(others) && on_sixteen_bytes({tokens.embedded});
}

// embedded (n, width) and out (rows, width) have one dtype; token, weight, bias (width,), statistics (2, n): float32.
void run_place(
    const Tensor& embedded, const Tensor& visible, const Tensor& inverse, const Tensor& token,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps, const Tensor& out,
    const std::optional<Tensor>& statistics) {
  dispatch_float(out, "out", [&](auto type) {
    using T = decltype(type);
    Tokens<T> tokens = describe<T>(embedded, visible, inverse, weight, statistics, out);
    check_packed(out, "out", out.scalar_type(), out, out.numel());
    check_packed(token, "the mask token", ScalarType::Float, out, tokens.width);
    SGMIM_CHECK(weight.has_value() == bias.has_value(), "the norm needs both weight and bias");
    if (bias) {
      check_packed(*bias, "the norm's bias", ScalarType::Float, out, tokens.width);
      tokens.bias = pointer<const float>(*bias);
    }
    tokens.eps = static_cast<float>(eps);
    if (out.numel() == 0) return;
    const DeviceGuard guard(out.get_device_index());
    const auto kernel = wide(tokens, {pointer<T>(out)}) ? place<16 / sizeof(T), T> : place<1, T>;
    launch_together(
        kernel, (tokens.rows + WARPS - 1) / WARPS, WARPS * WARP, 0, out, tokens, pointer<const float>(token),
        pointer<T>(out));
  });
}

// dout (rows, width), embedded and dembedded (n, width) have one dtype. sums (4, width), float32: gradients of the mask
// token, norm weight and norm bias (zeros without a norm), and column sums of dembedded. partials (parts, 4, width),
// float32: workspace.
void run_take(
    const Tensor& dout, const std::optional<Tensor>& embedded, const Tensor& visible, const Tensor& inverse,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& statistics, const Tensor& dembedded,
    const Tensor& partials, const Tensor& sums) {
  dispatch_float(dout, "the gradient", [&](auto type) {
    using T = decltype(type);
    const Tokens<T> tokens = describe<T>(embedded, visible, inverse, weight, statistics, dout);
    const int64_t all = int64_t{SUMS} * tokens.width, parts = parts_of(tokens.rows);
    const int32_t warps = warps_for(tokens.width);
    SGMIM_CHECK(warps > 0, "rows of ", tokens.width, " numbers; their sums do not fit into ", MOST_MEMORY, " bytes");
    check_packed(dout, "the gradient", dout.scalar_type(), dout, dout.numel());
    check_packed(dembedded, "dembedded", dout.scalar_type(), dout, tokens.count * tokens.width);
    check_packed(partials, "partials", ScalarType::Float, dout, parts * all);
    check_packed(sums, "sums", ScalarType::Float, dout, all);
    if (all == 0) return;
    const DeviceGuard guard(dout.get_device_index());
    const bool many = wide(tokens, {pointer<T>(dout), pointer<T>(dembedded)});
    const auto kernel = many ? take<16 / sizeof(T), T> : take<1, T>;
    launch_together(
        kernel, std::max<int64_t>(parts, 1), warps * WARP, place_memory(tokens.width, warps) * sizeof(float), dout,
        tokens, pointer<const T>(dout), pointer<T>(dembedded), pointer<float>(partials), pointer<float>(sums));
  });
}

// Returns the number of parts of the sums over `rows` rows, or -1 if rows of this width do not fit.
int64_t place_tokens_parts(int64_t rows, int64_t width) { return warps_for(width) > 0 ? parts_of(rows) : -1; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cuda, m) {
  m.def(
      "place_tokens(Tensor embedded, Tensor visible, Tensor(a!) inverse, Tensor token, Tensor? weight, Tensor? bias, "
      "float eps, Tensor(b!) out, Tensor(c!)? statistics) -> ()");
  m.def(
      "place_tokens_backward(Tensor dout, Tensor? embedded, Tensor visible, Tensor(a!) inverse, Tensor? weight, "
      "Tensor? statistics, Tensor(b!) dembedded, Tensor(c!) partials, Tensor(d!) sums) -> ()");
  m.def("place_tokens_parts(int rows, int width) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cuda, CUDA, m) {
  m.impl("place_tokens", TORCH_BOX(&run_place));
  m.impl("place_tokens_backward", TORCH_BOX(&run_take));
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("place_tokens_parts", TORCH_BOX(&place_tokens_parts));
}

}  // namespace sgmim
