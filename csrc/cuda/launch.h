// Utilities of the CUDA launchers: the device guard, torch's current stream, checks of tensors, and launches with clear
// error messages.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>

#include "common.h"

namespace sgmim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
// Makes the tensors' GPU the current device until it goes out of scope. Every launcher needs one.
using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Checks that a tensor is contiguous, has `count` values of a dtype, and is on the GPU of `other`.
inline void check_packed(const Tensor& tensor, const char* name, ScalarType type, const Tensor& other, int64_t count) {
  SGMIM_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == other.get_device_index(), name, " must be on GPU ",
      other.get_device_index());
  SGMIM_CHECK(
      tensor.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
      torch::headeronly::toString(tensor.scalar_type()));
  SGMIM_CHECK(
      tensor.is_contiguous() && tensor.numel() == count, name, " must be contiguous and have ", count, " values, got ",
      tensor.numel());
}

inline int device_attribute(cudaDeviceAttr attribute, const Tensor& tensor) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, tensor.get_device_index()));
  return value;
}

#define SGMIM_TEXT(...) SGMIM_TEXT_(__VA_ARGS__)
#define SGMIM_TEXT_(...) #__VA_ARGS__

// Raises a clear error for a GPU that the library has no code for. Python checks this first (backends.py), so this is
// for other callers.
inline void check_architecture(cudaError_t error, const Tensor& tensor) {
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion) return;
  cudaGetLastError();
  SGMIM_CHECK(
      false, "GPU ", tensor.get_device_index(), " has compute capability ",
      device_attribute(cudaDevAttrComputeCapabilityMajor, tensor), ".",
      device_attribute(cudaDevAttrComputeCapabilityMinor, tensor), "; the CUDA library is built for (in hundredths) ",
      SGMIM_TEXT(__CUDA_ARCH_LIST__), "; install sgmim_fast again with TORCH_CUDA_ARCH_LIST naming it");
}

// Returns the bytes of dynamic shared memory that a block of this kernel can request.
template <class... Parameters>
int64_t most_dynamic_memory(void (*kernel)(Parameters...), const Tensor& tensor) {
  cudaFuncAttributes attributes;
  const cudaError_t found = cudaFuncGetAttributes(&attributes, kernel);
  check_architecture(found, tensor);
  STD_CUDA_CHECK(found);
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, tensor) -
         static_cast<int64_t>(attributes.sharedSizeBytes);
}

// Allows the kernel's blocks `memory` bytes of dynamic shared memory.
template <class... Parameters>
void allow_memory(void (*kernel)(Parameters...), int64_t memory, const Tensor& tensor) {
  if (memory == 0) return;
  const int64_t most = most_dynamic_memory(kernel, tensor);
  SGMIM_CHECK(memory <= most, "a block needs ", memory, " bytes of shared memory; this GPU has ", most, " for it");
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(memory)));
}

inline void check_launch(cudaError_t error, const Tensor& tensor) {
  check_architecture(error, tensor);
  STD_CUDA_CHECK(error);
}

// Launches the kernel on the current stream of the tensor's GPU, which a DeviceGuard has made the current device.
// memory: bytes of dynamic shared memory.
template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), int64_t blocks, dim3 threads, int64_t memory, const Tensor& tensor,
    const Arguments&... arguments) {
  SGMIM_CHECK(0 < blocks && blocks <= INT32_MAX, "a launch of ", blocks, " blocks; CUDA takes less than 2^31");
  allow_memory(kernel, memory, tensor);
  kernel<<<static_cast<uint32_t>(blocks), threads, static_cast<size_t>(memory), current_stream(tensor)>>>(arguments...);
  check_launch(cudaGetLastError(), tensor);
}

// Cooperative launch, for a kernel with barriers across blocks (LaunchGroup::sync), which must all be resident at once.
// It has at most `blocks` blocks, and no more than the GPU holds, so the kernel loops over its work.
template <class... Parameters, class... Arguments>
void launch_together(
    void (*kernel)(Parameters...), int64_t blocks, uint32_t threads, int64_t memory, const Tensor& tensor,
    const Arguments&... arguments) {
  allow_memory(kernel, memory, tensor);
  int resident = 0;
  const size_t bytes = static_cast<size_t>(memory);
  check_launch(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, static_cast<int>(threads), bytes), tensor);
  const int64_t most = int64_t{resident} * device_attribute(cudaDevAttrMultiProcessorCount, tensor);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<uint32_t>(std::min(blocks, most));
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.stream = current_stream(tensor);
  config.attrs = &together;
  config.numAttrs = 1;
  check_launch(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), tensor);
}

}  // namespace sgmim
