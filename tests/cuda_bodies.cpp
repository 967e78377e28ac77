// The bodies of the CUDA kernels with the host as the device: a "group" of threads is played one rank after another.
// test_cuda_bodies.py compiles this file; it knows neither torch nor CUDA.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "gather_index.h"

namespace py = pybind11;

namespace {

struct Rank {
  int32_t rank_, size_;
  int32_t rank() const { return rank_; }
  int32_t size() const { return size_; }
};

template <class Element>
void copy_patches(
    py::array_t<Element> tensor, py::array_t<int64_t> cells, py::array_t<Element> packed, int32_t cell, int32_t patch,
    bool zorder, bool scatter, int32_t threads) {
  const auto stride = [&](int axis) { return static_cast<int64_t>(tensor.strides(axis)) / int64_t{sizeof(Element)}; };
  const sgmim::CellGrid grid{tensor.shape(2) / cell, tensor.shape(3) / cell, stride(0), stride(1), stride(2), stride(3),
                             cell, patch, static_cast<int32_t>(tensor.shape(1)), zorder};
  for (int64_t row = 0; row < cells.size() * sgmim::patches_per_cell(grid); ++row)
    for (int32_t rank = 0; rank < threads; ++rank) {
      const Rank group{rank, threads};
      if (scatter)
        sgmim::copy_patch<true>(group, grid, cells.data(), row, tensor.mutable_data(), packed.mutable_data());
      else
        sgmim::copy_patch<false>(group, grid, cells.data(), row, tensor.mutable_data(), packed.mutable_data());
    }
}

}  // namespace

PYBIND11_MODULE(cuda_bodies, m) {
  m.def("copy_patches", &copy_patches<double>, py::arg("tensor").noconvert(), py::arg("cells").noconvert(),
        py::arg("packed").noconvert(), py::arg("cell"), py::arg("patch"), py::arg("zorder"), py::arg("scatter"),
        py::arg("threads"));
  m.def("copy_patches", &copy_patches<uint16_t>, py::arg("tensor").noconvert(), py::arg("cells").noconvert(),
        py::arg("packed").noconvert(), py::arg("cell"), py::arg("patch"), py::arg("zorder"), py::arg("scatter"),
        py::arg("threads"));
  m.def("patch_corner", [](int64_t cell_number, int32_t order, int64_t down, int64_t across, int64_t stride_image,
                           int64_t stride_row, int32_t cell, int32_t patch, bool zorder) {
    return sgmim::patch_corner({down, across, stride_image, 0, stride_row, 1, cell, patch, 1, zorder}, cell_number, order);
  });
}
