// Scratch memory of a kernel.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>

namespace sgmim {
// An array that is aligned to cache lines: where rows are padded to 64 bytes, no vector crosses a line.
template <class T>
class Aligned {
 public:
  // Initialized to zeros.
  explicit Aligned(int64_t count) : storage_(new T[count + LINE]()) {}
  // Uninitialized, for arrays that are written before they are read.
  static Aligned uninitialized(int64_t count) { return {std::unique_ptr<T[]>(new T[count + LINE])}; }

  T* data() { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(storage_.get()) + 63) / 64 * 64); }
  const T* data() const { return const_cast<Aligned*>(this)->data(); }

 private:
  static constexpr int64_t LINE = 64 / sizeof(T);

  Aligned(std::unique_ptr<T[]> storage) : storage_(std::move(storage)) {}

  std::unique_ptr<T[]> storage_;
};
}  // namespace sgmim
