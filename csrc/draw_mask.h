// Draws one image's mask and row lists by a group of threads. Device function of csrc/cuda/selective_mask.cu.
#pragma once

#include "group.h"
#include "philox.h"
#include "radix.h"

namespace sgmim {

constexpr int32_t MOST_UNITS = 16384;  // two counts share a word, 16 bits each

struct MaskGrid {
  int32_t rows, columns;  // units
  int32_t scale;          // cells along a unit
};

SGMIM_HOST_DEVICE int32_t units_of(const MaskGrid& grid) { return grid.rows * grid.columns; }
SGMIM_HOST_DEVICE int64_t cells_of(const MaskGrid& grid) { return int64_t{units_of(grid)} * grid.scale * grid.scale; }
// Words of the group's memory for one image: a key per unit, later units + 1 counts in the same place; and a histogram.
SGMIM_HOST_DEVICE uint32_t mask_memory(const MaskGrid& grid) { return units_of(grid) + 1 + DIGITS + 2; }

// keys[unit] = word unit % 4 of Philox at counter (unit / 4, image, 0, 0).
template <class Group>
SGMIM_HOST_DEVICE void draw_keys(
    const Group& group, uint32_t key0, uint32_t key1, uint32_t image, uint32_t units, uint32_t* keys) {
  for (uint32_t four = group.rank(); 4 * four < units; four += group.size()) {
    const Philox random = philox({{four, image, 0, 0}}, key0, key1);
    for (uint32_t i = 0; i < 4; ++i)
      if (4 * four + i < units) keys[4 * four + i] = random.words[i];
  }
}

// Replaces the keys by the number of masked units before each unit in raster order; keys[units] becomes their total.
// The units with the `masked` smallest keys are masked; among equal keys those of lower index.
template <class Group>
SGMIM_HOST_DEVICE void count_masked(const Group& group, uint32_t units, uint32_t masked, uint32_t* keys,
                                    uint32_t* counts) {
  Prefix last{0, 0};  // the largest masked key; `ties` of the units with this key are masked
  if (masked > 0) last = select_key(group, keys, units, masked - 1, counts);
  const uint32_t ties = masked > 0 ? last.rank + 1 : 0;
  uint32_t running = 0;  // lower half: units so far with a key below the largest masked one; upper half: equal to it
  for (uint32_t first = 0; first < units; first += group.size()) {
    const uint32_t unit = first + group.rank();
    const uint32_t key = unit < units ? keys[unit] : 0xffffffffu;
    const uint32_t below = unit < units && key < last.bits, equal = unit < units && key == last.bits;
    uint32_t total;
    const uint32_t before = running + group.scan(below | equal << 16, total);
    const uint32_t equal_before = before >> 16;
    if (unit < units) keys[unit] = (before & 0xffff) + (equal_before < ties ? equal_before : ties);
    running += total;
  }
  if (group.rank() == 0) keys[units] = masked;
  group.sync();
}

// Draws the mask of an image, (rows * scale, columns * scale), and writes its rows to both lists, from first_masked and
// first_visible on. memory: mask_memory(grid) words. A cell's position in a list follows from the counts of whole units
// in the unit rows above, of its own unit row and of its own row of cells, so no second scan is needed.
template <class Group>
SGMIM_HOST_DEVICE void draw_mask(
    const Group& group, uint32_t key0, uint32_t key1, int64_t image, uint32_t masked, const MaskGrid& grid,
    uint32_t* memory, int64_t first_masked, int64_t first_visible, bool* mask, int64_t* masked_rows,
    int64_t* visible_rows) {
  const uint32_t units = units_of(grid), scale = grid.scale, width = grid.columns * scale;
  uint32_t* const before = memory;
  draw_keys(group, key0, key1, static_cast<uint32_t>(image), units, memory);
  group.sync();
  count_masked(group, units, masked, memory, memory + units + 1);

  const uint32_t cells = static_cast<uint32_t>(cells_of(grid));
  const int64_t first_row = image * cells;
  for (uint32_t cell = group.rank(); cell < cells; cell += group.size()) {
    const uint32_t y = cell / width, x = cell % width;
    const uint32_t row = y / scale * grid.columns, unit = row + x / scale;  // first unit of the row, unit of the cell
    const bool is_masked = before[unit + 1] > before[unit];
    const uint32_t above = scale * before[row] + y % scale * (before[row + grid.columns] - before[row]);
    const uint32_t place = scale * (above + before[unit] - before[row]) + (is_masked ? x % scale : 0);
    mask[cell] = is_masked;
    if (is_masked)
      masked_rows[first_masked + place] = first_row + cell;
    else
      visible_rows[first_visible + cell - place] = first_row + cell;
  }
}

}  // namespace sgmim
