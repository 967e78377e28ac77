// Interface of the thread groups that the block-level device functions run on, and macros that compile these functions
// for the GPU and the host.
//
// A device function is a template over its group; every thread of the group calls it with equal arguments. A group has
//   rank(), size()       index of this thread, and number of threads
//   sync()               barrier; writes to the group's memory before it are visible to all threads after it
//   scan(value, total)   exclusive prefix sum: sum over the threads of lower rank; total: sum over all threads
//   sum(value)           sum of a double over the group, in a fixed order, with the same bits in every thread
//   add(counter, n)      atomic addition to a counter in the group's memory
// scan and sum are not barriers for other memory. All of these but add() must be reached by all threads of the group,
// so branches around them may depend only on values that are the same in every thread.
//
// Some groups also have a gemm of matrices in their memory:
//   gemm<ta, tb>(a, la, b, lb, c, lc, m, n, k)      c (m, n) float += a (m, k) . b (k, n)
// a is stored as (k, m) if ta, b as (n, k) if tb; la, lb, lc are row strides; m, n, k are multiples of 16. It contains
// no barrier: callers need one before it, for the operands, and one after it.
//
// All threads of a launch can be a group too, with rank(), size() and a sync() across blocks alone.
//
// cuda/groups.h has a warp, a block and a launch, and cuda/gemm.h a block with gemms. The tests have groups of one or
// several host threads.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SGMIM_HOST_DEVICE __host__ __device__ inline
#else
#define SGMIM_HOST_DEVICE inline
#endif
#ifdef __CUDA_ARCH__  // defined in nvcc's device passes only
#define SGMIM_PRAGMA(text) _Pragma(#text)
#define SGMIM_UNROLL SGMIM_PRAGMA(unroll)
#define SGMIM_UNROLL_BY(n) SGMIM_PRAGMA(unroll n)
#else
#define SGMIM_UNROLL
#define SGMIM_UNROLL_BY(n)
#endif

namespace sgmim {

// The largest single memory access.
struct alignas(16) Sixteen {
  uint64_t words[2];
};

// MANY adjacent elements; if these are 16 bytes, they are loaded and stored by one access.
template <class T, int32_t MANY>
struct Few {
  T values[MANY];

  static SGMIM_HOST_DEVICE Few load(const T* from) {
    Few few;
    if constexpr (sizeof few == sizeof(Sixteen)) {
      const Sixteen bits = *reinterpret_cast<const Sixteen*>(from);
      memcpy(&few, &bits, sizeof bits);
    } else {
      SGMIM_UNROLL
      for (int32_t i = 0; i < MANY; ++i) few.values[i] = from[i];
    }
    return few;
  }
  SGMIM_HOST_DEVICE void store(T* to) const {
    if constexpr (sizeof *this == sizeof(Sixteen)) {
#ifdef __CUDA_ARCH__  // nvcc may compile the assignment of a struct to two accesses
      uint4 bits;
      memcpy(&bits, this, sizeof bits);
      __stwb(reinterpret_cast<uint4*>(to), bits);
#else
      Sixteen bits;
      memcpy(&bits, this, sizeof bits);
      *reinterpret_cast<Sixteen*>(to) = bits;
#endif
    } else {
      SGMIM_UNROLL
      for (int32_t i = 0; i < MANY; ++i) to[i] = values[i];
    }
  }
};

}  // namespace sgmim
