// Host threads as a group: csrc/group.h says what one promises. A group of one needs no thread of its own; larger ones
// show what a missing barrier does, and the thread sanitizer finds it (cuda_races.cpp).
#pragma once

#include <pthread.h>

#include <thread>
#include <vector>

#include "group.h"

class HostGroup {
 public:
  struct Shared {
    explicit Shared(int32_t size) : size(size), sums(size), counts(size) { pthread_barrier_init(&barrier, nullptr, size); }
    ~Shared() { pthread_barrier_destroy(&barrier); }
    int32_t size;
    pthread_barrier_t barrier;
    std::vector<double> sums;
    std::vector<uint32_t> counts;
  };

  HostGroup(Shared& shared, int32_t rank) : shared_(shared), rank_(rank) {}
  int32_t rank() const { return rank_; }
  int32_t size() const { return shared_.size; }
  void sync() const {
    if (shared_.size > 1) pthread_barrier_wait(&shared_.barrier);
  }
  uint32_t scan(uint32_t value, uint32_t& total) const {
    shared_.counts[rank_] = value;
    sync();
    uint32_t before = 0;
    total = 0;
    for (int32_t r = 0; r < shared_.size; ++r) {
      before += r < rank_ ? shared_.counts[r] : 0;
      total += shared_.counts[r];
    }
    sync();
    return before;
  }
  double sum(double value) const {
    shared_.sums[rank_] = value;
    sync();
    double total = 0;
    for (double part : shared_.sums) total += part;
    sync();
    return total;
  }
  void add(uint32_t* counter, uint32_t n) const { __atomic_fetch_add(counter, n, __ATOMIC_RELAXED); }

 private:
  Shared& shared_;
  int32_t rank_;
};

// body(group) in every thread of a group.
template <class Body>
void run_group(int32_t size, const Body& body) {
  HostGroup::Shared shared(size);
  std::vector<std::thread> others;
  for (int32_t rank = 1; rank < size; ++rank) others.emplace_back([&, rank] { body(HostGroup(shared, rank)); });
  body(HostGroup(shared, 0));
  for (std::thread& other : others) other.join();
}
