// The GPU twin of csrc/cpu/gather_patches.cpp: wanted cells of an NCHW tensor to packed patch rows, and back.
// gather_index.h holds the body of the kernel; the tests run the same body on the host.
#include <cassert>

#include "cuda/launch.h"
#include "gather_index.h"

namespace sgmim {

namespace {

// The threads of one row of a block.
struct BlockRow {
  __device__ int32_t rank() const { return static_cast<int32_t>(threadIdx.x); }
  __device__ int32_t size() const { return static_cast<int32_t>(blockDim.x); }
};

// Registers: 46 to 58. No shared memory. Reads and writes each wanted value once, and a number per cell.
template <bool scatter, class Element>
__global__ void __launch_bounds__(256) copy_patches(
    CellGrid grid, const int64_t* cells, int64_t count, int64_t packed_rows, Element* tensor, Element* packed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const int32_t per_cell = patches_per_cell(grid);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < packed_rows; row += step) {
    const int64_t cell = cells[row / per_cell];
    assert(0 <= cell && cell < count && "gather_patches: a row is not the number of a cell");
    copy_patch<scatter>(BlockRow{}, grid, cell, row, tensor, packed);
  }
}

template <bool scatter, class Element>
void run(const CellGrid& grid, const Tensor& cells, const Tensor& tensor, const Tensor& packed) {
  const int64_t packed_rows = cells.numel() * patches_per_cell(grid);
  uint32_t threads = 1;
  while (threads < 32 && static_cast<int32_t>(threads) < elements_per_patch(grid)) threads *= 2;
  const dim3 block(threads, 256 / threads);
  const int64_t blocks = std::min<int64_t>((packed_rows + block.y - 1) / block.y, INT32_MAX);
  launch(
      copy_patches<scatter, Element>, blocks, block, 0, tensor, grid, pointer<const int64_t>(cells),
      tensor.size(0) * grid.down * grid.across, packed_rows, pointer<Element>(tensor), pointer<Element>(packed));
}

template <bool scatter>
void copy(const Tensor& tensor, const Tensor& cells, const Tensor& packed, int64_t cell, int64_t patch, bool zorder) {
  SGMIM_CHECK(tensor.is_cuda() && tensor.dim() == 4, "the NCHW tensor must be on a GPU and have 4 dimensions");
  SGMIM_CHECK(0 < patch && patch <= cell && cell % patch == 0, "cell ", cell, " must be a multiple of patch ", patch);
  SGMIM_CHECK(
      tensor.size(2) % cell == 0 && tensor.size(3) % cell == 0, "height and width must be multiples of cell ", cell,
      ", got ", tensor.size(2), " x ", tensor.size(3));
  const int64_t side = cell / patch, values = tensor.size(1) * patch * patch;
  SGMIM_CHECK(!zorder || (side & (side - 1)) == 0, "Z-order needs a power of two of patches per side, got ", side);
  SGMIM_CHECK(values <= INT32_MAX && cell <= INT16_MAX, "a patch of ", values, " values is too large");
  check_packed(cells, "rows", ScalarType::Long, tensor, cells.numel());
  check_packed(packed, "the packed patches", tensor.scalar_type(), tensor, cells.numel() * side * side * values);
  if (packed.numel() == 0) return;

  const int64_t strides[4] = {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
  const CellGrid grid = cell_grid(tensor.size(1), tensor.size(2), tensor.size(3), strides, cell, patch, zorder);
  const int64_t size = tensor.element_size();
  const auto address = [](const Tensor& t) { return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(t.data_ptr())); };
  const int32_t pixels = pixels_per_access(grid, size, address(tensor) | address(packed));
  const CellGrid wide = widen(grid, pixels);
  const DeviceGuard guard(tensor.get_device_index());
  switch (size * pixels) {
    case 1: return run<scatter, uint8_t>(wide, cells, tensor, packed);
    case 2: return run<scatter, uint16_t>(wide, cells, tensor, packed);
    case 4: return run<scatter, uint32_t>(wide, cells, tensor, packed);
    case 8: return run<scatter, uint64_t>(wide, cells, tensor, packed);
    case 16: return run<scatter, uint4>(wide, cells, tensor, packed);
    default: SGMIM_CHECK(false, "gather_patches takes elements of 1, 2, 4, 8 or 16 bytes, got ", size);
  }
}

// input (B, C, H, W) of any strides; rows (n,) int64 numbers of cells; out (n * side * side, C * patch * patch).
void gather_patches(
    const Tensor& input, const Tensor& rows, const Tensor& out, int64_t cell, int64_t patch, bool zorder) {
  copy<false>(input, rows, out, cell, patch, zorder);
}

// grad_input comes filled with zeros. The cells of `rows` are distinct, so no two threads write the same place and no
// atomics are needed; gathering by an inverse of `rows` would save a fill of the wanted cells, and cost two launches.
void gather_patches_backward(
    const Tensor& grad_out, const Tensor& rows, const Tensor& grad_input, int64_t cell, int64_t patch, bool zorder) {
  copy<true>(grad_input, rows, grad_out, cell, patch, zorder);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cuda, m) {
  m.def("gather_patches(Tensor input, Tensor rows, Tensor(a!) out, int cell, int patch, bool zorder) -> ()");
  m.def(
      "gather_patches_backward(Tensor grad_out, Tensor rows, Tensor(a!) grad_input, int cell, int patch, "
      "bool zorder) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cuda, CUDA, m) {
  m.impl("gather_patches", TORCH_BOX(&gather_patches));
  m.impl("gather_patches_backward", TORCH_BOX(&gather_patches_backward));
}

}  // namespace sgmim
