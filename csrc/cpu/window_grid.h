// The grid of one call of window_attention. Included before foreach_isa.h, outside any instruction set, since what is
// defined once must not be compiled for a set that the machine may lack.
#pragma once

#include <cstdint>
#include <vector>

namespace sgmim {
// Zeroed numbers that begin at a cache line: a vector of 64 bytes then lies in one, where its row is padded to it.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : storage_(count + 64 / sizeof(T)) {}
  T* data() { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(storage_.data()) + 63) / 64 * 64); }

 private:
  std::vector<T> storage_;
};

struct WindowGrid {
  int64_t batch, height, width;                             // of the token grid
  int64_t window_h, window_w, shift_h, shift_w;             // shift: tokens that the windows are moved by
  int64_t heads, head_width;
  const float* logit_scale;                                 // (heads,) factors of the cosines, or null: dot products
  const float* bias;                                        // (heads, keys, padded queries), or null
  int64_t padded_tokens;                                    // tokens of a window, padded for the widest vectors

  int64_t tokens() const { return window_h * window_w; }
  int64_t channels() const { return heads * head_width; }
  int64_t down() const { return (height + window_h - 1) / window_h; }
  int64_t across() const { return (width + window_w - 1) / window_w; }
  int64_t windows() const { return batch * down() * across(); }

  // Rows of the grid that the tokens of a window are, -1 for padding; and the group of each: tokens of different
  // groups are not neighbours, the cyclic shift has brought them together. Returns whether there are several groups.
  bool locate(int64_t window, int64_t* rows, int64_t* group) const {
    const int64_t column = window % across(), row = window / across() % down();
    const int64_t first = window / (across() * down()) * height * width;
    const bool low = shift_h > 0 && row == down() - 1, right = shift_w > 0 && column == across() - 1;
    for (int64_t r = 0; r < window_h; ++r)
      for (int64_t c = 0; c < window_w; ++c) {
        const int64_t i = row * window_h + r, j = column * window_w + c, t = r * window_w + c;
        const bool inside = i < height && j < width;
        rows[t] = inside ? first + (i + shift_h) % height * width + (j + shift_w) % width : -1;
        group[t] = (low && r >= window_h - shift_h) + 2 * (right && c >= window_w - shift_w);
      }
    return low || right;
  }
};

// What the backward sums over windows, for one block of them.
struct WindowSums {
  float* bias;         // (heads, keys, padded queries) or null
  float* pad;          // (3 * channels) or null
  float* logit_scale;  // (heads,) or null
};
}  // namespace sgmim
