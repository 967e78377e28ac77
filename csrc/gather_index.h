// Where the patches of packed cells lie in an NCHW tensor, and the copy of one patch, for the device and for the host.
//
// A body is shared by a group of threads, anything with rank() and size(); a group of one runs it on the host.
//
// A cell is `cell` x `cell` pixels and holds side x side patches, side = cell / patch, in raster order or in Z-order.
// A cell's number counts the (B, H / cell, W / cell) grid row by row. Packed, a cell is side * side rows of
// C * patch * patch values (c, i, j). All offsets are in elements, and 64 bits wide.
#pragma once

#include "group.h"

namespace sgmim {

struct CellGrid {
  int64_t down, across;  // cells per image
  int64_t stride_image, stride_channel, stride_row, stride_column;
  int32_t cell, patch;  // pixels
  int32_t channels;
  bool zorder;
};

// The even bits of `order`, packed.
SGMIM_HOST_DEVICE int32_t even_bits(int32_t order) {
  int32_t bits = 0;
  for (int32_t level = 0; (order >> (2 * level)) != 0; ++level) bits |= ((order >> (2 * level)) & 1) << level;
  return bits;
}

SGMIM_HOST_DEVICE int32_t patches_per_cell(const CellGrid& grid) {
  const int32_t side = grid.cell / grid.patch;
  return side * side;
}

SGMIM_HOST_DEVICE int32_t values_per_patch(const CellGrid& grid) { return grid.channels * grid.patch * grid.patch; }

// Offset of the upper left value, channel 0, of the `order`-th patch of a cell.
// In Z-order a row bit lies below a column bit at each level: (row 0, column 0), (1, 0), (0, 1), (1, 1).
SGMIM_HOST_DEVICE int64_t patch_corner(const CellGrid& grid, int64_t cell_number, int32_t order) {
  const int32_t side = grid.cell / grid.patch;
  const int32_t row = grid.zorder ? even_bits(order) : order / side;
  const int32_t column = grid.zorder ? even_bits(order >> 1) : order % side;
  const int64_t image = cell_number / (grid.down * grid.across);
  const int64_t cell_row = cell_number / grid.across % grid.down;
  const int64_t cell_column = cell_number % grid.across;
  return image * grid.stride_image + (cell_row * grid.cell + row * grid.patch) * grid.stride_row +
         (cell_column * grid.cell + column * grid.patch) * grid.stride_column;
}

// Copies one patch from the NCHW tensor to its packed row, or back if `scatter`. packed_row counts the rows of the
// packed matrix, which is contiguous; its cell is cells[packed_row / patches per cell].
template <bool scatter, class Group, class Element>
SGMIM_HOST_DEVICE void copy_patch(
    const Group& group, const CellGrid& grid, const int64_t* cells, int64_t packed_row, Element* tensor,
    Element* packed) {
  const int32_t per_cell = patches_per_cell(grid), values = values_per_patch(grid);
  tensor += patch_corner(grid, cells[packed_row / per_cell], static_cast<int32_t>(packed_row % per_cell));
  packed += packed_row * values;
  for (int32_t v = group.rank(); v < values; v += group.size()) {
    const int32_t j = v % grid.patch, i = v / grid.patch % grid.patch, c = v / (grid.patch * grid.patch);
    Element& outside = tensor[c * grid.stride_channel + i * grid.stride_row + j * grid.stride_column];
    if (scatter) {
      outside = packed[v];
    } else {
      packed[v] = outside;
    }
  }
}

}  // namespace sgmim
