// LayerNorm over rows, fused with the operations around it in the guidance branch: the gather of its input rows, the
// residual added before it, and the residual gradient added after it. Used by relational_guidance and structure_embed.
//
// Forward:  t = x[rows] + addend;  y = (t - mean) * rstd * weight + bias + residual.  Writes y and, with an addend, t.
// Backward: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + residual, where g = dy * weight; also column sums for
//           dweight, dbias, the residual and dx. Recomputes y for the wgrad of the gemm that read it. The residual and
//           dx may be float32 where dy is bfloat16, as in a float32 residual stream, which is never rounded.
#include "cpu/launch.h"

#ifndef SGMIM_NORM_BACKWARD
#define SGMIM_NORM_BACKWARD
namespace sgmim {
// Arguments of the backward.
template <class X, class T, class R>
struct NormBackward {
  const T* dy;          // (count, width)
  const X* x;           // (*, width): the input of the norm
  const int64_t* rows;  // (count,) rows of x, or null
  const float *mean, *rstd, *weight, *bias;
  const R* residual;  // (count, width): added to dx, or null
  R* dx;              // (count, width); may be dy
  T* y;               // (count, width): receives the forward's output again, or null
  bool sum_residual, sum_dx;
  int64_t width;
};
}  // namespace sgmim
#endif

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
    const T* residual,    // (count, width): added to what is normalised, or null
    float eps,
    T* y,         // (count, width)
    T* sum,       // (count, width): receives x[rows] + addend; null without addend
    float* mean,  // (count,)
    float* rstd,  // (count,)
    int64_t width, int64_t begin, int64_t end) {
  std::vector<float> scratch(width + LANES);
  float* t = scratch.data();
  for (int64_t r = begin; r < end; ++r) {
    const X* from = x + (rows ? rows[r] : r) * width;
    vf sums[4] = {};
    for_row(width, [&](int64_t i, int64_t n, int part) SGMIM_INLINE_LAMBDA {
      vf v = load_part(from + i, n);
      if (addend) {
        v += load_part(addend + r * width + i, n);
        store_part(sum + r * width + i, v, n);
      }
      store(t + i, v);
      sums[part] += v;
    });
    const float row_mean = total(sums) / width, row_rstd = compute_rstd(t, width, row_mean, eps);
    mean[r] = row_mean;
    rstd[r] = row_rstd;
    for_row(width, [&](int64_t i, int64_t n, int) SGMIM_INLINE_LAMBDA {
      const vf xhat = (load(t + i) - row_mean) * row_rstd;
      vf result = xhat * load_part(weight + i, n) + load_part(bias + i, n);
      if (residual) result += load_part(residual + r * width + i, n);
      store_part(y + r * width + i, result, n);
    });
  }
}

// Backward of ROWS rows together, so that the column sums are read and written once for all of them. sums (2 to 4,
// width): of dweight, dbias and, where requested, the residual and dx. The second pass recomputes the values of the
// first instead of storing them: a store takes twice as long as a load.
template <int ROWS, class X, class T, class R>
SGMIM_INLINE void norm_backward_few(const NormBackward<X, T, R>& n, int64_t first, float* sums) {
  const int64_t width = n.width, at = first * width;
  const X* from[ROWS];
  float mean[ROWS], rstd[ROWS], mean_g[ROWS], mean_product[ROWS];
  vf of_g[ROWS][2] = {}, of_product[ROWS][2] = {};
  for (int r = 0; r < ROWS; ++r) {
    from[r] = n.x + (n.rows ? n.rows[first + r] : first + r) * width;
    mean[r] = n.mean[first + r];
    rstd[r] = n.rstd[first + r];
  }
  for_row(width, [&](int64_t i, int64_t count, int part) SGMIM_INLINE_LAMBDA {
    const vf w = load_part(n.weight + i, count), b = load_part(n.bias + i, count);
    vf dweight = load_part(sums + i, count), dbias = load_part(sums + width + i, count);
    for (int r = 0; r < ROWS; ++r) {
      const vf normal = (load_part(from[r] + i, count) - mean[r]) * rstd[r];
      const vf grad = load_part(n.dy + at + r * width + i, count), g = grad * w;  // lanes past the width are zero
      if (n.y) store_part(n.y + at + r * width + i, normal * w + b, count);
      dweight += grad * normal;
      dbias += grad;
      of_g[r][part / 2] += g;
      of_product[r][part / 2] += g * normal;
    }
    store_part(sums + i, dweight, count);
    store_part(sums + width + i, dbias, count);
  });
  for (int r = 0; r < ROWS; ++r) {
    mean_g[r] = hsum(of_g[r][0] + of_g[r][1]) / width;
    mean_product[r] = hsum(of_product[r][0] + of_product[r][1]) / width;
  }
  for_row(width, [&](int64_t i, int64_t count, int) SGMIM_INLINE_LAMBDA {
    const vf w = load_part(n.weight + i, count);
    vf of_residual = {}, of_dx = {};
    for (int r = 0; r < ROWS; ++r) {
      const int64_t here = at + r * width + i;
      const vf normal = (load_part(from[r] + i, count) - mean[r]) * rstd[r];
      vf d = (load_part(n.dy + here, count) * w - mean_g[r] - normal * mean_product[r]) * rstd[r];
      if (n.residual) {
        const vf added = load_part(n.residual + here, count);
        of_residual += added;
        d += added;
      }
      of_dx += d;
      store_part(n.dx + here, d, count);
    }
    float* next = sums + 2 * width + i;
    if (n.sum_residual) {
      store_part(next, load_part(next, count) + of_residual, count);
      next += width;
    }
    if (n.sum_dx) store_part(next, load_part(next, count) + of_dx, count);
  });
}

template <class X, class T, class R>
void layer_norm_backward_rows(const NormBackward<X, T, R>* norm, float* sums, int64_t begin, int64_t end) {
  int64_t r = begin;
  for (; r + 2 <= end; r += 2) norm_backward_few<2>(*norm, r, sums);
  if (r < end) norm_backward_few<1>(*norm, r, sums);
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

// Checks the arguments that forward and backward share: `count` rows of x (*, width), those in `rows` or all of them.
static void check_norm(
    const Tensor& x, const std::optional<Tensor>& rows, const Tensor& weight, const Tensor& bias,
    const Tensor& statistics, int64_t count, int64_t width) {
  check_matrix(x, "x");
  SGMIM_CHECK(x.size(1) == width, "x must have ", width, " columns, got ", x.size(1));
  if (rows.has_value()) check_rows(*rows, x.size(0), "visible.index");
  const int64_t listed = rows.has_value() ? rows->numel() : x.size(0);
  SGMIM_CHECK(listed == count, "visible.index, or x without it, must have ", count, " rows, got ", listed);
  for (const auto& [tensor, name] : {std::pair{&weight, "weight"}, std::pair{&bias, "bias"}})
    check_packed(*tensor, name, ScalarType::Float, width);
  check_packed(statistics, "statistics", ScalarType::Float, 2 * count);
}

static void layer_norm(
    const Tensor& x, const std::optional<Tensor>& rows, const std::optional<Tensor>& addend, const Tensor& weight,
    const Tensor& bias, const std::optional<Tensor>& residual, double eps, const Tensor& y,
    const std::optional<Tensor>& sum, const Tensor& statistics) {
  check_matrix(y, "y");
  const int64_t width = y.size(1), count = y.size(0);
  check_norm(x, rows, weight, bias, statistics, count, width);
  check_packed(addend, "addend", y.scalar_type(), count * width);
  check_packed(residual, "residual", y.scalar_type(), count * width);
  check_packed(sum, "sum", y.scalar_type(), count * width);
  SGMIM_CHECK(sum.has_value() == addend.has_value(), "expected both addend and sum, or neither");
  dispatch_float(x, "x", [&](auto x_type) {
    dispatch_float(y, "y", [&](auto type) {
      using X = decltype(x_type);
      using T = decltype(type);
      const auto kernel = SGMIM_SELECT((layer_norm_rows<X, T>));
      parallel(count, 8, [&](int64_t begin, int64_t end) {
        kernel(data<X>(x), data<int64_t>(rows), data<T>(addend), data<float>(weight), data<float>(bias),
               data<T>(residual), eps, data<T>(y), data<T>(sum), data<float>(statistics),
               data<float>(statistics) + count, width, begin, end);
      });
    });
  });
}

static void layer_norm_backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& rows, const Tensor& statistics,
    const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual, const Tensor& dx,
    const std::optional<Tensor>& y, const Tensor& dweight, const Tensor& dbias,
    const std::optional<Tensor>& residual_sum, const std::optional<Tensor>& dx_sum) {
  check_matrix(dy, "dy");
  const int64_t width = dy.size(1), count = dy.size(0);
  const bool wide = dx.scalar_type() == ScalarType::Float && dy.scalar_type() == ScalarType::BFloat16;
  check_norm(x, rows, weight, bias, statistics, count, width);
  check_packed(residual, "residual", dx.scalar_type(), count * width);
  check_packed(dx, "dx", wide ? ScalarType::Float : dy.scalar_type(), count * width);
  check_packed(y, "y", dy.scalar_type(), count * width);
  SGMIM_CHECK(!residual_sum.has_value() || residual.has_value(), "residual_sum is given without residual");
  std::vector<const Tensor*> sums{&dweight, &dbias};
  for (const auto* sum : {&residual_sum, &dx_sum})
    if (sum->has_value()) sums.push_back(&sum->value());
  for (const Tensor* sum : sums) check_packed(*sum, "a sum over rows", ScalarType::Float, width);
  std::vector<float> found(sums.size() * width);
  dispatch_float(x, "x", [&](auto x_type) {
    dispatch_float(dy, "dy", [&](auto type) {
      using X = decltype(x_type);
      using T = decltype(type);
      const auto run = [&](auto wide_type) {
        using R = decltype(wide_type);
        const NormBackward<X, T, R> norm{
            data<T>(dy), data<X>(x), data<int64_t>(rows), data<float>(statistics), data<float>(statistics) + count,
            data<float>(weight), data<float>(bias), data<R>(residual), data<R>(dx), data<T>(y),
            residual_sum.has_value(), dx_sum.has_value(), width};
        const auto kernel = SGMIM_SELECT((layer_norm_backward_rows<X, T, R>));
        column_sums(count, found.size(), found.data(), [&](int64_t begin, int64_t end, float* partial) {
          kernel(&norm, partial, begin, end);
        });
      };
      if (wide)
        run(float{});
      else
        run(type);
    });
  });
  for (size_t i = 0; i < sums.size(); ++i) std::copy_n(found.data() + i * width, width, data<float>(*sums[i]));
}

// Computes the statistics alone, (2, count): mean and 1 / sqrt(variance + eps).
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
      "layer_norm(Tensor x, Tensor? rows, Tensor? addend, Tensor weight, Tensor bias, Tensor? residual, float eps, "
      "Tensor(a!) y, Tensor(b!)? sum, Tensor(c!) statistics) -> ()");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor? rows, Tensor statistics, Tensor weight, Tensor bias, "
      "Tensor? residual, Tensor(a!) dx, Tensor(b!)? y, Tensor(c!) dweight, Tensor(d!) dbias, "
      "Tensor(e!)? residual_sum, Tensor(f!)? dx_sum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&row_statistics));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

#endif
}  // namespace sgmim
