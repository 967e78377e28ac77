// What the block-level algorithms ask of the threads they run on, and the macro that compiles them for both machines.
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
//   product<ta, tb>(a, la, b, lb, c, lc, m, n, k)   c (m, n) float += a (m, k) . b (k, n)
// a is stored (k, m) if ta, b (n, k) if tb; la, lb, lc: elements from row to row; m, n, k multiples of 16. It is no
// barrier: one must lie before it, for the operands, and one behind it.
//
// cuda/groups.h has a warp and a block, cuda/products.h a block with products; the tests have a group of one and a group of host threads.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SGMIM_HOST_DEVICE __host__ __device__ inline
#else
#define SGMIM_HOST_DEVICE inline
#endif

namespace sgmim {

// What one access moves at most.
struct alignas(16) Sixteen {
  uint64_t words[2];
};

}  // namespace sgmim
