// L1 or L2 loss between predicted cells and the pixels of a map, which are read in place. Saves for the backward the
// sign of every difference (L1), or the difference itself in place of the prediction (L2).
//
// A row of the prediction is one cell, in pixel-shuffle order: channel * cell^2 + i * cell + j. Predictions and pixels
// are read from memory once (normalised pixels stay in cache between the passes); one byte per prediction, or the
// prediction, is written. Row sums are float64 and are added in order: the total does not depend on the threads.
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
  const bool* valid;  // (images, channels, height, width), contiguous, or null: all pixels are valid
  int64_t channels, height, width, cell;
  int64_t strides[4];
  bool normalized;  // whether the pixels of each cell are standardised: minus their mean, divided by their deviation
};
}  // namespace sgmim
#endif

namespace sgmim {
namespace SGMIM_ISA {

// One cell of a map. row(c, i) returns its i-th row of pixels in channel c, copied to `scratch` if not contiguous.
struct Cell {
  const Pixels* map;
  int64_t image, y, x;
  float* scratch;

  static Cell of(const Pixels* map, int64_t cell, float* scratch) {
    const int64_t across = map->width / map->cell, down = map->height / map->cell;
    return {map, cell / (across * down), cell / across % down * map->cell, cell % across * map->cell, scratch};
  }

  const float* row(int64_t c, int64_t i) const {
    const int64_t *strides = map->strides, step = strides[3];
    const float* pixels = map->values + image * strides[0] + c * strides[1] + (y + i) * strides[2] + x * step;
    if (step == 1) return pixels;
    for (int64_t j = 0; j < map->cell; ++j) scratch[j] = pixels[j * step];
    return scratch;
  }

  const bool* valid(int64_t c, int64_t i) const {
    return map->valid ? map->valid + ((image * map->channels + c) * map->height + y + i) * map->width + x : nullptr;
  }
};

// Computes the mean of all pixels of a cell and 1 / sqrt(unbiased variance + 1e-6), in two passes.
SGMIM_INLINE void pixel_moments(const Cell& cell, float& mean, float& inverse) {
  const int64_t s = cell.map->cell, channels = cell.map->channels;
  const double count = channels * s * s;
  double sum = 0, squares = 0;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < s; ++i) {
      const float* pixels = cell.row(c, i);
      vf part_sum = {};
      for (int64_t j = 0; j < s; j += LANES) part_sum += load_part(pixels + j, part(j, s));
      sum += hsum(part_sum);
    }
  mean = sum / count;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < s; ++i) {
      const float* pixels = cell.row(c, i);
      vf part_sum = {};
      for (int64_t j = 0; j < s; j += LANES) {
        const int64_t n = part(j, s);
        const vf d = zero_tail(load_part(pixels + j, n) - mean, n);
        part_sum += d * d;
      }
      squares += hsum(part_sum);
    }
  inverse = 1 / __builtin_sqrt(squares / (count - 1) + 1e-6);
}

template <class T>
void distance_rows(
    T* prediction,         // (count, channels * cell^2); if signs is null, replaced by the differences
    const int64_t* cells,  // (count,) indices into images x cell rows x cell columns
    const Pixels* map,
    int8_t* signs,   // (count, channels * cell^2): sign of prediction - pixel, 0 where not valid; null for L2
    double* sums,    // (count,): sum of |prediction - pixel|, or of its square
    int64_t begin, int64_t end) {
  const int64_t s = map->cell;
  std::vector<float> scratch(s + LANES);
  for (int64_t r = begin; r < end; ++r) {
    const Cell cell = Cell::of(map, cells[r], scratch.data());
    float mean = 0, inverse = 1;
    if (map->normalized) pixel_moments(cell, mean, inverse);
    double total = 0;
    for (int64_t c = 0; c < map->channels; ++c) {
      vf sum = {};
      for (int64_t i = 0; i < s; ++i) {
        const int64_t at = (r * map->channels + c) * s * s + i * s;
        const float* pixels = cell.row(c, i);
        const bool* valid = cell.valid(c, i);
        for (int64_t j = 0; j < s; j += LANES) {
          const int64_t n = part(j, s);
          const vf target = zero_tail((load_part(pixels + j, n) - mean) * inverse, n);
          vf d = load_part(prediction + at + j, n) - target;
          if (valid) {
            for (int64_t l = 0; l < n; ++l)
              if (!valid[j + l]) d[l] = 0;
          }
          if (!signs) {
            sum += d * d;
            store_part(prediction + at + j, d, n);
            continue;
          }
          sum += vabs(d);
          // vector comparisons return -1 for true
          const vb sign = __builtin_convertvector((d < 0.0f) - (d > 0.0f), vb);
          __builtin_memcpy(signs + at + j, &sign, n);
        }
      }
      total += hsum(sum);
    }
    sums[r] = total;
  }
}

// Writes the signs times `scale`, as an operand of gemms, and adds the unscaled signs to the column sums, which are
// exact in float up to 2^24 rows.
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

static void distance(
    const Tensor& prediction, const Tensor& cells, const Tensor& target, const std::optional<Tensor>& valid,
    int64_t cell, bool normalized, const std::optional<Tensor>& signs, const Tensor& sum) {
  check_matrix(prediction, "prediction");
  SGMIM_CHECK(
      target.dim() == 4 && target.scalar_type() == ScalarType::Float,
      "target must be float32 of shape (B, S, H, W), got ", torch::headeronly::toString(target.scalar_type()), " with ",
      target.dim(), " dimensions");
  SGMIM_CHECK(
      0 < cell && cell <= INT16_MAX && target.size(2) % cell == 0 && target.size(3) % cell == 0,
      "height and width must be multiples of cell ", cell, ", got ", target.size(2), " x ", target.size(3));
  SGMIM_CHECK(
      prediction.size(1) == target.size(1) * cell * cell && prediction.size(0) == cells.numel(),
      "prediction must have shape (", cells.numel(), ", ", target.size(1) * cell * cell, "), got (", prediction.size(0),
      ", ", prediction.size(1), ")");
  check_packed(valid, "valid", ScalarType::Bool, target.numel());
  check_packed(signs, "signs", ScalarType::Char, prediction.numel());
  check_packed(sum, "sum", ScalarType::Double, 1);
  places(cells, target.size(0) * (target.size(2) / cell) * (target.size(3) / cell), "rows");
  Pixels map{
      data<float>(target), data<bool>(valid), target.size(1), target.size(2), target.size(3), cell, {}, normalized};
  for (int64_t i = 0; i < 4; ++i) map.strides[i] = target.stride(i);
  const int64_t count = prediction.size(0);
  std::vector<double> sums(count);
  dispatch_float(prediction, "prediction", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((distance_rows<T>));
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
      "distance(Tensor(a!) prediction, Tensor cells, Tensor target, Tensor? valid, int cell, bool normalized, "
      "Tensor(b!)? signs, Tensor(c!) sum) -> ()");
  m.def("expand_signs(Tensor signs, float scale, Tensor(a!) out, Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("distance", TORCH_BOX(&distance));
  m.impl("expand_signs", TORCH_BOX(&expand_signs));
}

#endif
}  // namespace sgmim
