// Copies patches of cells from an NCHW tensor to packed rows, and back.
#pragma once

#include "inverse.h"
#include "patch_access.h"

namespace sgmim {

// Number of accesses that copy a patch.
template <class Access>
SGMIM_HOST_DEVICE int32_t accesses_per_patch(const CellGrid& grid) {
  return grid.channels / Access::CHANNELS * grid.patch * (grid.width / Access::PIXELS);
}

// Copies one patch of a cell from the NCHW tensor to its row of the packed matrix, which is contiguous. All threads of
// the group take part.
template <class Access, class Group, class Element = typename Access::Element>
SGMIM_HOST_DEVICE void copy_patch(
    const Group& group, const CellGrid& grid, int64_t cell_number, int64_t packed_row, const Element* tensor,
    Element* packed) {
  const int32_t across = grid.width / Access::PIXELS, accesses = accesses_per_patch<Access>(grid);
  tensor += patch_corner(grid, cell_number, static_cast<int32_t>(packed_row % patches_per_cell(grid)));
  packed += packed_row * elements_per_patch(grid);
  for (int32_t e = group.rank(); e < accesses; e += group.size()) {
    const int32_t j = e % across * Access::PIXELS, i = e / across % grid.patch;
    const int32_t c = e / (across * grid.patch) * Access::CHANNELS;
    Access::pack(
        grid, tensor + c * grid.stride_channel + i * grid.stride_row + j * grid.stride_column,
        packed + (c * grid.patch + i) * grid.width + j);
  }
}

// Writes a cell of the tensor from a packed cell, or zeros if that is null. This lane writes its share of the accesses,
// which follow the tensor's rows of pixels.
template <class Access, class Element = typename Access::Element>
SGMIM_HOST_DEVICE void fill_cell(
    const CellGrid& grid, int64_t cell_number, int32_t lane, int32_t lanes, const Element* packed, Element* tensor) {
  const int32_t across = grid.side * grid.width / Access::PIXELS, down = grid.side * grid.patch;
  const int32_t accesses = grid.channels / Access::CHANNELS * down * across;
  tensor += patch_corner(grid, cell_number, 0);
  for (int32_t e = lane; e < accesses; e += lanes) {
    const int32_t j = e % across * Access::PIXELS, i = e / across % down, c = e / (across * down) * Access::CHANNELS;
    Element* const outside = tensor + c * grid.stride_channel + i * grid.stride_row + j * grid.stride_column;
    if (!packed) {
      Access::clear(grid, outside);
      continue;
    }
    const int32_t order = order_of(grid, i / grid.patch, j / grid.width);
    const int32_t within = (c * grid.patch + i % grid.patch) * grid.width + j % grid.width;
    Access::unpack(grid, packed + order * elements_per_patch(grid) + within, outside);
  }
}

// Copies packed cells back and writes every cell of the tensor, zeros for cells that are not in `list`, (count,).
// `lanes` threads share a cell; `lanes` divides the group's size. inverse (cells,): workspace, which may be
// uninitialized.
template <class Access, class Group, class Element = typename Access::Element>
SGMIM_HOST_DEVICE void fill_cells(
    const Group& group, const CellGrid& grid, const int64_t* list, int64_t count, int64_t cells, int32_t lanes,
    int64_t* inverse, const Element* packed, Element* tensor) {
  invert(group, list, count, cells, inverse);
  group.sync();
  for (int64_t cell = group.rank() / lanes; cell < cells; cell += group.size() / lanes) {
    const int64_t place = find(list, count, inverse, cell);
    const int64_t first = place * patches_per_cell(grid);  // first packed row of the cell
    const Element* const from = place < 0 ? nullptr : packed + first * elements_per_patch(grid);
    fill_cell<Access>(grid, cell, group.rank() % lanes, lanes, from, tensor);
  }
}

}  // namespace sgmim
