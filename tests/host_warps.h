// A block of warps on the host, with the interface of csrc/attend_window.h. Each thread is a context of its own; one
// host thread runs all of them in turns. A warp runs alone up to the block's next barrier, so that a missing barrier
// shows in the results: the warp reads what others have not written yet, or overwrites what they still need. Tensor
// cores are emulated with the fragment layouts of the PTX ISA, "Matrix Fragments for mma.m16n8k16" and "ldmatrix".
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

class HostBlock;

class HostWarpThread {
 public:
  HostWarpThread(HostBlock& block, int32_t rank) : block_(block), rank_(rank) {}
  int32_t rank() const { return rank_; }
  int32_t size() const;
  int32_t anew(int32_t x) const { return x; }
  void sync() const;
  void sync_warp() const;
  float shuffle_xor(float value, int32_t mask) const {
    float found;
    exchange(value, [&](const auto& of) { found = of(lane() ^ mask); });
    return found;
  }
  template <bool TRANSPOSED>
  void ldmatrix(uint32_t (&f)[4], const void* row) const {
    exchange(static_cast<const uint16_t*>(row), [&](const auto& row_of) {
      for (int32_t m = 0; m < 4; ++m) {
        const int32_t g = lane() / 4, t = lane() % 4;
        uint16_t both[2];
        for (int32_t c = 0; c < 2; ++c)
          both[c] = TRANSPOSED ? row_of(8 * m + 2 * t + c)[g] : row_of(8 * m + g)[2 * t + c];
        std::memcpy(&f[m], both, sizeof both);
      }
    });
  }
  template <class T>
  void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    struct Operands {
      T a[8], b[4];
    } own;
    std::memcpy(own.a, a, sizeof own.a);
    std::memcpy(own.b, &b0, sizeof b0);
    std::memcpy(own.b + 2, &b1, sizeof b1);
    exchange(own, [&](const auto& of) {
      for (int32_t i = 0; i < 4; ++i) {
        const int32_t row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        for (int32_t k = 0; k < 16; ++k) {  // a_i: row g, or g + 8 if i is 2, 3, 6, 7; columns 2 t, and + 8 from a_4
          const T left = of(row % 8 * 4 + k % 8 / 2).a[k / 8 * 4 + row / 8 * 2 + k % 2];
          const T right = of(column * 4 + k % 8 / 2).b[k / 8 * 2 + k % 2];
          c[i] += static_cast<float>(left) * static_cast<float>(right);
        }
      }
    });
  }
  template <class T>
  uint32_t pack(float x, float y) const {
    const T both[2] = {static_cast<T>(x), static_cast<T>(y)};
    uint32_t bits;
    std::memcpy(&bits, both, sizeof bits);
    return bits;
  }
  float exp2(float x) const { return std::exp2(x); }
  float reciprocal(float x) const { return 1 / x; }
  void copy_async(void* to, const void* from, bool there) const;
  void wait_copies() const;

 private:
  // Calls use(of), where of(lane) returns the value of a lane of this warp.
  template <class Value, class Use>
  void exchange(const Value& value, const Use& use) const;

  int32_t lane() const { return rank_ % 32; }

  HostBlock& block_;
  int32_t rank_;
};

class HostBlock {
 public:
  explicit HostBlock(int32_t warps) : threads_(32 * warps), warps_(warps), values_(32 * warps) {}

  // Calls body(thread) in every thread; backwards: the threads run in reverse order.
  void run(const std::function<void(const HostWarpThread&)>& body, bool backwards) {
    body_ = &body;
    step_ = backwards ? size() - 1 : 1;
    running_ = size();
    for (int32_t rank = 0; rank < size(); ++rank) {
      Thread& thread = threads_[rank];
      thread.stack = std::make_unique<char[]>(STACK);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = STACK;
      thread.context.uc_link = nullptr;
      const uint64_t self = reinterpret_cast<uintptr_t>(this);
      makecontext(
          &thread.context, reinterpret_cast<void (*)()>(&HostBlock::enter), 3, static_cast<uint32_t>(self >> 32),
          static_cast<uint32_t>(self), rank);
    }
    now_ = backwards ? size() - 1 : 0;
    swapcontext(&outside_, &threads_[now_].context);
  }

 private:
  friend class HostWarpThread;
  static constexpr size_t STACK = 256 << 10;

  struct Copy {
    void* to;
    const void* from;
  };
  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::vector<Copy> copies;
    bool done = false;
  };
  struct Barrier {
    int32_t arrived = 0, round = 0;
  };

  int32_t size() const { return static_cast<int32_t>(threads_.size()); }

  static void enter(uint32_t high, uint32_t low, int32_t rank) {
    HostBlock& block = *reinterpret_cast<HostBlock*>(static_cast<uintptr_t>(uint64_t{high} << 32 | low));
    (*block.body_)(HostWarpThread(block, rank));
    block.threads_[rank].done = true;
    if (--block.running_ == 0) setcontext(&block.outside_);
    block.yield(false);
  }

  // Switches to the next thread of the warp, or of the block.
  void yield(bool of_warp) {
    const int32_t from = now_;
    do now_ = of_warp ? now_ / 32 * 32 + (now_ + step_) % 32 : (now_ + step_) % size();
    while (threads_[now_].done);
    if (now_ != from) swapcontext(&threads_[from].context, &threads_[now_].context);
  }

  void arrive(Barrier& barrier, int32_t count, bool of_warp) {
    const int32_t round = barrier.round;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.round;
    }
    while (barrier.round == round) yield(of_warp);
  }

  std::vector<Thread> threads_;
  std::vector<Barrier> warps_;
  std::vector<const void*> values_;
  Barrier all_;
  const std::function<void(const HostWarpThread&)>* body_ = nullptr;
  ucontext_t outside_;
  int32_t now_ = 0, step_ = 1, running_ = 0;
};

inline int32_t HostWarpThread::size() const { return block_.size(); }
inline void HostWarpThread::sync() const { block_.arrive(block_.all_, block_.size(), false); }
inline void HostWarpThread::sync_warp() const { block_.arrive(block_.warps_[rank_ / 32], 32, true); }

template <class Value, class Use>
void HostWarpThread::exchange(const Value& value, const Use& use) const {
  block_.values_[rank_] = &value;
  sync_warp();
  use([&](int32_t lane) -> const Value& {
    return *static_cast<const Value*>(block_.values_[rank_ / 32 * 32 + lane]);
  });
  sync_warp();
}

inline void HostWarpThread::copy_async(void* to, const void* from, bool there) const {
  block_.threads_[rank_].copies.push_back({to, there ? from : nullptr});
}

// Copies take effect here, so that reading the target before wait() shows.
inline void HostWarpThread::wait_copies() const {
  for (const HostBlock::Copy& copy : block_.threads_[rank_].copies)
    if (copy.from != nullptr)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  block_.threads_[rank_].copies.clear();
}
