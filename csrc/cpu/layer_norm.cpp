// LayerNorm over rows, with what surrounds it in the guidance branch: the gather of the rows it reads, the residual
// added before it, the residual gradient added after it. Used by relational_guidance and structure_embed.
//
// Forward:  t = x[rows] + addend;  y = (t - mean) * rstd * weight + bias.       Reads t (+ addend), writes y (and t).
// Backward: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + residual, g = dy * weight, and column sums for the
//           weight and bias; y is written again for the weight gradient of the product that read it.
#include "cpu/launch.h"
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/layer_norm.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"

namespace sgmim {
namespace SGMIM_ISA {

template <class X, class T>
void layer_norm_rows(
    const X* x,           // (*, width)
    const int64_t* rows,  // (count,) rows of x, or null for 0..count-1
    const T* addend,      // (count, width), or null
    const float* weight,  // (width,)
    const float* bias,    // (width,)
    float eps,
    T* y,         // (count, width)
    T* sum,       // (count, width): x[rows] + addend; null without addend
    float* mean,  // (count,)
    float* rstd,  // (count,)
    int64_t width, int64_t begin, int64_t end) {
  std::vector<float> scratch(width + LANES);
  float* t = scratch.data();
  for (int64_t r = begin; r < end; ++r) {
    load_row(x + (rows ? rows[r] : r) * width, t, width);
    if (addend) {
      add_row(addend + r * width, t, width);
      store_row(t, sum + r * width, width);
    }
    moments(t, width, eps, mean[r], rstd[r]);
    normalize_row(t, width, mean[r], rstd[r]);
    affine_row(t, weight, bias, y + r * width, width);
  }
}

template <class X, class T>
void layer_norm_backward_rows(
    const T* dy,          // (count, width)
    const X* x,           // (*, width): what was normalised
    const int64_t* rows,  // (count,) rows of x, or null
    const float* mean, const float* rstd, const float* weight, const float* bias,
    const T* residual,  // (count, width): added to dx, or null
    T* dx,              // (count, width)
    T* y,               // (count, width): the forward's output again, or null
    float* sums,        // (2 or 3, width): of dweight, dbias and, where `sum_dx`, dx
    bool sum_dx, int64_t width, int64_t begin, int64_t end) {
  std::vector<float> scratch(2 * (width + LANES));
  float* xhat = scratch.data();
  float* g = xhat + width + LANES;
  for (int64_t r = begin; r < end; ++r) {
    load_row(x + (rows ? rows[r] : r) * width, xhat, width);
    normalize_row(xhat, width, mean[r], rstd[r]);
    if (y) affine_row(xhat, weight, bias, y + r * width, width);
    load_row(dy + r * width, g, width);
    norm_backward_row(g, xhat, weight, rstd[r], sums, sums + width, width);
    if (residual) add_row(residual + r * width, g, width);
    if (sum_dx) accumulate_row(g, sums + 2 * width, width);
    store_row(g, dx + r * width, width);
  }
}

template <class T>
void statistics_rows(
    const T* x,   // (count, width)
    float* mean,  // (count,)
    float* rstd,  // (count,)
    float eps, int64_t width, int64_t begin, int64_t end) {
  std::vector<float> scratch(width + LANES);
  for (int64_t r = begin; r < end; ++r) {
    load_row(x + r * width, scratch.data(), width);
    moments(scratch.data(), width, eps, mean[r], rstd[r]);
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

// What both directions read: x (*, width), at `rows` or all of it.
static void check_norm(
    const Tensor& x, const std::optional<Tensor>& rows, const Tensor& weight, const Tensor& bias, const Tensor& mean,
    const Tensor& rstd, int64_t count, int64_t width) {
  check_matrix(x, "x");
  SGMIM_CHECK(x.size(1) == width, "x must have ", width, " columns, got ", x.size(1));
  if (rows.has_value()) check_rows(*rows, x.size(0), "visible.index");
  const int64_t listed = rows.has_value() ? rows->numel() : x.size(0);
  SGMIM_CHECK(listed == count, "x must give ", count, " rows, got ", listed);
  for (const auto& [tensor, name] : {std::pair{&weight, "weight"}, std::pair{&bias, "bias"}})
    check_packed(*tensor, name, ScalarType::Float, width);
  for (const auto& [tensor, name] : {std::pair{&mean, "mean"}, std::pair{&rstd, "rstd"}})
    check_packed(*tensor, name, ScalarType::Float, count);
}

static void layer_norm(
    const Tensor& x, const std::optional<Tensor>& rows, const std::optional<Tensor>& addend, const Tensor& weight,
    const Tensor& bias, double eps, const Tensor& y, const std::optional<Tensor>& sum, const Tensor& mean,
    const Tensor& rstd) {
  check_matrix(y, "y");
  const int64_t width = y.size(1), count = y.size(0);
  check_norm(x, rows, weight, bias, mean, rstd, count, width);
  check_packed(addend, "addend", y.scalar_type(), count * width);
  check_packed(sum, "sum", y.scalar_type(), count * width);
  SGMIM_CHECK(sum.has_value() == addend.has_value(), "addend and sum must both be there, or neither");
  dispatch_float(x, "x", [&](auto x_type) {
    dispatch_float(y, "y", [&](auto type) {
      using X = decltype(x_type);
      using T = decltype(type);
      const auto kernel = SGMIM_SELECT((layer_norm_rows<X, T>));
      parallel(count, 8, [&](int64_t begin, int64_t end) {
        kernel(data<X>(x), data<int64_t>(rows), data<T>(addend), data<float>(weight), data<float>(bias), eps,
               data<T>(y), data<T>(sum), data<float>(mean), data<float>(rstd), width, begin, end);
      });
    });
  });
}

static void layer_norm_backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& rows, const Tensor& mean, const Tensor& rstd,
    const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual, const Tensor& dx,
    const std::optional<Tensor>& y, const Tensor& sums) {
  check_matrix(dy, "dy");
  const int64_t width = dy.size(1), count = dy.size(0);
  check_norm(x, rows, weight, bias, mean, rstd, count, width);
  check_packed(residual, "residual", dy.scalar_type(), count * width);
  check_packed(dx, "dx", dy.scalar_type(), count * width);
  check_packed(y, "y", dy.scalar_type(), count * width);
  check_packed(sums, "sums", ScalarType::Float, (sums.size(0) == 3 ? 3 : 2) * width);
  dispatch_float(x, "x", [&](auto x_type) {
    dispatch_float(dy, "dy", [&](auto type) {
      using X = decltype(x_type);
      using T = decltype(type);
      const auto kernel = SGMIM_SELECT((layer_norm_backward_rows<X, T>));
      column_sums(count, sums.numel(), data<float>(sums), [&](int64_t begin, int64_t end, float* partial) {
        kernel(data<T>(dy), data<X>(x), data<int64_t>(rows), data<float>(mean), data<float>(rstd),
               data<float>(weight), data<float>(bias), data<T>(residual), data<T>(dx), data<T>(y), partial,
               sums.size(0) == 3, width, begin, end);
      });
    });
  });
}

// The statistics alone, (2, count): mean and 1 / sqrt(variance + eps).
static void row_statistics(const Tensor& x, double eps, const Tensor& statistics) {
  check_matrix(x, "x");
  const int64_t width = x.size(1), count = x.size(0);
  check_packed(statistics, "statistics", ScalarType::Float, 2 * count);
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((statistics_rows<T>));
    parallel(count, 8, [&](int64_t begin, int64_t end) {
      kernel(data<T>(x), data<float>(statistics), data<float>(statistics) + count, eps, width, begin, end);
    });
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def("row_statistics(Tensor x, float eps, Tensor(a!) statistics) -> ()");
  m.def(
      "layer_norm(Tensor x, Tensor? rows, Tensor? addend, Tensor weight, Tensor bias, float eps, Tensor(a!) y, "
      "Tensor(b!)? sum, Tensor(c!) mean, Tensor(d!) rstd) -> ()");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor? rows, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, "
      "Tensor? residual, Tensor(a!) dx, Tensor(b!)? y, Tensor(c!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&row_statistics));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

#endif
}  // namespace sgmim
