// Where the patches of packed cells lie in an NCHW tensor, and the copy of one patch, for the device and for the host.
//
// A cell is `cell` x `cell` pixels and holds side x side patches, side = cell / patch, in raster order or in Z-order.
// A cell's number counts the (B, H / cell, W / cell) grid row by row. Packed, a cell is side * side rows of
// C * patch * patch values (c, i, j). All offsets are in elements, and 64 bits wide.
//
// An element may stand for several neighbouring pixels of a row (`widen`), so that each access moves up to 16 bytes.
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
  grid.stride_channel = strides[1];
  grid.stride_row = strides[2];
  grid.stride_column = strides[3];
  grid.side = static_cast<int32_t>(cell / patch);
  grid.patch = grid.width = static_cast<int32_t>(patch);
  grid.channels = static_cast<int32_t>(channels);
  grid.zorder = zorder;
  return grid;
}

// How many pixels of `size` bytes one access can move, a power of two: 16 bytes at most, never across the end of a
// patch's row, and every address a multiple of what it moves. addresses: of both tensors, or-ed together.
inline int32_t pixels_per_access(const CellGrid& grid, int64_t size, uint64_t addresses) {
  int32_t pixels = 1;
  if (grid.stride_column != 1) return pixels;
  const int64_t strides = grid.stride_image | grid.stride_channel | grid.stride_row | grid.width;
  while (size * pixels < 16 && strides % (2 * pixels) == 0 && addresses % (2 * pixels * size) == 0) pixels *= 2;
  return pixels;
}

// The same grid in elements of so many pixels.
inline CellGrid widen(CellGrid grid, int32_t pixels) {
  grid.stride_image /= pixels;
  grid.stride_channel /= pixels;
  grid.stride_row /= pixels;
  grid.width /= pixels;
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

// Offset of the upper left element, channel 0, of the `order`-th patch of a cell.
// In Z-order a row bit lies below a column bit at each level: (row 0, column 0), (1, 0), (0, 1), (1, 1).
SGMIM_HOST_DEVICE int64_t patch_corner(const CellGrid& grid, int64_t cell_number, int32_t order) {
  const int32_t row = grid.zorder ? even_bits(order) : order / grid.side;
  const int32_t column = grid.zorder ? even_bits(order >> 1) : order % grid.side;
  const int64_t image = cell_number / (grid.down * grid.across);
  const int64_t cell_row = cell_number / grid.across % grid.down;
  const int64_t cell_column = cell_number % grid.across;
  return image * grid.stride_image + (cell_row * grid.side + row) * grid.patch * grid.stride_row +
         (cell_column * grid.side + column) * grid.width * grid.stride_column;
}

// Copies one patch from the NCHW tensor to its packed row, or back if `scatter`, shared out among the group's threads.
// packed_row counts the rows of the packed matrix, which is contiguous; it belongs to the cell of this number.
template <bool scatter, class Group, class Element>
SGMIM_HOST_DEVICE void copy_patch(
    const Group& group, const CellGrid& grid, int64_t cell_number, int64_t packed_row, Element* tensor,
    Element* packed) {
  const int32_t elements = elements_per_patch(grid);
  tensor += patch_corner(grid, cell_number, static_cast<int32_t>(packed_row % patches_per_cell(grid)));
  packed += packed_row * elements;
  for (int32_t e = group.rank(); e < elements; e += group.size()) {
    const int32_t j = e % grid.width, i = e / grid.width % grid.patch, c = e / (grid.width * grid.patch);
    Element& outside = tensor[c * grid.stride_channel + i * grid.stride_row + j * grid.stride_column];
    if (scatter) {
      outside = packed[e];
    } else {
      packed[e] = outside;
    }
  }
}

}  // namespace sgmim
