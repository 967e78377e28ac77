// Where the patches of packed cells lie in an NCHW tensor, for the device and for the host.
//
// A cell is `cell` x `cell` pixels and holds side x side patches, side = cell / patch, in raster order or in Z-order. A
// cell's number counts the (B, H / cell, W / cell) grid row by row. Packed, a cell is side * side rows of C * patch *
// patch values (c, i, j). All offsets are in elements, and 64 bits wide.
#pragma once

#include "group.h"

namespace sgmim {

struct CellGrid {
  int64_t down, across;  // cells per image
  int64_t stride_image, stride_channel, stride_row, stride_column;
  int32_t side;          // patches along a cell
  int32_t patch, width;  // rows of a patch, elements in such a row
  int32_t channels;
  bool zorder;
};

// The grid of a (B, C, height, width) tensor of these strides, an element per pixel.
template <class Strides>
CellGrid cell_grid(
    int64_t channels, int64_t height, int64_t width, const Strides& strides, int64_t cell, int64_t patch, bool zorder) {
  CellGrid grid{};
  grid.down = height / cell;
  grid.across = width / cell;
  grid.stride_image = strides[0];
  grid.stride_channel = channels > 1 ? strides[1] : 0;  // of one channel it says nothing
  grid.stride_row = strides[2];
  grid.stride_column = strides[3];
  grid.side = static_cast<int32_t>(cell / patch);
  grid.patch = grid.width = static_cast<int32_t>(patch);
  grid.channels = static_cast<int32_t>(channels);
  grid.zorder = zorder;
  return grid;
}

// The even bits of `order`, packed.
SGMIM_HOST_DEVICE int32_t even_bits(int32_t order) {
  int32_t bits = 0;
  for (int32_t level = 0; (order >> (2 * level)) != 0; ++level) bits |= ((order >> (2 * level)) & 1) << level;
  return bits;
}

SGMIM_HOST_DEVICE int32_t patches_per_cell(const CellGrid& grid) { return grid.side * grid.side; }
SGMIM_HOST_DEVICE int32_t elements_per_patch(const CellGrid& grid) { return grid.channels * grid.patch * grid.width; }
SGMIM_HOST_DEVICE int64_t cells_per_image(const CellGrid& grid) { return grid.down * grid.across; }

// Bits moved to the even places: the inverse of even_bits.
SGMIM_HOST_DEVICE int32_t spread_bits(int32_t bits) {
  int32_t order = 0;
  for (int32_t level = 0; (bits >> level) != 0; ++level) order |= ((bits >> level) & 1) << (2 * level);
  return order;
}

// The number of the patch in this row and column of a cell.
// In Z-order a row bit lies below a column bit at each level: (row 0, column 0), (1, 0), (0, 1), (1, 1).
SGMIM_HOST_DEVICE int32_t order_of(const CellGrid& grid, int32_t row, int32_t column) {
  return grid.zorder ? spread_bits(row) | spread_bits(column) << 1 : row * grid.side + column;
}

// Offset of the upper left element, channel 0, of the `order`-th patch of a cell.
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
