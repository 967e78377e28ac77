// A block with gemms of matrices in shared memory, dispatch over dtypes, and a check of alignment.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#include <initializer_list>
#include <type_traits>

#include "cuda/groups.h"
#include "cuda/launch.h"

namespace sgmim {

// A block whose gemms use tensor cores, a 16 x 16 tile per warp, or, for float32, CUDA cores in full precision.
struct GemmGroup : BlockGroup {
  template <bool ta, bool tb, class T>
  __device__ void gemm(
      const T* a, int32_t la, const T* b, int32_t lb, float* c, int32_t lc, int32_t m, int32_t n, int32_t k) const {
    if constexpr (sizeof(T) == 2) {
      using namespace nvcuda::wmma;
      using Rows = row_major;
      using Columns = col_major;
      fragment<matrix_a, 16, 16, 16, T, std::conditional_t<ta, Columns, Rows>> left;
      fragment<matrix_b, 16, 16, 16, T, std::conditional_t<tb, Columns, Rows>> right;
      fragment<accumulator, 16, 16, 16, float> total;
      for (int32_t tile = threadIdx.x / WARP; tile < m / 16 * (n / 16); tile += blockDim.x / WARP) {
        const int32_t row = tile / (n / 16) * 16, column = tile % (n / 16) * 16;
        load_matrix_sync(total, c + row * lc + column, lc, mem_row_major);
        for (int32_t j = 0; j < k; j += 16) {
          load_matrix_sync(left, ta ? a + j * la + row : a + row * la + j, la);
          load_matrix_sync(right, tb ? b + column * lb + j : b + j * lb + column, lb);
          mma_sync(total, left, right, total);
        }
        store_matrix_sync(c + row * lc + column, total, lc, mem_row_major);
      }
    } else {
      for (int32_t i = threadIdx.x; i < m * n; i += blockDim.x) {
        const int32_t row = i / n, column = i % n;
        float total = c[row * lc + column];
#pragma unroll 4
        for (int32_t j = 0; j < k; ++j)
          total += (ta ? a[j * la + row] : a[row * la + j]) * (tb ? b[column * lb + j] : b[j * lb + column]);
        c[row * lc + column] = total;
      }
    }
  }
};

// Calls body(float{}), body(__half{}) or body(__nv_bfloat16{}), according to the dtype of a matrix on a GPU.
template <class Body>
void dispatch_float(const Tensor& tensor, const char* name, const Body& body) {
  SGMIM_CHECK(tensor.is_cuda() && tensor.dim() == 2, name, " must be on a GPU, (rows, channels)");
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Half: return body(__half{});
    case ScalarType::BFloat16: return body(__nv_bfloat16{});
    default:
      SGMIM_CHECK(
          false, name, " must be float32, float16 or bfloat16, got ",
          torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline bool on_sixteen_bytes(std::initializer_list<const void*> pointers) {
  return std::all_of(
      pointers.begin(), pointers.end(), [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

}  // namespace sgmim
