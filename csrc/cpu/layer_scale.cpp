// Backward of layer scale, which multiplies the result of a linear layer by one number per output.
#include "cpu/launch.h"
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/layer_scale.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"

namespace sgmim {
namespace SGMIM_ISA {

// Multiplies each row of dweight (rows, width) by its scale, and computes the dot products of the rows before that with
// those of `weight`.
void layer_scale_backward_rows(
    const float* scale, const float* weight, float* dweight, float* dots, int64_t width, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* w = weight + r * width;
    float* dw = dweight + r * width;
    vf sums[4] = {};
    for_row(width, [&](int64_t i, int64_t n, int part) SGMIM_INLINE_LAMBDA {
      const vf g = load_part(dw + i, n);  // lanes past the width are zero
      sums[part] += g * load_part(w + i, n);
      store_part(dw + i, g * scale[r], n);
    });
    dots[r] = total(sums);
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

// From the gradients of scale * weight (rows, width) and scale * bias (rows,), computes those of weight and bias in
// place, and the gradient of the scale.
static void layer_scale_backward(
    const Tensor& scale, const Tensor& weight, const Tensor& dweight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& dbias, const Tensor& dscale) {
  check_matrix(weight, "weight");
  const int64_t rows = weight.size(0), width = weight.size(1);
  check_packed(scale, "scale", ScalarType::Float, rows);
  check_packed(weight, "weight", ScalarType::Float, rows * width);
  check_packed(dweight, "dweight", ScalarType::Float, rows * width);
  check_packed(bias, "bias", ScalarType::Float, rows);
  check_packed(dbias, "dbias", ScalarType::Float, rows);
  check_packed(dscale, "dscale", ScalarType::Float, rows);
  SGMIM_CHECK(bias.has_value() || !dbias.has_value(), "dbias is given without bias");
  const auto kernel = SGMIM_SELECT((layer_scale_backward_rows));
  parallel(rows, 16, [&](int64_t begin, int64_t end) {
    kernel(data<float>(scale), data<float>(weight), data<float>(dweight), data<float>(dscale), width, begin, end);
  });
  for (int64_t r = 0; dbias.has_value() && r < rows; ++r) {
    float& gradient = data<float>(dbias)[r];
    data<float>(dscale)[r] += gradient * data<float>(bias)[r];
    gradient *= data<float>(scale)[r];
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def(
      "layer_scale_backward(Tensor scale, Tensor weight, Tensor(a!) dweight, Tensor? bias, Tensor(b!)? dbias, "
      "Tensor(c!) dscale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("layer_scale_backward", TORCH_BOX(&layer_scale_backward));
}

#endif
}  // namespace sgmim
