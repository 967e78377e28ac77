// One tile of a head's predictions and their L1 distance to the pixels they predict, and one of the gradients that
// follow from the signs, by a group of threads that has product(): the bodies of csrc/cuda/linear_l1.cu. The
// predictions live in the group's memory only.
//
// A sign is +1, -1, or 0 where the target does not count or the two are equal, so it takes two bits: a row's signs are
// a plane of bits that say "above" and one that say "below", a quarter of a byte a sign.
#pragma once

#include <cassert>
#include <cmath>

#include "group.h"

namespace sgmim {

constexpr int32_t TILE = 64, DEPTH = 128;  // rows and columns of a tile; channels that are multiplied at a time

// A map (B, S, H, W) read cell by cell, see gather_index.h. valid may be null.
struct Target {
  const float* values;
  const bool* valid;
  int64_t strides[4], valid_strides[4];
  int64_t across, per_image;  // cells
  int32_t cell;
};

// x (rows, width), or (cells, width) with the rows listed in `cells` used; weight (outs, width); bias (outs,); cells
// (count,): numbers of the cells; signs (count, 2, words_of(outs)): of prediction - pixel, 32 to a word, the lowest bit
// first. T: float or a half precision.
template <class T>
struct Head {
  const T *x, *weight;
  const float* bias;
  const int64_t* cells;
  int64_t all_cells;  // that `cells` are numbers of
  Target target;
  uint32_t* signs;
  int64_t count;
  int32_t width, outs;
  bool packed;
  bool wide;  // whether 16 bytes can be read at a time: width a multiple of 8, x and weight begin on 16 bytes
};

template <class T>
SGMIM_HOST_DEVICE int64_t cell_of(const Head<T>& head, int64_t row) {
  const int64_t cell = head.cells[row];
  assert(0 <= cell && cell < head.all_cells && "linear_l1: a row is not the number of a cell");
  return cell;
}

constexpr int32_t BITS = 32;
SGMIM_HOST_DEVICE int64_t words_of(int64_t outs) { return (outs + BITS - 1) / BITS; }

// Elements from row to row of a tile of so many columns, padded against bank conflicts.
template <class T, int32_t COLUMNS>
constexpr int32_t STRIDE = COLUMNS + 16 / sizeof(T);
constexpr int32_t SUM_STRIDE = TILE + 4;

// Bytes of the group's memory, on a boundary of 32: two operands' tiles and the sums; in the backward also the
// columns'.
template <class T>
SGMIM_HOST_DEVICE int64_t l1_memory() {
  return TILE * (2 * STRIDE<T, DEPTH> * sizeof(T) + SUM_STRIDE * sizeof(float));
}
template <class T>
SGMIM_HOST_DEVICE int64_t l1_backward_memory() {
  return 2 * DEPTH * STRIDE<T, TILE> * sizeof(T) + TILE * SUM_STRIDE * sizeof(float) + TILE * sizeof(float);
}

// Columns [begin, begin + COLUMNS) of ROWS rows of a matrix into a tile, zeros outside. row(r): the row's number, -1 if
// there is none.
template <int32_t ROWS, int32_t COLUMNS, class Group, class T, class Row>
SGMIM_HOST_DEVICE void load_tile(
    const Group& group, const T* matrix, int32_t width, bool wide, int32_t begin, const Row& row, T* tile) {
  constexpr int32_t MANY = 16 / sizeof(T);
  if (wide) {
    for (int32_t i = group.rank(); i < ROWS * (COLUMNS / MANY); i += group.size()) {
      const int32_t r = i / (COLUMNS / MANY), k = i % (COLUMNS / MANY) * MANY;
      const int64_t from = begin + k < width ? row(r) : -1;
      Sixteen value{};
      if (from >= 0) value = *reinterpret_cast<const Sixteen*>(matrix + from * width + begin + k);
      *reinterpret_cast<Sixteen*>(tile + r * STRIDE<T, COLUMNS> + k) = value;
    }
  } else {
    for (int32_t i = group.rank(); i < ROWS * COLUMNS; i += group.size()) {
      const int32_t r = i / COLUMNS, k = i % COLUMNS;
      const int64_t from = begin + k < width ? row(r) : -1;
      tile[r * STRIDE<T, COLUMNS> + k] = from >= 0 ? matrix[from * width + begin + k] : static_cast<T>(0.0f);
    }
  }
}

// The signs of ROWS rows from `first_row` and COLUMNS outputs from `first_out`, a multiple of 32, as numbers, zeros
// outside.
template <int32_t ROWS, int32_t COLUMNS, class Group, class T>
SGMIM_HOST_DEVICE void load_signs(
    const Group& group, const Head<T>& head, int64_t first_row, int32_t first_out, T* tile) {
  constexpr int32_t WORDS = COLUMNS / BITS;
  const int64_t words = words_of(head.outs);
  for (int32_t i = group.rank(); i < ROWS * WORDS; i += group.size()) {
    const int64_t row = first_row + i / WORDS, word = first_out / BITS + i % WORDS;
    const bool there = row < head.count && word < words;
    const uint32_t above = there ? head.signs[2 * row * words + word] : 0;
    const uint32_t below = there ? head.signs[(2 * row + 1) * words + word] : 0;
    T* const to = tile + i / WORDS * STRIDE<T, COLUMNS> + i % WORDS * BITS;
    SGMIM_UNROLL_BY(8)
    for (int32_t bit = 0; bit < BITS; ++bit)
      to[bit] = static_cast<T>(static_cast<float>(above >> bit & 1) - static_cast<float>(below >> bit & 1));
  }
}

// The tile of rows [first_row, first_row + TILE) and outputs [first_out, first_out + TILE): writes its signs, returns
// the sum of the distances, the same in every thread.
template <class Group, class T>
SGMIM_HOST_DEVICE double l1_tile(
    const Group& group, const Head<T>& head, int64_t first_row, int32_t first_out, char* memory) {
  T* const left = reinterpret_cast<T*>(memory);
  T* const right = left + TILE * STRIDE<T, DEPTH>;
  float* const sums = reinterpret_cast<float*>(right + TILE * STRIDE<T, DEPTH>);
  const auto x_row = [&](int32_t r) -> int64_t {
    if (first_row + r >= head.count) return -1;
    return head.packed ? first_row + r : cell_of(head, first_row + r);
  };
  const auto weight_row = [&](int32_t r) -> int64_t { return first_out + r < head.outs ? first_out + r : -1; };
  for (int32_t i = group.rank(); i < TILE * SUM_STRIDE; i += group.size()) sums[i] = 0;
  for (int32_t begin = 0; begin < head.width; begin += DEPTH) {
    load_tile<TILE, DEPTH>(group, head.x, head.width, head.wide, begin, x_row, left);
    load_tile<TILE, DEPTH>(group, head.weight, head.width, head.wide, begin, weight_row, right);
    group.sync();
    group.template product<false, true>(
        left, STRIDE<T, DEPTH>, right, STRIDE<T, DEPTH>, sums, SUM_STRIDE, TILE, TILE, DEPTH);
    group.sync();
  }

  const Target& target = head.target;
  const int32_t cell = target.cell, pixels = cell * cell;
  double total = 0;
  for (int32_t i = group.rank(); i < TILE * TILE; i += group.size()) {
    const int64_t row = first_row + i / TILE;
    const int32_t out = first_out + i % TILE;
    float& prediction = sums[i / TILE * SUM_STRIDE + i % TILE];
    if (row >= head.count || out >= head.outs) {
      prediction = 0;
      continue;
    }
    const int64_t number = cell_of(head, row), image = number / target.per_image, inside = number % target.per_image;
    const int64_t y = inside / target.across * cell + out % pixels / cell, x = inside % target.across * cell + out % cell;
    const int64_t channel = out / pixels;
    const auto at = [&](const int64_t* s) { return image * s[0] + channel * s[1] + y * s[2] + x * s[3]; };
    float difference = prediction + head.bias[out] - target.values[at(target.strides)];
    if (target.valid && !target.valid[at(target.valid_strides)]) difference = 0;
    total += fabsf(difference);
    prediction = difference;  // from here on
  }
  group.sync();
  const int64_t words = words_of(head.outs);
  for (int32_t i = group.rank(); i < TILE * 2 * (TILE / BITS); i += group.size()) {
    const int64_t row = first_row + i % TILE;
    const int32_t plane = i / TILE % 2, word = i / (2 * TILE);
    if (row >= head.count || first_out + word * BITS >= head.outs) continue;
    const float* const differences = sums + i % TILE * SUM_STRIDE + word * BITS;
    uint32_t bits = 0;
    SGMIM_UNROLL_BY(8)
    for (int32_t bit = 0; bit < BITS; ++bit)
      bits |= static_cast<uint32_t>(plane ? differences[bit] < 0 : differences[bit] > 0) << bit;
    head.signs[(2 * row + plane) * words + first_out / BITS + word] = bits;
  }
  return group.sum(total);
}

// Where a gradient goes: float32, or the products' type.
template <class T>
struct Gradient {
  void* values;
  bool single;

  SGMIM_HOST_DEVICE void store(int64_t at, float value) const {
    if (single)
      static_cast<float*>(values)[at] = value;
    else
      static_cast<T*>(values)[at] = static_cast<T>(value);
  }
};

// dx like the head's x, dweight (outs, width), dbias (outs,). The signs' products are exact in their operand and get
// the factor, scale times the number behind grad, at the end.
template <class T>
struct HeadGradients {
  Gradient<T> dx, dweight;
  float* dbias;
  const float* grad;
  float scale;
};

// The tile of dx of rows [first_row, first_row + TILE) and columns [first_column, first_column + TILE): signs . weight.
template <class Group, class T>
SGMIM_HOST_DEVICE void l1_input_gradient(
    const Group& group, const Head<T>& head, const HeadGradients<T>& to, int64_t first_row, int32_t first_column,
    char* memory) {
  T* const left = reinterpret_cast<T*>(memory);  // room for rows of DEPTH: TILE of those are less than DEPTH of TILE
  T* const right = left + DEPTH * STRIDE<T, TILE>;
  float* const sums = reinterpret_cast<float*>(right + DEPTH * STRIDE<T, TILE>);
  for (int32_t i = group.rank(); i < TILE * SUM_STRIDE; i += group.size()) sums[i] = 0;
  for (int32_t begin = 0; begin < head.outs; begin += DEPTH) {
    const auto weight_row = [&](int32_t r) -> int64_t { return begin + r < head.outs ? begin + r : -1; };
    load_signs<TILE, DEPTH>(group, head, first_row, begin, left);
    load_tile<DEPTH, TILE>(group, head.weight, head.width, head.wide, first_column, weight_row, right);
    group.sync();
    group.template product<false, false>(
        left, STRIDE<T, DEPTH>, right, STRIDE<T, TILE>, sums, SUM_STRIDE, TILE, TILE, DEPTH);
    group.sync();
  }
  const float factor = to.grad[0] * to.scale;
  for (int32_t i = group.rank(); i < TILE * TILE; i += group.size()) {
    const int64_t row = first_row + i / TILE;
    const int32_t column = first_column + i % TILE;
    if (row >= head.count || column >= head.width) continue;
    const int64_t to_row = head.packed ? row : cell_of(head, row);
    to.dx.store(to_row * head.width + column, sums[i / TILE * SUM_STRIDE + i % TILE] * factor);
  }
}

// The tile of dweight of outputs [first_out, first_out + TILE) and columns [first_column, first_column + TILE): the
// signs transposed . x; the first column's tiles also sum the signs for dbias, exactly up to 2^24 rows.
template <class Group, class T>
SGMIM_HOST_DEVICE void l1_weight_gradient(
    const Group& group, const Head<T>& head, const HeadGradients<T>& to, int32_t first_out, int32_t first_column,
    char* memory) {
  T* const left = reinterpret_cast<T*>(memory);
  T* const right = left + DEPTH * STRIDE<T, TILE>;
  float* const sums = reinterpret_cast<float*>(right + DEPTH * STRIDE<T, TILE>);
  float* const columns = sums + TILE * SUM_STRIDE;  // of the signs; each thread keeps to its own
  for (int32_t i = group.rank(); i < TILE * SUM_STRIDE; i += group.size()) sums[i] = 0;
  for (int32_t i = group.rank(); i < TILE; i += group.size()) columns[i] = 0;
  for (int64_t begin = 0; begin < head.count; begin += DEPTH) {
    const auto x_row = [&](int32_t r) -> int64_t {
      if (begin + r >= head.count) return -1;
      return head.packed ? begin + r : cell_of(head, begin + r);
    };
    load_signs<DEPTH, TILE>(group, head, begin, first_out, left);
    load_tile<DEPTH, TILE>(group, head.x, head.width, head.wide, first_column, x_row, right);
    group.sync();
    group.template product<true, false>(
        left, STRIDE<T, TILE>, right, STRIDE<T, TILE>, sums, SUM_STRIDE, TILE, TILE, DEPTH);
    if (first_column == 0)
      for (int32_t i = group.rank(); i < TILE; i += group.size())
        for (int32_t r = 0; r < DEPTH; ++r) columns[i] += static_cast<float>(left[r * STRIDE<T, TILE> + i]);
    group.sync();
  }
  if (head.count == 0) group.sync();
  const float factor = to.grad[0] * to.scale;
  for (int32_t i = group.rank(); i < TILE * TILE; i += group.size()) {
    const int32_t out = first_out + i / TILE, column = first_column + i % TILE;
    if (out >= head.outs || column >= head.width) continue;
    to.dweight.store(int64_t{out} * head.width + column, sums[i / TILE * SUM_STRIDE + i % TILE] * factor);
  }
  for (int32_t i = group.rank(); i < TILE && first_column == 0; i += group.size())
    if (first_out + i < head.outs) to.dbias[first_out + i] = columns[i] * factor;
}

}  // namespace sgmim
