// One tile of a head's predictions and their L1 distance to the pixels they predict, by a group of threads that has
// product(): the body of csrc/cuda/linear_l1.cu. The predictions live in the group's memory only.
#pragma once

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

// x (rows, width), or (cells, width) with the rows listed in `cells` used; weight (outs, width); bias (outs,);
// cells (count,): numbers of the cells; signs (count, outs): of prediction - pixel. T: float or a half precision.
template <class T>
struct Head {
  const T *x, *weight;
  const float* bias;
  const int64_t* cells;
  Target target;
  int8_t* signs;
  int64_t count;
  int32_t width, outs;
  bool packed;
  bool wide;  // whether 16 bytes can be read at a time: width a multiple of 8, x and weight begin on 16 bytes
};

template <class T>
constexpr int32_t TILE_STRIDE = DEPTH + 16 / sizeof(T);  // elements, padded against bank conflicts
constexpr int32_t SUM_STRIDE = TILE + 4;

// Bytes of the group's memory, on a boundary of 32: two operands' tiles and the predictions.
template <class T>
SGMIM_HOST_DEVICE int64_t l1_memory() {
  return TILE * (2 * TILE_STRIDE<T> * sizeof(T) + SUM_STRIDE * sizeof(float));
}

// Columns [begin, begin + DEPTH) of TILE rows into a tile, zeros outside. row(r): the row's number, -1 if there is none.
template <class Group, class T, class Row>
SGMIM_HOST_DEVICE void load_tile(
    const Group& group, const T* matrix, int32_t width, bool wide, int32_t begin, const Row& row, T* tile) {
  constexpr int32_t MANY = 16 / sizeof(T);
  if (wide) {
    for (int32_t i = group.rank(); i < TILE * (DEPTH / MANY); i += group.size()) {
      const int32_t r = i / (DEPTH / MANY), k = i % (DEPTH / MANY) * MANY;
      const int64_t from = begin + k < width ? row(r) : -1;
      Sixteen value{};
      if (from >= 0) value = *reinterpret_cast<const Sixteen*>(matrix + from * width + begin + k);
      *reinterpret_cast<Sixteen*>(tile + r * TILE_STRIDE<T> + k) = value;
    }
  } else {
    for (int32_t i = group.rank(); i < TILE * DEPTH; i += group.size()) {
      const int32_t r = i / DEPTH, k = i % DEPTH;
      const int64_t from = begin + k < width ? row(r) : -1;
      tile[r * TILE_STRIDE<T> + k] = from >= 0 ? matrix[from * width + begin + k] : static_cast<T>(0.0f);
    }
  }
}

// The tile of rows [first_row, first_row + TILE) and outputs [first_out, first_out + TILE): writes its signs, returns
// the sum of the distances, the same in every thread.
template <class Group, class T>
SGMIM_HOST_DEVICE double l1_tile(
    const Group& group, const Head<T>& head, int64_t first_row, int32_t first_out, char* memory) {
  T* const left = reinterpret_cast<T*>(memory);
  T* const right = left + TILE * TILE_STRIDE<T>;
  float* const sums = reinterpret_cast<float*>(right + TILE * TILE_STRIDE<T>);
  const auto x_row = [&](int32_t r) -> int64_t {
    if (first_row + r >= head.count) return -1;
    return head.packed ? first_row + r : head.cells[first_row + r];
  };
  const auto weight_row = [&](int32_t r) -> int64_t { return first_out + r < head.outs ? first_out + r : -1; };
  for (int32_t i = group.rank(); i < TILE * SUM_STRIDE; i += group.size()) sums[i] = 0;
  for (int32_t begin = 0; begin < head.width; begin += DEPTH) {
    load_tile(group, head.x, head.width, head.wide, begin, x_row, left);
    load_tile(group, head.weight, head.width, head.wide, begin, weight_row, right);
    group.sync();
    group.template product<false, true>(
        left, TILE_STRIDE<T>, right, TILE_STRIDE<T>, sums, SUM_STRIDE, TILE, TILE, DEPTH);
    group.sync();
  }

  const Target& target = head.target;
  const int32_t cell = target.cell, pixels = cell * cell;
  double total = 0;
  for (int32_t i = group.rank(); i < TILE * TILE; i += group.size()) {
    const int64_t row = first_row + i / TILE;
    const int32_t out = first_out + i % TILE;
    if (row >= head.count || out >= head.outs) continue;
    const int64_t number = head.cells[row], image = number / target.per_image, inside = number % target.per_image;
    const int64_t y = inside / target.across * cell + out % pixels / cell, x = inside % target.across * cell + out % cell;
    const int64_t channel = out / pixels;
    const auto at = [&](const int64_t* s) { return image * s[0] + channel * s[1] + y * s[2] + x * s[3]; };
    float difference = sums[i / TILE * SUM_STRIDE + i % TILE] + head.bias[out] - target.values[at(target.strides)];
    if (target.valid && !target.valid[at(target.valid_strides)]) difference = 0;
    head.signs[row * head.outs + out] = static_cast<int8_t>((difference > 0) - (difference < 0));
    total += fabsf(difference);
  }
  return group.sum(total);
}

}  // namespace sgmim
