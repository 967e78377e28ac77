// Memory accesses that copy the pixels of a patch: 16 bytes at a time on both sides where alignment allows it.
//
// If the pixels of a row are adjacent in the tensor, as they are in packed rows, an element represents several of them
// (`widen`). If channels are adjacent (channels last), a few pixels of a few channels are transposed in registers
// (`Transposed`).
#pragma once

#include "cell_grid.h"

namespace sgmim {

// Returns the number of pixels of `size` bytes that one access can copy, a power of two: at most 16 bytes, never across
// the end of a patch's row, and with every address aligned to the access. addresses: bitwise or of both tensors'
// addresses.
inline int32_t pixels_per_access(const CellGrid& grid, int64_t size, uint64_t addresses) {
  int32_t pixels = 1;
  if (grid.stride_column != 1) return pixels;
  const int64_t strides = grid.stride_image | grid.stride_channel | grid.stride_row | grid.width;
  while (size * pixels < 16 && strides % (2 * pixels) == 0 && addresses % (2 * pixels * size) == 0) pixels *= 2;
  return pixels;
}

// Returns the same grid in elements of `pixels` pixels.
inline CellGrid widen(CellGrid grid, int32_t pixels) {
  grid.stride_image /= pixels;
  grid.stride_channel /= pixels;
  grid.stride_row /= pixels;
  grid.width /= pixels;
  return grid;
}

// An access copies `Element`s of PIXELS adjacent pixels in a patch's row and of CHANNELS channels. `outside` points
// into the tensor, `inside` into a packed row. Straight copies one element, which may represent several pixels.
template <class T>
struct Straight {
  using Element = T;
  static constexpr int32_t PIXELS = 1, CHANNELS = 1;
  static SGMIM_HOST_DEVICE void pack(const CellGrid&, const T* outside, T* inside) { *inside = *outside; }
  static SGMIM_HOST_DEVICE void unpack(const CellGrid&, const T* inside, T* outside) { *outside = *inside; }
  static SGMIM_HOST_DEVICE void clear(const CellGrid&, T* outside) { *outside = T{}; }
};

// Copies 16 bytes of pixels of each of several channels. In the tensor these are as many words of 16 bytes: either all
// channels of consecutive pixels, or one word of channels of each pixel.
template <class T, int32_t MANY>
struct Transposed {
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

// Returns MANY of the `Transposed` that fits a tensor of `size` bytes per element, or 0 if none does: 3 for the
// channels of a colour image, or 16 bytes of channels. For other numbers of channels, and for patches narrower than 16
// bytes, pixels are copied one by one.
inline int32_t channels_per_access(const CellGrid& grid, int64_t size, uint64_t addresses) {
  if (grid.stride_channel != 1 || (size != 2 && size != 4)) return 0;
  const int64_t pixels = 16 / size;
  if (addresses % 16 != 0 || (grid.width | grid.stride_row | grid.stride_image) % pixels != 0) return 0;
  if (grid.channels == 3 && grid.stride_column == 3) return 3;
  return (grid.channels | grid.stride_column) % pixels == 0 ? static_cast<int32_t>(pixels) : 0;
}

}  // namespace sgmim
