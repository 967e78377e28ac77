// A group of host threads, with the interface of csrc/group.h. A group of one runs in the calling thread. In larger
// ones a missing barrier shows in the results, and the thread sanitizer detects it (cuda_races.cpp).
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "group.h"

class HostGroup {
 public:
  struct Shared {
    explicit Shared(int32_t size) : size(size), values(size) { pthread_barrier_init(&barrier, nullptr, size); }
    ~Shared() { pthread_barrier_destroy(&barrier); }
    int32_t size;
    pthread_barrier_t barrier;
    std::vector<std::atomic<uint64_t>> values;
    std::atomic<int32_t> arrived{0}, round{0};
  };

  HostGroup(Shared& shared, int32_t rank) : shared_(shared), rank_(rank) {}
  int32_t rank() const { return rank_; }
  int32_t size() const { return shared_.size; }
  void sync() const {
    if (shared_.size > 1) pthread_barrier_wait(&shared_.barrier);
  }
  uint32_t scan(uint32_t value, uint32_t& total) const {
    uint32_t before = 0;
    total = 0;
    exchange(value, [&](int32_t rank, uint64_t other) {
      before += rank < rank_ ? static_cast<uint32_t>(other) : 0;
      total += static_cast<uint32_t>(other);
    });
    return before;
  }
  double sum(double value) const {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    double total = 0;
    exchange(bits, [&](int32_t, uint64_t other) {
      double part;
      std::memcpy(&part, &other, sizeof part);
      total += part;
    });
    return total;
  }
  // The gemm that csrc/attend.h needs.
  template <bool ta, bool tb, class T>
  void gemm(
      const T* a, int32_t la, const T* b, int32_t lb, float* c, int32_t lc, int32_t m, int32_t n, int32_t k) const {
    for (int32_t i = rank_; i < m * n; i += shared_.size) {
      const int32_t row = i / n, column = i % n;
      float total = c[row * lc + column];
      for (int32_t j = 0; j < k; ++j)
        total += static_cast<float>(ta ? a[j * la + row] : a[row * la + j]) *
                 static_cast<float>(tb ? b[column * lb + j] : b[j * lb + column]);
      c[row * lc + column] = total;
    }
  }
  void add(uint32_t* counter, uint32_t n) const { __atomic_fetch_add(counter, n, __ATOMIC_RELAXED); }

 private:
  // A warp's shuffles order no other memory. With the sanitizer the exchange therefore uses relaxed atomics, so that
  // code which relies on such an order is reported as a race.
#ifdef __SANITIZE_THREAD__
  static constexpr std::memory_order ORDER = std::memory_order_relaxed;
#else
  static constexpr std::memory_order ORDER = std::memory_order_seq_cst;
#endif

  template <class Use>
  void exchange(uint64_t value, const Use& use) const {
    shared_.values[rank_].store(value, ORDER);
    wait();
    for (int32_t rank = 0; rank < shared_.size; ++rank) use(rank, shared_.values[rank].load(ORDER));
    wait();
  }
  void wait() const {
    const int32_t round = shared_.round.load(ORDER);
    if (shared_.arrived.fetch_add(1, ORDER) + 1 == shared_.size) {
      shared_.arrived.store(0, ORDER);
      shared_.round.fetch_add(1, ORDER);
    } else {
      while (shared_.round.load(ORDER) == round) std::this_thread::yield();
    }
  }

  Shared& shared_;
  int32_t rank_;
};

// Calls body(group) in every thread of a group.
template <class Body>
void run_group(int32_t size, const Body& body) {
  HostGroup::Shared shared(size);
  std::vector<std::thread> others;
  for (int32_t rank = 1; rank < size; ++rank) others.emplace_back([&, rank] { body(HostGroup(shared, rank)); });
  body(HostGroup(shared, 0));
  for (std::thread& other : others) other.join();
}

// A thread of a launch: its warp, block and launch, the index of the warp in the block, and the index of the block.
struct HostThread {
  HostGroup warp, block, launch;
  int32_t warp_number, block_number;
};

// Calls body(thread) in every thread of `blocks` blocks of `warps` warps of `lanes` threads.
template <class Body>
void run_launch(int32_t blocks, int32_t warps, int32_t lanes, const Body& body) {
  HostGroup::Shared launch(blocks * warps * lanes);
  std::vector<std::thread> threads;
  for (int32_t number = 0; number < blocks; ++number)
    threads.emplace_back([&, number] {
      std::vector<std::unique_ptr<HostGroup::Shared>> shared(warps);
      for (auto& each : shared) each = std::make_unique<HostGroup::Shared>(lanes);
      run_group(warps * lanes, [&](const HostGroup& block) {
        const int32_t warp = block.rank() / lanes;
        body(HostThread{
            HostGroup(*shared[warp], block.rank() % lanes), block,
            HostGroup(launch, number * warps * lanes + block.rank()), warp, number});
      });
    });
  for (std::thread& thread : threads) thread.join();
}
