// What every CUDA launcher needs: the device guard, torch's current stream, and checks of raw memory.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "common.h"

namespace sgmim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
// Makes the tensors' GPU the current one until it goes out of scope; every launcher needs one.
using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A contiguous tensor of `count` values of a dtype, on the GPU of `other`.
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

}  // namespace sgmim
