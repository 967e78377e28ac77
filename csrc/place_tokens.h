// Tokens of a masked stem: the embeddings of the visible patches, normalised if the stem has a LayerNorm, and the mask
// token everywhere else. Each row of the result is written once; the backward reads each row of the gradient once.
// Device functions of csrc/cuda/masked_patch_embed.cu.
//
// There are groups of three sizes: a small one per row, which needs rank(), size() and sum() alone; a block of several
// such groups; and the launch, which is all blocks.
#pragma once

#include <cmath>

#include "group.h"
#include "inverse.h"

namespace sgmim {

// Arguments of both passes; the pointers of the norm are null if there is none.
template <class T>
struct Tokens {
  const T* embedded;           // (count, width); not read by a backward without a norm
  const int64_t* visible;      // (count,): rows of the visible tokens, in any order
  int64_t* inverse;            // (rows,): workspace
  const float *weight, *bias;  // (width,): of the norm
  float* statistics;           // (2, count): mean and 1 / standard deviation
  int64_t count, rows;
  int32_t width;
  float eps;
};

// Index of a group among the groups of its size, and their number.
struct GroupIndex {
  int64_t index, count;
};

// Calls body(d) for this thread's share of `width` adjacent elements, in steps of MANY elements from d on.
template <int32_t MANY, class Group, class Body>
SGMIM_HOST_DEVICE void each_few(const Group& group, int32_t width, const Body& body) {
  for (int32_t d = group.rank() * MANY; d < width; d += group.size() * MANY) body(d);
}

// Normalises row `place` of the embeddings into `to`, and stores its statistics.
template <int32_t MANY, class Group, class T>
SGMIM_HOST_DEVICE void normalise_row(const Group& group, const Tokens<T>& t, int64_t place, T* to) {
  using Row = Few<T, MANY>;
  const T* const from = t.embedded + place * t.width;
  float sum = 0, squares = 0;
  each_few<MANY>(group, t.width, [&](int32_t d) {
    const Row x = Row::load(from + d);
    SGMIM_UNROLL
    for (int32_t i = 0; i < MANY; ++i) sum += static_cast<float>(x.values[i]);
  });
  const float mean = static_cast<float>(group.sum(sum) / t.width);
  each_few<MANY>(group, t.width, [&](int32_t d) {
    const Row x = Row::load(from + d);
    SGMIM_UNROLL
    for (int32_t i = 0; i < MANY; ++i) {
      const float difference = static_cast<float>(x.values[i]) - mean;
      squares += difference * difference;
    }
  });
  const float rstd = 1 / sqrtf(static_cast<float>(group.sum(squares) / t.width) + t.eps);
  each_few<MANY>(group, t.width, [&](int32_t d) {
    Row x = Row::load(from + d);
    SGMIM_UNROLL
    for (int32_t i = 0; i < MANY; ++i) {
      const float xhat = (static_cast<float>(x.values[i]) - mean) * rstd;
      x.values[i] = static_cast<T>(xhat * t.weight[d + i] + t.bias[d + i]);
    }
    x.store(to + d);
  });
  if (group.rank() == 0) {
    t.statistics[place] = mean;
    t.statistics[t.count + place] = rstd;
  }
}

// Forward. out: (rows, width); token: (width,).
template <int32_t MANY, class Group, class Launch, class T>
SGMIM_HOST_DEVICE void place_tokens(
    const Group& group, const GroupIndex& in_launch, const Launch& launch, const Tokens<T>& t, const float* token,
    T* out) {
  using Row = Few<T, MANY>;
  invert(launch, t.visible, t.count, t.rows, t.inverse);
  launch.sync();
  for (int64_t row = in_launch.index; row < t.rows; row += in_launch.count) {
    const int64_t place = find(t.visible, t.count, t.inverse, row);
    T* const to = out + row * t.width;
    if (place < 0) {
      each_few<MANY>(group, t.width, [&](int32_t d) {
        Row y;
        SGMIM_UNROLL
        for (int32_t i = 0; i < MANY; ++i) y.values[i] = static_cast<T>(token[d + i]);
        y.store(to + d);
      });
      continue;
    }
    const T* const from = t.embedded + place * t.width;
    if (!t.weight) {
      each_few<MANY>(group, t.width, [&](int32_t d) { Row::load(from + d).store(to + d); });
      continue;
    }
    normalise_row<MANY>(group, t, place, to);
  }
}

// Column sums of the backward: gradients of the mask token, norm weight and norm bias, and the sums of dembedded.
constexpr int32_t SUMS = 4;
constexpr int64_t MOST_PARTS = 512;  // parts of the rows, one per block; more parts take longer to add up
constexpr int32_t COLUMNS = 32, PHASES = 8;

SGMIM_HOST_DEVICE int64_t rows_per_part(int64_t rows) {
  return rows > MOST_PARTS ? (rows + MOST_PARTS - 1) / MOST_PARTS : 1;
}
SGMIM_HOST_DEVICE int64_t parts_of(int64_t rows) { return (rows + rows_per_part(rows) - 1) / rows_per_part(rows); }

// Floats of a block's memory: the sums of each of its groups, or the partial sums of add_parts.
SGMIM_HOST_DEVICE int64_t place_memory(int32_t width, int32_t groups) {
  const int64_t sums = int64_t{groups} * SUMS * width;
  return sums > COLUMNS * PHASES ? sums : COLUMNS * PHASES;
}

// Adds one row's terms to sums, (SUMS, width), and, if the row is visible, computes its row of dembedded. Each thread
// adds to columns of its own.
template <int32_t MANY, class Group, class T>
SGMIM_HOST_DEVICE void sum_row(
    const Group& group, const Tokens<T>& t, const T* dout, int64_t place, T* dembedded, float* sums) {
  using Row = Few<T, MANY>;
  if (place < 0 || !t.weight) {
    float* const total = sums + (place < 0 ? 0 : 3 * t.width);
    each_few<MANY>(group, t.width, [&](int32_t d) {
      const Row dy = Row::load(dout + d);
      if (place >= 0) dy.store(dembedded + place * t.width + d);
      SGMIM_UNROLL
      for (int32_t i = 0; i < MANY; ++i) total[d + i] += static_cast<float>(dy.values[i]);
    });
    return;
  }
  const T* const embedded = t.embedded + place * t.width;
  const float mean = t.statistics[place], rstd = t.statistics[t.count + place];
  float first = 0, second = 0;
  each_few<MANY>(group, t.width, [&](int32_t d) {
    const Row dy = Row::load(dout + d), x = Row::load(embedded + d);
    SGMIM_UNROLL
    for (int32_t i = 0; i < MANY; ++i) {
      const float y = static_cast<float>(dy.values[i]), xhat = (static_cast<float>(x.values[i]) - mean) * rstd;
      first += y * t.weight[d + i];
      second += y * t.weight[d + i] * xhat;
      sums[t.width + d + i] += y * xhat;
      sums[2 * t.width + d + i] += y;
    }
  });
  first = static_cast<float>(group.sum(first) / t.width);
  second = static_cast<float>(group.sum(second) / t.width);
  each_few<MANY>(group, t.width, [&](int32_t d) {
    const Row dy = Row::load(dout + d), x = Row::load(embedded + d);
    Row dx;
    SGMIM_UNROLL
    for (int32_t i = 0; i < MANY; ++i) {
      const float xhat = (static_cast<float>(x.values[i]) - mean) * rstd;
      const float value = (static_cast<float>(dy.values[i]) * t.weight[d + i] - first - xhat * second) * rstd;
      sums[3 * t.width + d + i] += value;
      dx.values[i] = static_cast<T>(value);
    }
    dx.store(dembedded + place * t.width + d);
  });
}

// Step 1: a block sums over the rows of one part into partials[part], and computes their rows of dembedded. Each group
// of the block sums rows of its own, in its part of `memory`.
template <int32_t MANY, class Group, class Block, class T>
SGMIM_HOST_DEVICE void sum_part(
    const Group& group, const GroupIndex& in_block, const Block& block, int64_t part, const Tokens<T>& t, const T* dout,
    T* dembedded, float* partials, float* memory) {
  const int64_t all = int64_t{SUMS} * t.width, per_part = rows_per_part(t.rows);
  float* const mine = memory + in_block.index * all;
  for (int32_t i = 0; i < SUMS; ++i)
    each_few<MANY>(group, t.width, [&](int32_t d) {
      SGMIM_UNROLL
      for (int32_t j = 0; j < MANY; ++j) mine[i * t.width + d + j] = 0;
    });
  const int64_t end = (part + 1) * per_part < t.rows ? (part + 1) * per_part : t.rows;
  for (int64_t row = part * per_part + in_block.index; row < end; row += in_block.count)
    sum_row<MANY>(group, t, dout + row * t.width, find(t.visible, t.count, t.inverse, row), dembedded, mine);
  block.sync();
  for (int64_t i = block.rank(); i < all; i += block.size()) {
    float total = 0;
    for (int64_t other = 0; other < in_block.count; ++other) total += memory[other * all + i];
    partials[part * all + i] = total;
  }
  block.sync();
}

// Step 2: a block sums COLUMNS columns from `first` on over all parts. Per column each of PHASES threads sums every
// PHASES-th part; then their results are added.
template <class Block>
SGMIM_HOST_DEVICE void add_parts(
    const Block& block, int64_t first, int64_t all, int64_t parts, const float* partials, float* sums, float* memory) {
  for (int32_t i = block.rank(); i < COLUMNS * PHASES; i += block.size()) {
    const int64_t column = first + i % COLUMNS;
    double total = 0;
    SGMIM_UNROLL_BY(8)
    for (int64_t part = i / COLUMNS; part < parts; part += PHASES)
      total += column < all ? partials[part * all + column] : 0;
    memory[i] = static_cast<float>(total);
  }
  block.sync();
  for (int32_t i = block.rank(); i < COLUMNS && first + i < all; i += block.size()) {
    double total = 0;
    for (int32_t phase = 0; phase < PHASES; ++phase) total += memory[phase * COLUMNS + i];
    sums[first + i] = static_cast<float>(total);
  }
  block.sync();
}

// Backward. dout: (rows, width); dembedded: (count, width); sums: (SUMS, width); partials: (parts_of(rows), SUMS,
// width), workspace; memory: of the block. The order of summation depends on the shape and on the number of groups in a
// block alone.
template <int32_t MANY, class Group, class Block, class Launch, class T>
SGMIM_HOST_DEVICE void place_tokens_backward(
    const Group& group, const GroupIndex& in_block, const Block& block, const GroupIndex& in_launch,
    const Launch& launch, const Tokens<T>& t, const T* dout, T* dembedded, float* partials, float* sums,
    float* memory) {
  invert(launch, t.visible, t.count, t.rows, t.inverse);
  launch.sync();
  const int64_t parts = parts_of(t.rows), all = int64_t{SUMS} * t.width;
  for (int64_t part = in_launch.index; part < parts; part += in_launch.count)
    sum_part<MANY>(group, in_block, block, part, t, dout, dembedded, partials, memory);
  launch.sync();
  for (int64_t first = in_launch.index * COLUMNS; first < all; first += in_launch.count * COLUMNS)
    add_parts(block, first, all, parts, partials, sums, memory);
}

}  // namespace sgmim
