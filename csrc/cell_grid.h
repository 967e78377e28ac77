// Addresses of the patches of cells in an NCHW tensor, for the device and the host.
//
// A cell is `cell` x `cell` pixels and contains side x side patches, side = cell / patch, in raster order or in
// Z-order. Cells are numbered row by row in the (B, H / cell, W / cell) grid. A packed cell is side * side rows of C *
// patch * patch values (c, i, j). All offsets are in elements, and have 64 bits.
#pragma once

#include "group.h"

namespace sgmim {

struct CellGrid {
  int64_t down, across;  // cells per image
  int64_t stride_image, stride_channel, stride_row, stride_column;
  int32_t side;          // patches along a cell
  int32_t patch, width;  // rows of a patch, elements in a row of it
  int32_t channels;
  bool zorder;
};

// Returns the grid of a (B, C, height, width) tensor with these strides; an element is one pixel.
template <class Strides>
CellGrid cell_grid(
    int64_t channels, int64_t height, int64_t width, const Strides& strides, int64_t cell, int64_t patch, bool zorder) {
  CellGrid grid{};
  grid.down = height / cell;
  grid.across = width / cell;
  grid.stride_image = strides[0];
  grid.stride_channel = channels > 1 ? strides[1] : 0;  // arbitrary if there is one channel
  grid.stride_row = strides[2];
  grid.stride_column = strides[3];
  grid.side = static_cast<int32_t>(cell / patch);
  grid.patch = grid.width = static_cast<int32_t>(patch);
  grid.channels = static_cast<int32_t>(channels);
  grid.zorder = zorder;
  return grid;
}

// Extracts the even bits of `order`.
SGMIM_HOST_DEVICE int32_t even_bits(int32_t order) {
  int32_t bits = 0;
  for (int32_t level = 0; (order >> (2 * level)) != 0; ++level) bits |= ((order >> (2 * level)) & 1) << level;
  return bits;
}

SGMIM_HOST_DEVICE int32_t patches_per_cell(const CellGrid& grid) { return grid.side * grid.side; }
SGMIM_HOST_DEVICE int32_t elements_per_patch(const CellGrid& grid) { return grid.channels * grid.patch * grid.width; }
SGMIM_HOST_DEVICE int64_t cells_per_image(const CellGrid& grid) { return grid.down * grid.across; }

// Moves bits to the even positions; the inverse of even_bits.
SGMIM_HOST_DEVICE int32_t spread_bits(int32_t bits) {
  int32_t order = 0;
  for (int32_t level = 0; (bits >> level) != 0; ++level) order |= ((bits >> level) & 1) << (2 * level);
  return order;
}

// Returns the index of the patch in a row and column of a cell. In Z-order the row bit is below the column bit at each
// level: (row 0, column 0), (1, 0), (0, 1), (1, 1).
SGMIM_HOST_DEVICE int32_t order_of(const CellGrid& grid, int32_t row, int32_t column) {
  return grid.zorder ? spread_bits(row) | spread_bits(column) << 1 : row * grid.side + column;
}

// Returns the offset of the upper left element, in channel 0, of the `order`-th patch of a cell.
SGMIM_HOST_DEVICE int64_t patch_corner(const CellGrid& grid, int64_t cell_number, int32_t order) {
  const int32_t row = grid.zorder ? even_bits(order) : order / grid.side;
  const int32_t column = grid.zorder ? even_bits(order >> 1) : order % grid.side;
  const int64_t image = cell_number / cells_per_image(grid);
  const int64_t cell_row = cell_number / grid.across % grid.down;
  const int64_t cell_column = cell_number % grid.across;
  return image * grid.stride_image + (cell_row * grid.side + row) * grid.patch * grid.stride_row +
         (cell_column * grid.side + column) * grid.width * grid.stride_column;
}

}  // namespace sgmim
