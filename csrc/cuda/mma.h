// The group of csrc/attend_window.h: a block of warps with the instructions of the tensor cores (compute capability 8.0
// and later). Their fragments have a documented layout, unlike those of nvcuda::wmma, so kernels can compute on them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/groups.h"

namespace sgmim {

struct MmaGroup {
  __device__ int32_t rank() const { return threadIdx.x; }
  __device__ int32_t size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void sync_warp() const { __syncwarp(); }
  __device__ int32_t anew(int32_t x) const {
    asm volatile("" : "+r"(x));
    return x;
  }
  __device__ float shuffle_xor(float value, int32_t mask) const { return __shfl_xor_sync(EVERY_LANE, value, mask); }

  template <bool TRANSPOSED>
  __device__ void ldmatrix(uint32_t (&f)[4], const void* row) const {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"(at) : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"(at) : "memory");
  }

  template <class T>
  __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    if constexpr (std::is_same_v<T, __half>)
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }

  template <class T>
  __device__ uint32_t pack(float x, float y) const {
    uint32_t bits;
    if constexpr (std::is_same_v<T, __half>) {
      const __half2 both = __floats2half2_rn(x, y);
      memcpy(&bits, &both, sizeof bits);
    } else {
      const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
      memcpy(&bits, &both, sizeof bits);
    }
    return bits;
  }

  __device__ float exp2(float x) const {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  __device__ float reciprocal(float x) const {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  __device__ void copy_async(void* to, const void* from, bool there) const {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(at), "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0) : "memory");
  }
  __device__ void wait_copies() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
};

}  // namespace sgmim
