// Copies the listed cells of an NCHW map directly into packed patch rows, and back. Reads and writes each value once.
//
// Copies depend only on the size of an element, so there is one instantiation per size. There is no vector code: a row
// of a patch is `patch` adjacent elements, which memcpy copies.
#include "cpu/launch.h"
#include "patch_copy.h"

#include <cstring>

namespace sgmim {

namespace {

// Calls copy(packed offset, map offset) for every patch row of the cells [begin, end).
template <class Copy>
void for_patch_rows(const CellGrid& grid, const int64_t* rows, int64_t begin, int64_t end, const Copy& copy) {
  const int32_t per_cell = patches_per_cell(grid);
  const int64_t plane = static_cast<int64_t>(grid.patch) * grid.patch;
  for (int64_t r = begin; r < end; ++r) {
    for (int32_t t = 0; t < per_cell; ++t) {
      const int64_t corner = patch_corner(grid, rows[r], t);
      const int64_t packed = (r * per_cell + t) * grid.channels * plane;
      for (int64_t c = 0; c < grid.channels; ++c)
        for (int64_t i = 0; i < grid.patch; ++i)
          copy(packed + c * plane + i * grid.patch, corner + c * grid.stride_channel + i * grid.stride_row);
    }
  }
}

// Checks the arguments and describes the map: pixels (B, C, H, W) with any strides; packed (n * side * side, C * patch
// * patch), where side = cell / patch.
CellGrid grid_of(const Tensor& pixels, const Tensor& packed, const Tensor& rows, int64_t cell, int64_t patch,
                 bool zorder) {
  SGMIM_CHECK(pixels.dim() == 4, "the map must have 4 dimensions, got ", pixels.dim());
  SGMIM_CHECK(
      0 < patch && patch <= cell && cell <= INT16_MAX && cell % patch == 0, "cell ", cell,
      " must be a multiple of patch ", patch, " and less than 2^15");
  SGMIM_CHECK(
      pixels.size(2) % cell == 0 && pixels.size(3) % cell == 0, "height and width must be multiples of cell ", cell,
      ", got ", pixels.size(2), " x ", pixels.size(3));
  const int64_t side = cell / patch, channels = pixels.size(1);
  SGMIM_CHECK(!zorder || (side & (side - 1)) == 0, "Z-order needs a power of two of patches per side, got ", side);
  check_packed(packed, "the packed patches", pixels.scalar_type(), rows.numel() * channels * cell * cell);
  const int64_t strides[4] = {pixels.stride(0), pixels.stride(1), pixels.stride(2), pixels.stride(3)};
  return cell_grid(pixels.size(1), pixels.size(2), pixels.size(3), strides, cell, patch, zorder);
}

template <class Body>
void dispatch_size(const Tensor& tensor, const Body& body) {
  switch (tensor.element_size()) {
    case 1: return body(uint8_t{});
    case 2: return body(uint16_t{});
    case 4: return body(uint32_t{});
    case 8: return body(uint64_t{});
    default: SGMIM_CHECK(false, "the map must have elements of 1, 2, 4 or 8 bytes, got ", tensor.element_size());
  }
}

void gather_patches(const Tensor& input, const Tensor& rows, const Tensor& out, int64_t cell, int64_t patch,
                    bool zorder) {
  const CellGrid grid = grid_of(input, out, rows, cell, patch, zorder);
  check_rows(rows, input.size(0) * cells_per_image(grid), "rows");
  dispatch_size(input, [&](auto type) {
    using E = decltype(type);
    const E* source = data<E>(input);
    E* target = data<E>(out);
    const int64_t step = grid.stride_column;
    parallel(rows.numel(), 4, [&](int64_t begin, int64_t end) {
      for_patch_rows(grid, data<int64_t>(rows), begin, end, [&](int64_t packed, int64_t at) {
        if (step == 1) {
          std::memcpy(target + packed, source + at, patch * sizeof(E));
        } else {
          for (int64_t j = 0; j < patch; ++j) target[packed + j] = source[at + j * step];
        }
      });
    });
  });
}

// The cells of `rows` are distinct, so every pixel is written by one thread at most.
void gather_patches_backward(
    const Tensor& grad_out, const Tensor& rows, const Tensor& grad_input, int64_t cell, int64_t patch, bool zorder) {
  const CellGrid grid = grid_of(grad_input, grad_out, rows, cell, patch, zorder);
  places(rows, grad_input.size(0) * cells_per_image(grid), "rows");
  dispatch_size(grad_input, [&](auto type) {
    using E = decltype(type);
    const E* source = data<E>(grad_out);
    E* target = data<E>(grad_input);
    const int64_t step = grid.stride_column;
    parallel(rows.numel(), 4, [&](int64_t begin, int64_t end) {
      for_patch_rows(grid, data<int64_t>(rows), begin, end, [&](int64_t packed, int64_t at) {
        for (int64_t j = 0; j < patch; ++j) target[at + j * step] = source[packed + j];
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def("gather_patches(Tensor input, Tensor rows, Tensor(a!) out, int cell, int patch, bool zorder) -> ()");
  m.def(
      "gather_patches_backward(Tensor grad_out, Tensor rows, Tensor(a!) grad_input, int cell, int patch, "
      "bool zorder) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("gather_patches", TORCH_BOX(&gather_patches));
  m.impl("gather_patches_backward", TORCH_BOX(&gather_patches_backward));
}

}  // namespace sgmim
