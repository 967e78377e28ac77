// Trimmed standardisation of structure maps in one launch, with a block per map. A map that fits shared memory is read
// once; for a larger one the six passes read L2.
// standardize_plane.h has the device function, which the tests also run on the host.
#include "cuda/groups.h"
#include "cuda/launch.h"
#include "standardize_plane.h"

namespace sgmim {

namespace {

// Copies a map into shared memory, 16 bytes at a time if its address and size are multiples of 16.
template <class Raw>
__device__ void load_plane(const Raw* x, uint32_t n, Raw* copy) {
  const uint64_t bytes = n * sizeof(Raw);
  if ((reinterpret_cast<uintptr_t>(x) | bytes) % 16 == 0) {
    const uint4* const from = reinterpret_cast<const uint4*>(x);
    uint4* const to = reinterpret_cast<uint4*>(copy);
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < bytes / 16; i += blockDim.x) to[i] = from[i];
  } else {
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) copy[i] = x[i];
  }
  __syncthreads();
}

// Registers: 40 to 64. Shared memory: 16,656 bytes, and the map if `cached`: 217,360 bytes for 224 x 224 floats.
// Reads the map once if `cached`, else six times; writes 4 bytes per value.
template <class Input, bool cached>
__global__ void __launch_bounds__(1024, 1)
    standardize_planes(const typename Input::Raw* x, float* y, int64_t* nonfinite, uint32_t n) {
  extern __shared__ uint4 memory[];
  __shared__ uint32_t counts[PLANE_MEMORY];
  __shared__ double scratch[WARP];
  x += int64_t{blockIdx.x} * n;
  y += int64_t{blockIdx.x} * n;
  if constexpr (cached) {
    auto* const copy = reinterpret_cast<typename Input::Raw*>(memory);
    load_plane(x, n, copy);
    standardize_plane<Input>(BlockGroup{scratch}, copy, n, counts, y, nonfinite + blockIdx.x);
  } else {
    standardize_plane<Input>(BlockGroup{scratch}, x, n, counts, y, nonfinite + blockIdx.x);
  }
}

template <class Input>
void run(const Tensor& input, const Tensor& output, const Tensor& nonfinite) {
  using Raw = typename Input::Raw;
  const uint32_t n = static_cast<uint32_t>(input.size(1));
  const int64_t bytes = (input.size(1) * int64_t{sizeof(Raw)} + 15) / 16 * 16;
  const bool fits = bytes <= most_dynamic_memory(standardize_planes<Input, true>, input);
  launch(
      fits ? standardize_planes<Input, true> : standardize_planes<Input, false>, input.size(0), n > 8192 ? 1024 : 256,
      fits ? bytes : 0, input, pointer<const Raw>(input), pointer<float>(output), pointer<int64_t>(nonfinite), n);
}

// input: (planes, n) float32, bfloat16, float16 or uint16; output: (planes, n) float32; nonfinite: (planes,) int64.
void standardize_structure(const Tensor& input, const Tensor& output, const Tensor& nonfinite) {
  SGMIM_CHECK(input.is_cuda() && input.dim() == 2, "the maps must be on a GPU, (planes, values)");
  const int64_t planes = input.size(0), n = input.size(1);
  SGMIM_CHECK(n <= INT32_MAX - 4096, "a map of ", n, " values; the CUDA kernel takes less than 2^31 - 4096");
  check_packed(input, "the maps", input.scalar_type(), input, planes * n);
  check_packed(output, "the result", ScalarType::Float, input, planes * n);
  check_packed(nonfinite, "the counts", ScalarType::Long, input, planes);
  if (planes == 0 || n == 0) return;
  const DeviceGuard guard(input.get_device_index());
  switch (input.scalar_type()) {
    case ScalarType::Float: return run<Float32>(input, output, nonfinite);
    case ScalarType::BFloat16: return run<BFloat16>(input, output, nonfinite);
    case ScalarType::Half: return run<Float16>(input, output, nonfinite);
    case ScalarType::UInt16: return run<UInt16>(input, output, nonfinite);
    default:
      SGMIM_CHECK(
          false, "the maps must be float32, bfloat16, float16 or uint16, got ",
          torch::headeronly::toString(input.scalar_type()));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cuda, m) {
  m.def("standardize_structure(Tensor input, Tensor(a!) output, Tensor(b!) nonfinite) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cuda, CUDA, m) {
  m.impl("standardize_structure", TORCH_BOX(&standardize_structure));
}

}  // namespace sgmim
