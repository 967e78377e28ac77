// L1 between predicted cells and the pixels of a map read in place, and the sign of every difference.
//
// One row is one cell: channel * cell^2 + i * cell + j (pixel-shuffle order). Reads the predictions and the pixels
// once; writes one byte per prediction; the row sums go to float64, so the total does not depend on the threads.
#include "cpu/launch.h"
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/linear_l1.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"

#ifndef SGMIM_PIXELS
#define SGMIM_PIXELS
namespace sgmim {
// A map of pixels (images, channels, height, width), read cell by cell.
struct Pixels {
  const float* values;
  const bool* valid;  // like values, contiguous, or null: everything counts
  int64_t channels, height, width, cell;
  int64_t strides[4];
};
}  // namespace sgmim
#endif

namespace sgmim {
namespace SGMIM_ISA {

template <class T>
void l1_rows(
    const T* prediction,   // (count, channels * cell^2)
    const int64_t* cells,  // (count,) indices into images x cell rows x cell columns
    const Pixels* map,
    int8_t* signs,   // (count, channels * cell^2): sign of prediction - pixel, 0 where not valid
    double* sums,    // (count,) sum of |prediction - pixel|
    int64_t begin, int64_t end) {
  const int64_t s = map->cell, across = map->width / s, down = map->height / s;
  std::vector<float> scratch(s + LANES);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t x = cells[r] % across, y = cells[r] / across % down, image = cells[r] / (across * down);
    double total = 0;
    for (int64_t c = 0; c < map->channels; ++c) {
      vf sum = {};
      for (int64_t i = 0; i < s; ++i) {
        const int64_t at = (r * map->channels + c) * s * s + i * s;
        const int64_t row = y * s + i;
        const float* pixels = map->values + image * map->strides[0] + c * map->strides[1] + row * map->strides[2] +
                              x * s * map->strides[3];
        if (map->strides[3] != 1) {
          for (int64_t j = 0; j < s; ++j) scratch[j] = pixels[j * map->strides[3]];
          pixels = scratch.data();
        }
        const bool* valid =
            map->valid ? map->valid + ((image * map->channels + c) * map->height + row) * map->width + x * s : nullptr;
        for (int64_t j = 0; j < s; j += LANES) {
          const int64_t n = part(j, s);
          const vf target = load_part(pixels + j, n);
          vf d = load_part(prediction + at + j, n) - target;
          if (valid) {
            for (int64_t l = 0; l < n; ++l)
              if (!valid[j + l]) d[l] = 0;
          }
          sum += vabs(d);
          // comparisons give -1 where true
          const vb sign = __builtin_convertvector((d < 0.0f) - (d > 0.0f), vb);
          __builtin_memcpy(signs + at + j, &sign, n);
        }
      }
      total += hsum(sum);
    }
    sums[r] = total;
  }
}

// Signs times `scale` as the products' operand, and their column sums (exact in float up to 2^24 rows).
template <class T>
void expand_sign_rows(
    const int8_t* signs, float scale, T* out, float* sums, int64_t width, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t i = 0; i < width; i += LANES) {
      const int64_t n = part(i, width), at = r * width + i;
      vb sign = {};
      __builtin_memcpy(&sign, signs + at, n);
      const vf v = __builtin_convertvector(sign, vf);
      store_part(sums + i, load_part(sums + i, n) + v, n);
      store_part(out + at, v * scale, n);
    }
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

static void l1(
    const Tensor& prediction, const Tensor& cells, const Tensor& target, const std::optional<Tensor>& valid,
    int64_t cell, const Tensor& signs, const Tensor& sum) {
  check_matrix(prediction, "prediction");
  SGMIM_CHECK(
      target.dim() == 4 && target.scalar_type() == ScalarType::Float, "target must be float32 (B, S, H, W), got ",
      torch::headeronly::toString(target.scalar_type()), " of ", target.dim(), " dimensions");
  SGMIM_CHECK(
      0 < cell && cell <= INT16_MAX && target.size(2) % cell == 0 && target.size(3) % cell == 0,
      "height and width must be multiples of cell ", cell, ", got ", target.size(2), " x ", target.size(3));
  SGMIM_CHECK(
      prediction.size(1) == target.size(1) * cell * cell && prediction.size(0) == cells.numel(),
      "prediction must be (", cells.numel(), ", ", target.size(1) * cell * cell, "), got (", prediction.size(0), ", ",
      prediction.size(1), ")");
  check_packed(valid, "valid", ScalarType::Bool, target.numel());
  check_packed(signs, "signs", ScalarType::Char, prediction.numel());
  check_packed(sum, "sum", ScalarType::Double, 1);
  places(cells, target.size(0) * (target.size(2) / cell) * (target.size(3) / cell), "rows");
  Pixels map{data<float>(target), data<bool>(valid), target.size(1), target.size(2), target.size(3), cell, {}};
  for (int64_t i = 0; i < 4; ++i) map.strides[i] = target.stride(i);
  const int64_t count = prediction.size(0);
  std::vector<double> sums(count);
  dispatch_float(prediction, "prediction", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((l1_rows<T>));
    parallel(count, 1, [&](int64_t begin, int64_t end) {
      kernel(data<T>(prediction), data<int64_t>(cells), &map, data<int8_t>(signs), sums.data(), begin, end);
    });
  });
  double total = 0;
  for (double row : sums) total += row;
  *data<double>(sum) = total;
}

static void expand_signs(const Tensor& signs, double scale, const Tensor& out, const Tensor& sums) {
  check_matrix(signs, "signs");
  const int64_t width = signs.size(1);
  check_packed(signs, "signs", ScalarType::Char, signs.numel());
  check_packed(out, "out", out.scalar_type(), signs.numel());
  check_packed(sums, "sums", ScalarType::Float, width);
  dispatch_float(out, "out", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((expand_sign_rows<T>));
    column_sums(signs.size(0), width, data<float>(sums), [&](int64_t begin, int64_t end, float* partial) {
      kernel(data<int8_t>(signs), scale, data<T>(out), partial, width, begin, end);
    });
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def(
      "l1(Tensor prediction, Tensor cells, Tensor target, Tensor? valid, int cell, Tensor(a!) signs, "
      "Tensor(b!) sum) -> ()");
  m.def("expand_signs(Tensor signs, float scale, Tensor(a!) out, Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("l1", TORCH_BOX(&l1));
  m.impl("expand_signs", TORCH_BOX(&expand_signs));
}

#endif
}  // namespace sgmim
