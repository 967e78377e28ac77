// Operations between the gemms of patch mergings in the coordinates of the pixels, see docs/SPEC.md, "Mergings in the
// coordinates of the pixels". Numbers in parentheses refer to its equations. Each row is processed in one pass.
//
// Rows of coordinates z_i end with a 1, the coordinate of the constant a_i: (n, q_i + 1).
#include "cpu/launch.h"
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/collapsed_merges.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"

#ifndef SGMIM_COLLAPSED_MERGES
#define SGMIM_COLLAPSED_MERGES
namespace sgmim {
struct Coordinates {
  int64_t q, stride, rows;         // coordinates in a row of x, row stride of x, merged rows of shown cells
  const float *patch_rstd, *rstd;  // (4 * rows,): r_0 if x are pixels (first merging), else null; (merged rows,): r_i
  int64_t wide;                    // columns of the result, q_i + 1
};
struct CoordinatesBackward {
  int64_t wide, width;                 // q_i + 1; n_i, the width of a normalised row
  const float* above;                  // (rows / 4, above_wide): dz of the level above, already scaled by (7), or null
  int64_t above_wide;
  const float *mean, *rstd;            // (rows,)
  // dz (rows, wide): scaled in place by (7). scale (rows,): -r_i c_i / n_i of (8). block_sums (rows, 4): dz . z of each
  // merged token, or null.
  float *dz, *scale, *block_sums;
};
struct Composition {
  const float *weight, *norm_weight, *norm_bias;  // W_i (outs, wide), g_i and β_i (wide,)
  float* constant;                                // (outs,): a_i in the forward, its gradient in the backward
  int64_t wide;
};
}  // namespace sgmim
#endif

namespace sgmim {
namespace SGMIM_ISA {

// Computes z_i by (2). For the first merging x are pixels, and z_0 is computed by (1) on the way. In the rows of hidden
// cells only the last coordinate, 1, is not 0.
template <class T>
void coordinates_rows(const T* x, T* z, const Coordinates* c, int64_t begin, int64_t end) {
  std::vector<float> row(c->wide + LANES);
  for (int64_t r = begin; r < end; ++r) {
    float* at = row.data();
    if (r < c->rows) {
      for (int64_t k = 4 * r; k < 4 * r + 4; ++k) {
        const float scale = c->rstd[r] * (c->patch_rstd ? c->patch_rstd[k] : 1.0f);
        for (int64_t i = 0; i < c->q; i += LANES)
          store(at + i, load_part(x + k * c->stride + i, part(i, c->q)) * scale);
        at += c->q;
        if (c->patch_rstd) *at++ = scale;
      }
      *at++ = c->rstd[r];
    } else {
      std::fill(row.begin(), row.end(), 0.0f);
    }
    row[c->wide - 1] = 1;
    store_row(row.data(), z + r * c->wide, c->wide);
  }
}

template <class T>
void coordinates_backward_rows(
    const T* z, const T* x, T* dx, const CoordinatesBackward* c, int64_t begin, int64_t end) {
  const int64_t inside = c->wide - 1, q = inside / 4;  // coordinates of a row without the last; of a merged token
  std::vector<float> shares(c->wide + LANES);
  for (int64_t r = begin; r < end; ++r) {
    float* dz = c->dz + r * c->wide;
    const float *above = c->above ? c->above + r / 4 * c->above_wide + r % 4 * inside : nullptr, rstd = c->rstd[r];
    for (int64_t i = 0; i < inside; i += LANES) {
      const int64_t n = part(i, inside);
      vf d = load_part(dz + i, n);
      if (above) d += load_part(above + i, n);
      store(shares.data() + i, d * load_part(z + r * c->wide + i, n));
      store_part(dz + i, d * rstd, n);
    }
    float total = shares[4 * q];
    for (int64_t k = 0; k < 4; ++k) {
      const float* block = shares.data() + k * q;
      vf sums = {};
      int64_t i = 0;
      for (; i + LANES <= q; i += LANES) sums += load(block + i);
      float sum = hsum(sums);
      for (; i < q; ++i) sum += block[i];
      if (c->block_sums) c->block_sums[4 * r + k] = sum;
      total += sum;
    }
    c->scale[r] = total * rstd / -c->width;
    const float slope = c->scale[r] * rstd;
    for (int64_t i = 0; x && i < c->width; i += LANES) {
      const int64_t at = r * c->width + i, n = part(i, c->width);
      store_part(dx + at, (load_part(x + at, n) - c->mean[r]) * slope, n);
    }
  }
}

// Computes rows of W_i diag(g_i) C, and a_i, by (5).
template <class T>
void centre_rows(T* centred, const Composition* c, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* weight = c->weight + r * c->wide;
    vf sums[4] = {}, constants[4] = {};
    for_row(c->wide, [&](int64_t i, int64_t n, int sum) SGMIM_INLINE_LAMBDA {
      const vf w = load_part(weight + i, n);
      sums[sum] += w * load_part(c->norm_weight + i, n);
      constants[sum] += w * load_part(c->norm_bias + i, n);
    });
    c->constant[r] = total(constants);
    const float mean = total(sums) / c->wide;
    for (int64_t i = 0; i < c->wide; i += LANES) {
      const int64_t n = part(i, c->wide);
      store_part(centred + r * c->wide + i, load_part(weight + i, n) * load_part(c->norm_weight + i, n) - mean, n);
    }
  }
}

// Backward of `centre_rows` by (9): replaces the gradient of its result by that of W_i, and adds those of g_i and β_i
// to sums, (2, wide).
static void centre_backward_rows(float* dcentred, float* sums, const Composition* c, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float *weight = c->weight + r * c->wide, constant = c->constant[r];
    float* d = dcentred + r * c->wide;
    vf parts[4] = {};
    for_row(c->wide, [&](int64_t i, int64_t n, int sum) SGMIM_INLINE_LAMBDA { parts[sum] += load_part(d + i, n); });
    const float mean = total(parts) / c->wide;
    for (int64_t i = 0; i < c->wide; i += LANES) {
      const int64_t n = part(i, c->wide);
      const vf w = load_part(weight + i, n), dscaled = load_part(d + i, n) - mean;
      float *dnorm_weight = sums + i, *dnorm_bias = sums + c->wide + i;
      store_part(dnorm_weight, load_part(dnorm_weight, n) + dscaled * w, n);
      store_part(dnorm_bias, load_part(dnorm_bias, n) + w * constant, n);
      store_part(d + i, dscaled * load_part(c->norm_weight + i, n) + load_part(c->norm_bias + i, n) * constant, n);
    }
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

static void coordinates(
    const Tensor& x, const std::optional<Tensor>& patch_rstd, const Tensor& rstd, const Tensor& z) {
  check_matrix(x, "x");
  check_matrix(z, "z");
  const int64_t rows = x.size(0) / 4, q = x.size(1) - !patch_rstd.has_value(), wide = z.size(1);
  check_packed(patch_rstd, "patch_rstd", ScalarType::Float, 4 * rows);
  check_packed(rstd, "rstd", ScalarType::Float, z.size(0));
  check_packed(z, "z", x.scalar_type(), z.numel());
  SGMIM_CHECK(
      x.size(0) == 4 * rows && rows <= z.size(0) && wide == 4 * (q + patch_rstd.has_value()) + 2, "x has shape ",
      x.size(0), " x ", x.size(1), ", which does not fit z of shape ", z.size(0), " x ", wide);
  const Coordinates c{q, x.size(1), rows, data<float>(patch_rstd), data<float>(rstd), wide};
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((coordinates_rows<T>));
    parallel(z.size(0), 64, [&](int64_t begin, int64_t end) { kernel(data<T>(x), data<T>(z), &c, begin, end); });
  });
}

// x and dx: (rows, width), both or neither.
static void coordinates_backward(
    const Tensor& dz, const Tensor& z, const std::optional<Tensor>& above, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& x, int64_t width, const Tensor& scale, const std::optional<Tensor>& block_sums,
    const std::optional<Tensor>& dx) {
  check_matrix(dz, "dz");
  const int64_t rows = dz.size(0), wide = dz.size(1), above_wide = 4 * (wide - 1) + 2;
  check_packed(dz, "dz", ScalarType::Float, rows * wide);
  check_packed(z, "z", z.scalar_type(), rows * wide);
  if (above.has_value()) {
    check_matrix(*above, "above");
    check_packed(above, "above", ScalarType::Float, rows / 4 * above_wide);
    SGMIM_CHECK(rows % 4 == 0 && above->size(0) == rows / 4, "above must have a quarter of the ",
                rows, " rows of dz, got ", above->size(0));
  }
  check_packed(mean, "mean", ScalarType::Float, rows);
  check_packed(rstd, "rstd", ScalarType::Float, rows);
  check_packed(scale, "scale", ScalarType::Float, rows);
  check_packed(block_sums, "block_sums", ScalarType::Float, 4 * rows);
  check_packed(x, "x", z.scalar_type(), rows * width);
  check_packed(dx, "dx", z.scalar_type(), rows * width);
  SGMIM_CHECK(wide % 4 == 2, "dz must have two more columns than a multiple of 4, got ", wide);
  SGMIM_CHECK(x.has_value() == dx.has_value(), "expected both x and dx, or neither");
  const CoordinatesBackward c{
      wide, width, data<float>(above), above_wide, data<float>(mean), data<float>(rstd), data<float>(dz),
      data<float>(scale), data<float>(block_sums)};
  dispatch_float(z, "z", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((coordinates_backward_rows<T>));
    parallel(rows, 16, [&](int64_t begin, int64_t end) {
      kernel(data<T>(z), data<T>(x), data<T>(dx), &c, begin, end);
    });
  });
}

static Composition composition(
    const Tensor& weight, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& constant) {
  check_matrix(weight, "weight");
  const int64_t outs = weight.size(0), wide = weight.size(1);
  check_packed(weight, "weight", ScalarType::Float, outs * wide);
  check_packed(norm_weight, "norm_weight", ScalarType::Float, wide);
  check_packed(norm_bias, "norm_bias", ScalarType::Float, wide);
  check_packed(constant, "constant", ScalarType::Float, outs);
  return {data<float>(weight), data<float>(norm_weight), data<float>(norm_bias), data<float>(constant), wide};
}

static void centre(
    const Tensor& weight, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& centred,
    const Tensor& constant) {
  const Composition c = composition(weight, norm_weight, norm_bias, constant);
  check_packed(centred, "centred", centred.scalar_type(), weight.numel());
  dispatch_float(centred, "centred", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((centre_rows<T>));
    parallel(weight.size(0), 8, [&](int64_t begin, int64_t end) { kernel(data<T>(centred), &c, begin, end); });
  });
}

static void centre_backward(
    const Tensor& dcentred, const Tensor& weight, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensor& dconstant, const Tensor& sums) {
  const Composition c = composition(weight, norm_weight, norm_bias, dconstant);
  check_packed(dcentred, "dcentred", ScalarType::Float, weight.numel());
  check_packed(sums, "sums", ScalarType::Float, 2 * c.wide);
  const auto kernel = SGMIM_SELECT((centre_backward_rows));
  column_sums(weight.size(0), 2 * c.wide, data<float>(sums), [&](int64_t begin, int64_t end, float* partial) {
    kernel(data<float>(dcentred), partial, &c, begin, end);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def("coordinates(Tensor x, Tensor? patch_rstd, Tensor rstd, Tensor(a!) z) -> ()");
  m.def(
      "coordinates_backward(Tensor(a!) dz, Tensor z, Tensor? above, Tensor mean, Tensor rstd, Tensor? x, int width, "
      "Tensor(b!) scale, Tensor(c!)? block_sums, Tensor(d!)? dx) -> ()");
  m.def("centre(Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor(a!) centred, Tensor(b!) constant) -> ()");
  m.def(
      "centre_backward(Tensor(a!) dcentred, Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor dconstant, "
      "Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("coordinates", TORCH_BOX(&coordinates));
  m.impl("coordinates_backward", TORCH_BOX(&coordinates_backward));
  m.impl("centre", TORCH_BOX(&centre));
  m.impl("centre_backward", TORCH_BOX(&centre_backward));
}

#endif
}  // namespace sgmim
