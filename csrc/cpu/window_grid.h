// The grid of one call of window_attention. Included before foreach_isa.h, outside any instruction set, since what is
// defined once must not be compiled for a set that the machine may lack.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/aligned.h"

namespace sgmim {
constexpr int64_t QUERIES = 48;  // columns of logits at a time, whole vectors of any instruction set
constexpr float LOG2E = 1.44269504f;

struct WindowGrid {
  int64_t batch, height, width;                             // of the token grid
  int64_t window_h, window_w, shift_h, shift_w;             // shift: tokens that the windows are moved by
  int64_t heads, head_width;
  const float* logit_scale;                                 // (heads,) factors of the cosines, or null: dot products
  const float* bias;                                        // see `bias_at`, or null
  int64_t padded_tokens;                                    // tokens of a window, padded for the widest vectors

  int64_t tokens() const { return window_h * window_w; }
  int64_t channels() const { return heads * head_width; }
  int64_t down() const { return (height + window_h - 1) / window_h; }
  int64_t across() const { return (width + window_w - 1) / window_w; }
  // Where a head has the bias of a key and of a block's queries [first, first + QUERIES) side by side: the blocks one
  // after the other, each (keys, queries), so that what goes through one reads lines in a row. The last is narrower.
  int64_t bias_at(int64_t head, int64_t first, int64_t key) const {
    return (head * padded_tokens + first) * tokens() + key * bias_row(first);
  }
  int64_t bias_row(int64_t first) const { return padded_tokens - first < QUERIES ? padded_tokens - first : QUERIES; }
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
        int64_t y = i + shift_h, x = j + shift_w;
        if (y >= height) y %= height;  // seldom: a division takes as long as all the rest
        if (x >= width) x %= width;
        rows[t] = inside ? first + y * width + x : -1;
        group[t] = (low && r >= window_h - shift_h) + 2 * (right && c >= window_w - shift_w);
      }
    return low || right;
  }
};

// Who does what: groups of heads times blocks of windows, each a task.
struct WindowTasks {
  int64_t heads, windows, groups, blocks;

  // Of the forward: single windows, whose heads lie side by side, or parts of them where there are few.
  explicit WindowTasks(const WindowGrid& grid)
      : heads(grid.heads), windows(grid.windows()),
        groups(std::clamp<int64_t>(64 / std::max<int64_t>(windows, 1), 1, heads)), blocks(windows) {}

  // Of the backward: up to four heads that lie side by side, but no more than so many whose biases and their sums,
  // `bytes` each, stay in L2 from window to window; and at most `most` blocks, of eight windows at least.
  WindowTasks(const WindowGrid& grid, int64_t bytes, int64_t most) : heads(grid.heads), windows(grid.windows()) {
    const int64_t together = std::clamp<int64_t>((int64_t{384} << 10) / std::max<int64_t>(bytes, 1), 1, 4);
    groups = (heads + together - 1) / together;
    blocks = std::clamp<int64_t>(64 / groups, 1, std::max<int64_t>(std::min(windows / 8, most), 1));
  }

  int64_t count() const { return groups * blocks; }
  int64_t block(int64_t task) const { return task % blocks; }
  int64_t first_head(int64_t task) const { return task / blocks * heads / groups; }
  int64_t last_head(int64_t task) const { return (task / blocks + 1) * heads / groups; }
  int64_t first_window(int64_t task) const { return block(task) * windows / blocks; }
  int64_t last_window(int64_t task) const { return (block(task) + 1) * windows / blocks; }
};

// What the backward sums over windows, for one block of them.
struct WindowSums {
  float* bias;         // as WindowGrid's, or null
  float* pad;          // (3 * channels) or null
  float* logit_scale;  // (heads,) or null
  double* qkv;         // (3 * channels), of all tokens and those outside the grid, or null
};
}  // namespace sgmim
