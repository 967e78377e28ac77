// What every CPU launcher needs: typed pointers out of stable-ABI tensors, and loops over torch's own threads.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"
#include "cpu/isa.h"

namespace sgmim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// Calls body(float{}) or body(Bf16{}) for the tensor's dtype; anything else is an error.
template <class Body>
void dispatch_float(const Tensor& tensor, const char* name, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Float) {
    body(float{});
  } else if (tensor.scalar_type() == ScalarType::BFloat16) {
    body(Bf16{});
  } else {
    SGMIM_CHECK(false, name, " must be float32 or bfloat16, got ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Row numbers index raw memory, and come from the caller: each must be in [0, limit).
inline void check_rows(const Tensor& rows, int64_t limit, const char* name) {
  const int64_t* row = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t i = 0; i < rows.numel(); ++i)
    SGMIM_CHECK(0 <= row[i] && row[i] < limit, name, " has ", row[i], "; expected indices from 0 to below ", limit);
}

// Offsets of packed rows: from 0 to `count`, never falling.
inline void check_offsets(const Tensor& offsets, int64_t count, const char* name) {
  const int64_t* at = static_cast<const int64_t*>(offsets.data_ptr());
  const int64_t images = offsets.numel() - 1;
  bool rising = images >= 0 && at[0] == 0 && at[images] == count;
  for (int64_t b = 0; b < images; ++b) rising = rising && at[b] <= at[b + 1];
  SGMIM_CHECK(rising, name, " must rise from 0 to the number of rows, ", count);
}

// body(begin, end) over [0, count) on torch's threads, at least `grain` items each.
template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  if (count > 0) torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), body);
}

// Column sums over rows, the same bits whatever the number of threads: the rows are cut into blocks that depend on
// the shape alone, each block sums into its own buffer, and the buffers are added in order.
//
// body(begin, end, partial) adds rows [begin, end) into `partial`, `width` zeroed floats.
template <class Body>
void column_sums(int64_t rows, int64_t width, float* out, const Body& body) {
  const int64_t blocks = std::clamp<int64_t>(rows / 8, 1, 16);
  std::vector<float> partial(blocks * width, 0.0f);
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      body(b * rows / blocks, (b + 1) * rows / blocks, partial.data() + b * width);
  });
  for (int64_t i = 0; i < width; ++i) {
    float sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += partial[b * width + i];
    out[i] = sum;
  }
}

}  // namespace sgmim
