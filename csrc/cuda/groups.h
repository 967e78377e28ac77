// The groups of threads that the device functions run on: a warp, a block, or all threads of a launch. csrc/group.h
// documents their interface.
#pragma once

#include <cooperative_groups.h>

#include "group.h"

namespace sgmim {

constexpr uint32_t WARP = 32, EVERY_LANE = 0xffffffffu;

// Returns the sum of the values of the lower lanes; total: the sum over all lanes.
__device__ inline uint32_t scan_warp(uint32_t value, uint32_t& total) {
  const uint32_t lane = threadIdx.x % WARP;
  uint32_t inclusive = value;
#pragma unroll
  for (uint32_t step = 1; step < WARP; step *= 2) {
    const uint32_t below = __shfl_up_sync(EVERY_LANE, inclusive, step);
    if (lane >= step) inclusive += below;
  }
  total = __shfl_sync(EVERY_LANE, inclusive, WARP - 1);
  return inclusive - value;
}

// In each step both lanes of a pair add the same two numbers, so all lanes get the same bits.
__device__ inline double sum_warp(double value) {
#pragma unroll
  for (uint32_t step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(EVERY_LANE, value, step);
  return value;
}

// One warp of a block whose threads are numbered along x.
struct WarpGroup {
  __device__ int32_t rank() const { return threadIdx.x % WARP; }
  __device__ int32_t size() const { return WARP; }
  __device__ void sync() const { __syncwarp(); }
  __device__ uint32_t scan(uint32_t value, uint32_t& total) const { return scan_warp(value, total); }
  __device__ double sum(double value) const { return sum_warp(value); }
  __device__ void add(uint32_t* counter, uint32_t n) const { atomicAdd(counter, n); }
};

// All threads of a block, numbered along x; their number is a multiple of 32.
struct BlockGroup {
  double* scratch;  // shared memory for 32 numbers, one per warp; not used between calls

  __device__ int32_t rank() const { return threadIdx.x; }
  __device__ int32_t size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ uint32_t scan(uint32_t value, uint32_t& total) const {
    uint32_t* const totals = reinterpret_cast<uint32_t*>(scratch);
    uint32_t before = scan_warp(value, total);
    if (threadIdx.x % WARP == 0) totals[threadIdx.x / WARP] = total;
    __syncthreads();
    total = 0;
    for (uint32_t warp = 0; warp < blockDim.x / WARP; ++warp) {
      before += warp < threadIdx.x / WARP ? totals[warp] : 0;
      total += totals[warp];
    }
    __syncthreads();  // the next call overwrites scratch
    return before;
  }
  __device__ double sum(double value) const {
    value = sum_warp(value);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    value = 0;
    for (uint32_t warp = 0; warp < blockDim.x / WARP; ++warp) value += scratch[warp];
    __syncthreads();
    return value;
  }
  __device__ void add(uint32_t* counter, uint32_t n) const { atomicAdd(counter, n); }
};

// All threads of a cooperative launch, see launch_together().
struct LaunchGroup {
  __device__ int32_t rank() const { return blockIdx.x * blockDim.x + threadIdx.x; }
  __device__ int32_t size() const { return gridDim.x * blockDim.x; }
  __device__ void sync() const { cooperative_groups::this_grid().sync(); }
};

}  // namespace sgmim
