// What the block-level algorithms ask of the threads they run on, and the macros that compile them for both machines.
//
// A body is a template over its group, and every thread of the group calls it with the same arguments. A group has
//   rank(), size()       this thread's number, and how many there are
//   sync()               a barrier; what any thread wrote to the group's memory before it, all see after it
//   scan(value, total)   sum of the values of the threads of lower rank; total: of all of them
//   sum(value)           sum of a double over the group, in a fixed order, the same bits in every thread
//   add(counter, n)      an atomic addition to a counter in the group's memory
// scan and sum are no barriers for the rest of the memory. All of these but add() must be reached by all threads of the
// group, so a body branches around them only on values that are the same in every thread.
//
// Some groups also multiply matrices in their memory:
//   gemm<ta, tb>(a, la, b, lb, c, lc, m, n, k)      c (m, n) float += a (m, k) . b (k, n)
// a is stored (k, m) if ta, b (n, k) if tb; la, lb, lc: elements from row to row; m, n, k multiples of 16. It is no
// barrier: one must lie before it, for the operands, and one behind it.
//
// A whole launch can be a group too, whose threads meet across blocks; such a group has rank(), size() and sync()
// alone.
//
// cuda/groups.h has a warp, a block and a launch, cuda/gemm.h a block with gemms; the tests have a group of one
// and a group of host threads.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SGMIM_HOST_DEVICE __host__ __device__ inline
#else
#define SGMIM_HOST_DEVICE inline
#endif
#ifdef __CUDA_ARCH__  // of nvcc's passes only the device's know it
#define SGMIM_PRAGMA(text) _Pragma(#text)
#define SGMIM_UNROLL SGMIM_PRAGMA(unroll)
#define SGMIM_UNROLL_BY(n) SGMIM_PRAGMA(unroll n)
#else
#define SGMIM_UNROLL
#define SGMIM_UNROLL_BY(n)
#endif

namespace sgmim {

// What one access moves at most.
struct alignas(16) Sixteen {
  uint64_t words[2];
};

// MANY neighbours; 16 bytes of them are one access.
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
#ifdef __CUDA_ARCH__  // of a struct's assignment nvcc may make two accesses
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
