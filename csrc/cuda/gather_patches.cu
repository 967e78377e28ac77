// CUDA version of csrc/cpu/gather_patches.cpp: copies the listed cells of an NCHW tensor to packed patch rows, and
// back. patch_copy.h has the device functions, which the tests also run on the host.
#include <cassert>
#include <type_traits>

#include "cuda/groups.h"
#include "cuda/launch.h"
#include "patch_copy.h"

namespace sgmim {

namespace {

constexpr uint32_t THREADS = 256;

// The threads of one row (threadIdx.y) of a block.
struct BlockRow {
  __device__ int32_t rank() const { return static_cast<int32_t>(threadIdx.x); }
  __device__ int32_t size() const { return static_cast<int32_t>(blockDim.x); }
};

// Registers: 42 to 74. No shared memory. Reads and writes each listed value once, and reads an index per packed row.
template <class Access>
__global__ void __launch_bounds__(THREADS) pack_patches(
    CellGrid grid, const int64_t* cells, int64_t count, int64_t packed_rows, const typename Access::Element* tensor,
    typename Access::Element* packed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const int32_t per_cell = patches_per_cell(grid);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < packed_rows; row += step) {
    const int64_t cell = cells[row / per_cell];
    assert(0 <= cell && cell < count && "gather_patches: a row is not the number of a cell");
    copy_patch<Access>(BlockRow{}, grid, cell, row, tensor, packed);
  }
}

// Registers: 48 to 102. No shared memory. Reads the packed values once and writes every pixel once. For each cell it
// writes 8 bytes of the inverse, and makes two reads of 8 bytes.
template <class Access>
__global__ void __launch_bounds__(THREADS, 2) unpack_patches(
    CellGrid grid, const int64_t* rows, int64_t count, int64_t cells, int32_t lanes, int64_t* inverse,
    const typename Access::Element* packed, typename Access::Element* tensor) {
  fill_cells<Access>(LaunchGroup{}, grid, rows, count, cells, lanes, inverse, packed, tensor);
}

// Returns the smallest power of two of threads, at most 32, that is not below the number of accesses.
inline uint32_t threads_for(int32_t accesses) {
  uint32_t threads = 1;
  while (threads < WARP && static_cast<int32_t>(threads) < accesses) threads *= 2;
  return threads;
}

// The tensors of one call. `inverse` is null in the forward.
struct Copy {
  CellGrid grid;
  Tensor tensor, rows, packed;
  const Tensor* inverse;
  int64_t cells;

  template <class Access>
  void run(const CellGrid& units) const {
    using Element = typename Access::Element;
    const int32_t accesses = accesses_per_patch<Access>(units), per_cell = patches_per_cell(units);
    const int64_t* const list = pointer<const int64_t>(rows);
    Element *const outside = pointer<Element>(tensor), *const inside = pointer<Element>(packed);
    if (inverse) {
      const uint32_t lanes = threads_for(accesses * per_cell);
      launch_together(
          unpack_patches<Access>, (cells * lanes + THREADS - 1) / THREADS, THREADS, 0, tensor, units, list,
          rows.numel(), cells, static_cast<int32_t>(lanes), pointer<int64_t>(*inverse), inside, outside);
    } else {
      const uint32_t threads = threads_for(accesses);
      const dim3 block(threads, THREADS / threads);
      const int64_t packed_rows = rows.numel() * per_cell;
      const int64_t blocks = std::min<int64_t>((packed_rows + block.y - 1) / block.y, INT32_MAX);
      launch(pack_patches<Access>, blocks, block, 0, tensor, units, list, cells, packed_rows, outside, inside);
    }
  }

  void run() const {
    const int64_t size = tensor.element_size();
    const auto address = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()); };
    const uint64_t addresses = address(tensor) | address(packed);
    if (const int32_t channels = channels_per_access(grid, size, addresses)) {
      if (size == 2) return channels == 3 ? run<Transposed<uint16_t, 3>>(grid) : run<Transposed<uint16_t, 8>>(grid);
      return channels == 3 ? run<Transposed<uint32_t, 3>>(grid) : run<Transposed<uint32_t, 4>>(grid);
    }
    const int32_t pixels = pixels_per_access(grid, size, addresses);
    const CellGrid wide = widen(grid, pixels);
    switch (size * pixels) {
      case 1: return run<Straight<uint8_t>>(wide);
      case 2: return run<Straight<uint16_t>>(wide);
      case 4: return run<Straight<uint32_t>>(wide);
      case 8: return run<Straight<uint64_t>>(wide);
      case 16: return run<Straight<Sixteen>>(wide);
      default: SGMIM_CHECK(false, "gather_patches takes elements of 1, 2, 4, 8 or 16 bytes, got ", size);
    }
  }
};

void copy(
    const Tensor& tensor, const Tensor& rows, const Tensor& packed, const Tensor* inverse, int64_t cell, int64_t patch,
    bool zorder) {
  SGMIM_CHECK(tensor.is_cuda() && tensor.dim() == 4, "the NCHW tensor must be on a GPU and have 4 dimensions");
  SGMIM_CHECK(0 < patch && patch <= cell && cell % patch == 0, "cell ", cell, " must be a multiple of patch ", patch);
  SGMIM_CHECK(
      tensor.size(2) % cell == 0 && tensor.size(3) % cell == 0, "height and width must be multiples of cell ", cell,
      ", got ", tensor.size(2), " x ", tensor.size(3));
  const int64_t side = cell / patch, channels = tensor.size(1);
  SGMIM_CHECK(!zorder || (side & (side - 1)) == 0, "Z-order needs a power of two of patches per side, got ", side);
  SGMIM_CHECK(
      cell <= INT16_MAX && channels <= INT32_MAX / (cell * cell), "a cell of ", channels, " x ", cell, " x ", cell,
      " values is too large");
  const int64_t strides[4] = {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
  const CellGrid grid = cell_grid(channels, tensor.size(2), tensor.size(3), strides, cell, patch, zorder);
  const int64_t cells = tensor.size(0) * cells_per_image(grid);
  check_packed(rows, "rows", ScalarType::Long, tensor, rows.numel());
  check_packed(packed, "the packed patches", tensor.scalar_type(), tensor, rows.numel() * channels * cell * cell);
  if (inverse) check_packed(*inverse, "the inverse", ScalarType::Long, tensor, cells);
  if ((inverse ? tensor : packed).numel() == 0) return;
  const DeviceGuard guard(tensor.get_device_index());
  Copy{grid, tensor, rows, packed, inverse, cells}.run();
}

// input: (B, C, H, W) with any strides; rows: (n,) int64 indices of cells; out: (n * side * side, C * patch * patch).
void gather_patches(
    const Tensor& input, const Tensor& rows, const Tensor& out, int64_t cell, int64_t patch, bool zorder) {
  copy(input, rows, out, nullptr, cell, patch, zorder);
}

// Writes every pixel of grad_input. inverse (cells,), int64: workspace. The rows may be in any order, so each cell
// finds its row through their inverse. The kernel computes the inverse before a barrier across blocks, so that neither
// a fill nor a second launch is needed.
void gather_patches_backward(
    const Tensor& grad_out, const Tensor& rows, const Tensor& inverse, const Tensor& grad_input, int64_t cell,
    int64_t patch, bool zorder) {
  copy(grad_input, rows, grad_out, &inverse, cell, patch, zorder);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cuda, m) {
  m.def("gather_patches(Tensor input, Tensor rows, Tensor(a!) out, int cell, int patch, bool zorder) -> ()");
  m.def(
      "gather_patches_backward(Tensor grad_out, Tensor rows, Tensor(a!) inverse, Tensor(b!) grad_input, int cell, "
      "int patch, bool zorder) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cuda, CUDA, m) {
  m.impl("gather_patches", TORCH_BOX(&gather_patches));
  m.impl("gather_patches_backward", TORCH_BOX(&gather_patches_backward));
}

}  // namespace sgmim
