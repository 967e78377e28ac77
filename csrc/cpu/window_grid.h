// The token grid of one call of window_attention, and its division into tasks. Included before foreach_isa.h, outside
// of any instruction set: functions that are defined once must not be compiled for one that the machine may lack.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/aligned.h"

namespace sgmim {
constexpr int64_t QUERIES = 48;  // queries of a block of logits, whole vectors in every instruction set
constexpr float LOG2E = 1.44269504f;

struct WindowGrid {
  int64_t batch, height, width;                             // of the token grid
  int64_t window_h, window_w, shift_h, shift_w;             // in tokens; shift: that of Swin's cyclic shift
  int64_t heads, head_width;
  const float* logit_scale;                                 // (heads,) factors of the cosines; null: dot products
  const float* bias;                                        // dense bias, see `bias_at`, or null
  int64_t padded_tokens;                                    // tokens of a window, padded for the widest vectors

  int64_t tokens() const { return window_h * window_w; }
  int64_t channels() const { return heads * head_width; }
  int64_t down() const { return (height + window_h - 1) / window_h; }
  int64_t across() const { return (width + window_w - 1) / window_w; }
  // Offset into the dense bias of one head and key, for the block of queries [first, first + QUERIES). The blocks of a
  // head follow each other, each stored as (keys, queries), so that a block is read sequentially. The last is narrower.
  int64_t bias_at(int64_t head, int64_t first, int64_t key) const {
    return (head * padded_tokens + first) * tokens() + key * bias_row(first);
  }
  int64_t bias_row(int64_t first) const { return padded_tokens - first < QUERIES ? padded_tokens - first : QUERIES; }
  int64_t windows() const { return batch * down() * across(); }

  // Computes the grid row of each token of a window, -1 for padding, and its group: tokens of different groups are in
  // one window only because of the cyclic shift, and are masked from each other. Returns whether there is more than 1.
  bool locate(int64_t window, int64_t* rows, int64_t* group) const {
    const int64_t column = window % across(), row = window / across() % down();
    const int64_t first = window / (across() * down()) * height * width;
    const bool low = shift_h > 0 && row == down() - 1, right = shift_w > 0 && column == across() - 1;
    for (int64_t r = 0; r < window_h; ++r)
      for (int64_t c = 0; c < window_w; ++c) {
        const int64_t i = row * window_h + r, j = column * window_w + c, t = r * window_w + c;
        const bool inside = i < height && j < width;
        int64_t y = i + shift_h, x = j + shift_w;
        if (y >= height) y %= height;  // behind a branch: a division takes as long as the rest of the loop body
        if (x >= width) x %= width;
        rows[t] = inside ? first + y * width + x : -1;
        group[t] = (low && r >= window_h - shift_h) + 2 * (right && c >= window_w - shift_w);
      }
    return low || right;
  }
};

// Division of a call into tasks: a task is a group of adjacent heads in a block of adjacent windows.
struct WindowTasks {
  int64_t heads, windows, groups, blocks;

  // Tasks of the forward: one window with all its heads, or with a part of them where there are fewer than 64 windows.
  explicit WindowTasks(const WindowGrid& grid)
      : heads(grid.heads), windows(grid.windows()),
        groups(std::clamp<int64_t>(64 / std::max<int64_t>(windows, 1), 1, heads)), blocks(windows) {}

  // Tasks of the backward. A group has at most four heads, and no more than fit L2 from window to window with their
  // biases and the sums of them, `bytes` per head. There are at most `most` blocks, each of at least eight windows.
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

// Gradients that the backward sums over the windows of one block.
struct WindowSums {
  float* bias;         // in the layout of WindowGrid::bias, or null
  float* pad;          // (3 * channels,) or null
  float* logit_scale;  // (heads,) or null
  double* qkv;         // (3 * channels,), over all tokens, including padding tokens, or null
};
}  // namespace sgmim
