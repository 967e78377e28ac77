// The tokens of a masked stem, each row of the result written once: the visible patches' embeddings, normalised where
// the stem has a LayerNorm, and the mask token everywhere else; and back, each row of the gradient read once. The
// bodies of csrc/cuda/masked_patch_embed.cu.
//
// Groups of three sizes: a row is shared by a small one, of which nothing but rank(), size() and sum() is asked,
// several of those make a block, and the blocks a launch.
#pragma once

#include <cmath>

#include "group.h"
#include "inverse.h"

namespace sgmim {

// Elements of type T; the pointers of the norm are null where there is none.
template <class T>
struct Tokens {
  const T* embedded;           // (count, width); the backward without a norm does without
  const int64_t* visible;      // (count,) rows of the tokens, in any order
  int64_t* inverse;            // (rows,) memory to work in
  const float *weight, *bias;  // (width,) of the norm
  float* statistics;           // (2, count): mean and 1 / standard deviation
  int64_t count, rows;
  int32_t width;
  float eps;
};

// Which of the groups of one size this is.
struct Turn {
  int64_t number, of;
};

// body(d): every thread's share of `width` neighbours, MANY at a time from the d-th on.
template <int32_t MANY, class Group, class Body>
SGMIM_HOST_DEVICE void each_few(const Group& group, int32_t width, const Body& body) {
  for (int32_t d = group.rank() * MANY; d < width; d += group.size() * MANY) body(d);
}

// The norm of one row, and its statistics at `place`.
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

// out (rows, width); token (width,).
template <int32_t MANY, class Group, class Launch, class T>
SGMIM_HOST_DEVICE void place_tokens(
    const Group& group, const Turn& turn, const Launch& launch, const Tokens<T>& t, const float* token, T* out) {
  using Row = Few<T, MANY>;
  invert(launch, t.visible, t.count, t.rows, t.inverse);
  launch.sync();
  for (int64_t row = turn.number; row < t.rows; row += turn.of) {
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

// The sums over rows: of the gradients of the mask token, the norm's weight and bias, and of dembedded.
constexpr int32_t SUMS = 4;
constexpr int64_t MOST_PARTS = 512;  // each a block's work; with more of them adding up the parts takes longer
constexpr int32_t COLUMNS = 32, PHASES = 8;

SGMIM_HOST_DEVICE int64_t rows_per_part(int64_t rows) {
  return rows > MOST_PARTS ? (rows + MOST_PARTS - 1) / MOST_PARTS : 1;
}
SGMIM_HOST_DEVICE int64_t parts_of(int64_t rows) { return (rows + rows_per_part(rows) - 1) / rows_per_part(rows); }

// Floats of a block's memory: sums of each of its groups, and of the last step.
SGMIM_HOST_DEVICE int64_t place_memory(int32_t width, int32_t groups) {
  const int64_t sums = int64_t{groups} * SUMS * width;
  return sums > COLUMNS * PHASES ? sums : COLUMNS * PHASES;
}

// One row's share of the sums and, if it is visible, its row of dembedded. sums (SUMS, width), of which each thread
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

// 1. What a block has of the sums over the rows of a part, in partials[part]; and the rows of dembedded. Every group
// sums rows of its own, in its place of `memory`.
template <int32_t MANY, class Group, class Block, class T>
SGMIM_HOST_DEVICE void sum_part(
    const Group& group, const Turn& in_block, const Block& block, int64_t part, const Tokens<T>& t, const T* dout,
    T* dembedded, float* partials, float* memory) {
  const int64_t all = int64_t{SUMS} * t.width, per_part = rows_per_part(t.rows);
  float* const mine = memory + in_block.number * all;
  for (int32_t i = 0; i < SUMS; ++i)
    each_few<MANY>(group, t.width, [&](int32_t d) {
      SGMIM_UNROLL
      for (int32_t j = 0; j < MANY; ++j) mine[i * t.width + d + j] = 0;
    });
  const int64_t end = (part + 1) * per_part < t.rows ? (part + 1) * per_part : t.rows;
  for (int64_t row = part * per_part + in_block.number; row < end; row += in_block.of)
    sum_row<MANY>(group, t, dout + row * t.width, find(t.visible, t.count, t.inverse, row), dembedded, mine);
  block.sync();
  for (int64_t i = block.rank(); i < all; i += block.size()) {
    float total = 0;
    for (int64_t other = 0; other < in_block.of; ++other) total += memory[other * all + i];
    partials[part * all + i] = total;
  }
  block.sync();
}

// 2. COLUMNS of the sums from `first` on, over all parts: every PHASES-th part by one thread, then the phases.
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

// dout (rows, width), dembedded (count, width), sums (SUMS, width); partials (parts_of(rows), SUMS, width) is memory to
// work in. `memory` is the block's. What is added to what depends on the shape and on the number of groups in a block
// alone.
template <int32_t MANY, class Group, class Block, class Launch, class T>
SGMIM_HOST_DEVICE void place_tokens_backward(
    const Group& group, const Turn& in_block, const Block& block, const Turn& turn, const Launch& launch,
    const Tokens<T>& t, const T* dout, T* dembedded, float* partials, float* sums, float* memory) {
  invert(launch, t.visible, t.count, t.rows, t.inverse);
  launch.sync();
  const int64_t parts = parts_of(t.rows), all = int64_t{SUMS} * t.width;
  for (int64_t part = turn.number; part < parts; part += turn.of)
    sum_part<MANY>(group, in_block, block, part, t, dout, dembedded, partials, memory);
  launch.sync();
  for (int64_t first = turn.number * COLUMNS; first < all; first += turn.of * COLUMNS)
    add_parts(block, first, all, parts, partials, sums, memory);
}

}  // namespace sgmim
