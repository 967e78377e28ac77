// Where the patches of packed cells lie in an NCHW tensor, and the copies to packed rows and back, for the device and
// for the host.
//
// A cell is `cell` x `cell` pixels and holds side x side patches, side = cell / patch, in raster order or in Z-order. A
// cell's number counts the (B, H / cell, W / cell) grid row by row. Packed, a cell is side * side rows of C * patch *
// patch values (c, i, j). All offsets are in elements, and 64 bits wide.
//
// Both sides are read and written 16 bytes at a time where alignment allows it. Where pixels of a row are neighbours in
// the tensor, as they are packed, an element stands for several of them (`widen`). Where channels are (channels last),
// a few pixels of a few channels are turned in registers (`Turned`).
#pragma once

#include "group.h"
#include "inverse.h"

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
SGMIM_HOST_DEVICE int64_t cells_per_image(const CellGrid& grid) { return grid.down * grid.across; }

// Bits moved to the even places: the inverse of even_bits.
SGMIM_HOST_DEVICE int32_t spread_bits(int32_t bits) {
  int32_t order = 0;
  for (int32_t level = 0; (bits >> level) != 0; ++level) order |= ((bits >> level) & 1) << (2 * level);
  return order;
}

// Offset of the upper left element, channel 0, of the `order`-th patch of a cell.
// In Z-order a row bit lies below a column bit at each level: (row 0, column 0), (1, 0), (0, 1), (1, 1).
SGMIM_HOST_DEVICE int64_t patch_corner(const CellGrid& grid, int64_t cell_number, int32_t order) {
  const int32_t row = grid.zorder ? even_bits(order) : order / grid.side;
  const int32_t column = grid.zorder ? even_bits(order >> 1) : order % grid.side;
  const int64_t image = cell_number / cells_per_image(grid);
  const int64_t cell_row = cell_number / grid.across % grid.down;
  const int64_t cell_column = cell_number % grid.across;
  return image * grid.stride_image + (cell_row * grid.side + row) * grid.patch * grid.stride_row +
         (cell_column * grid.side + column) * grid.width * grid.stride_column;
}

// What one access moves: `Element`s of PIXELS neighbours in a patch's row and CHANNELS channels. `outside` points into
// the tensor, `inside` into a packed row.
template <class T>
struct Straight {  // one element, which may stand for several pixels
  using Element = T;
  static constexpr int32_t PIXELS = 1, CHANNELS = 1;
  static SGMIM_HOST_DEVICE void pack(const CellGrid&, const T* outside, T* inside) { *inside = *outside; }
  static SGMIM_HOST_DEVICE void unpack(const CellGrid&, const T* inside, T* outside) { *outside = *inside; }
  static SGMIM_HOST_DEVICE void clear(const CellGrid&, T* outside) { *outside = T{}; }
};

// 16 bytes of pixels of each of several channels. In the tensor these are as many words of 16 bytes: either all
// channels of the pixels, one after the other, or of each pixel a word of channels.
template <class T, int32_t MANY>
struct Turned {
  using Element = T;
  static constexpr int32_t PIXELS = 16 / sizeof(T), CHANNELS = MANY;
  using Word = Few<T, PIXELS>;

  static SGMIM_HOST_DEVICE int64_t step(const CellGrid& grid) {  // elements from word to word in the tensor
    return CHANNELS == PIXELS ? grid.stride_column : PIXELS;
  }
  static SGMIM_HOST_DEVICE int32_t plane(const CellGrid& grid) { return grid.patch * grid.width; }
  static SGMIM_HOST_DEVICE void pack(const CellGrid& grid, const T* outside, T* inside) {
    Word from[CHANNELS];
    SGMIM_UNROLL
    for (int32_t w = 0; w < CHANNELS; ++w) from[w] = Word::load(outside + w * step(grid));
    SGMIM_UNROLL
    for (int32_t c = 0; c < CHANNELS; ++c) {
      Word to;
      SGMIM_UNROLL
      for (int32_t p = 0; p < PIXELS; ++p) {
        const int32_t at = p * CHANNELS + c;
        to.values[p] = from[at / PIXELS].values[at % PIXELS];
      }
      to.store(inside + c * plane(grid));
    }
  }
  static SGMIM_HOST_DEVICE void unpack(const CellGrid& grid, const T* inside, T* outside) {
    Word from[CHANNELS];
    SGMIM_UNROLL
    for (int32_t c = 0; c < CHANNELS; ++c) from[c] = Word::load(inside + c * plane(grid));
    SGMIM_UNROLL
    for (int32_t w = 0; w < CHANNELS; ++w) {
      Word to;
      SGMIM_UNROLL
      for (int32_t i = 0; i < PIXELS; ++i) {
        const int32_t at = w * PIXELS + i;
        to.values[i] = from[at % CHANNELS].values[at / CHANNELS];
      }
      to.store(outside + w * step(grid));
    }
  }
  static SGMIM_HOST_DEVICE void clear(const CellGrid& grid, T* outside) {
    SGMIM_UNROLL
    for (int32_t w = 0; w < CHANNELS; ++w) Word{}.store(outside + w * step(grid));
  }
};

// MANY of the `Turned` that fits a tensor of `size` bytes per element, 0 if none does: 3 for the channels of a colour
// image, or 16 bytes of channels. Other numbers of channels, and patches narrower than 16 bytes, go one by one.
inline int32_t channels_per_access(const CellGrid& grid, int64_t size, uint64_t addresses) {
  if (grid.stride_channel != 1 || (size != 2 && size != 4)) return 0;
  const int64_t pixels = 16 / size;
  if (addresses % 16 != 0 || (grid.width | grid.stride_row | grid.stride_image) % pixels != 0) return 0;
  if (grid.channels == 3 && grid.stride_column == 3) return 3;
  return (grid.channels | grid.stride_column) % pixels == 0 ? static_cast<int32_t>(pixels) : 0;
}

// Accesses that move a patch.
template <class Access>
SGMIM_HOST_DEVICE int32_t accesses_per_patch(const CellGrid& grid) {
  return grid.channels / Access::CHANNELS * grid.patch * (grid.width / Access::PIXELS);
}

// Copies one patch from the NCHW tensor to its packed row, shared out among the group's threads. packed_row counts the
// rows of the packed matrix, which is contiguous; it belongs to the cell of this number.
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

// Gives a cell of the tensor the values of a packed one, or zeros if that is null: this lane's share of it, row of
// pixels by row of pixels, as they lie in the tensor.
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
    const int32_t row = i / grid.patch, column = j / grid.width;
    const int32_t order = grid.zorder ? spread_bits(row) | spread_bits(column) << 1 : row * grid.side + column;
    const int32_t within = (c * grid.patch + i % grid.patch) * grid.width + j % grid.width;
    Access::unpack(grid, packed + order * elements_per_patch(grid) + within, outside);
  }
}

// The copy back: every cell of the tensor, with zeros where `list` (count,) does not name it. `lanes` threads share a
// cell and divide the group's size; `inverse` has room for every cell, and no need of a value.
template <class Access, class Group, class Element = typename Access::Element>
SGMIM_HOST_DEVICE void fill_cells(
    const Group& group, const CellGrid& grid, const int64_t* list, int64_t count, int64_t cells, int32_t lanes,
    int64_t* inverse, const Element* packed, Element* tensor) {
  invert(group, list, count, cells, inverse);
  group.sync();
  for (int64_t cell = group.rank() / lanes; cell < cells; cell += group.size() / lanes) {
    const int64_t place = find(list, count, inverse, cell);
    const int64_t first = place * patches_per_cell(grid);  // of its patches
    const Element* const from = place < 0 ? nullptr : packed + first * elements_per_patch(grid);
    fill_cell<Access>(grid, cell, group.rank() % lanes, lanes, from, tensor);
  }
}

}  // namespace sgmim
