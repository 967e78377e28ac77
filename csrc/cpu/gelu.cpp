// GELU, its derivative with the gradient of the bias before it, and column sums of a matrix.
//
// With cdf and pdf of the normal distribution, GELU(x) = x cdf(x) and its derivative is cdf(x) + x pdf(x). For y = |x|
// let tail = cdf(-y) = e^(-y^2/2) R(y); R is a polynomial in 1 / (y + k) over 0 <= y <= 12.5, made for this file by a
// weighted least-squares fit of its relative error. Then GELU(x) = max(x, 0) - y tail, and the derivative is
// tail - y pdf, or for positive x what is missing to 1: no cancellation in the tail, one exponential.
#include "cpu/launch.h"
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/gelu.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"

namespace sgmim {
namespace SGMIM_ISA {

struct Gelu {
  vf value, derivative;
};

// The relative error of the tail before rounding is 1.5e-8 for float32 and 3e-4, a tenth of an ulp, for bfloat16.
template <class T>
SGMIM_INLINE Gelu gelu_at(vf x) {
  constexpr bool coarse = sizeof(T) == 2;
  const vf y = vmin(set1(12.5f), vabs(x));  // beyond, the tail is below 1e-35; in this order NaN stays NaN
  const vf power = y * y * -0.7213475204f;  // e^(-y^2/2) = 2^power
  const vf shifted = power + 12582912.0f;   // 1.5 * 2^23: the low mantissa bits are the rounded power
  const vf r = power - (shifted - 12582912.0f);
  vf e, ratio;
  if (coarse) {
    e = coarse_exp2(r);
    const vf s = rough_inverse(y + 2.0f);
    ratio = set1(-2.0119242668f) * s + 1.9618414640f;
    ratio = ratio * s + 0.7182267904f;
    ratio = ratio * s + 0.4016831517f;
    ratio *= s;
  } else {
    e = set1(0.0001534580224f) * r + 0.001339993090f;
    e = e * r + 0.009618489072f;
    e = e * r + 0.05550328642f;
    e = e * r + 0.2402264625f;
    e = e * r + 0.6931471825f;
    e = e * r + 1.0f;
    // a division, which the memory hides: t multiplies an error of s by what an estimate could not bear near x = 0
    const vf s = 1.0f / (y + 4.75f), t = (y - 4.75f) * s;
    ratio = set1(-0.001306835445575f) * t + 0.000225932846661f;
    ratio = ratio * t + 0.0115433027967811f;
    ratio = ratio * t + -0.0506286732852459f;
    ratio = ratio * t + 0.13810686767101f;
    ratio = ratio * t + -0.284183830022812f;
    ratio = ratio * t + 0.472064435482025f;
    ratio = ratio * t + -0.653589367866516f;
    ratio = ratio * t + 0.766416311264038f;
    ratio *= s;
  }
  e = (vf)((vi)e + ((vi)shifted << 23));
  Gelu result;
  result.value = vmax(set1(0.0f), x) - y * (e * ratio);
  const vf outer = e * (ratio - 0.3989422804f * y);
  result.derivative = x > 0.0f ? 1.0f - outer : outer;
  return result;
}

template <class T>
void gelu_range(const T* x, T* y, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) store(y + i, gelu_at<T>(load(x + i)).value);
  if (i < end) store_tail(y + i, gelu_at<T>(load_tail(x + i, end - i)).value, end - i);
}

// x: (rows, width) what GELU was applied to. dy becomes dx in place; y is GELU(x) again; sums: column sums of dx.
template <class T>
void gelu_backward_rows(const T* x, T* dy, T* y, float* sums, int64_t width, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * width;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      const Gelu here = gelu_at<T>(load(x + at + i));
      const vf dx = load(dy + at + i) * here.derivative;
      store(y + at + i, here.value);
      store(dy + at + i, dx);
      store(sums + i, load(sums + i) + dx);
    }
    if (const int64_t n = width - i; n > 0) {
      const Gelu here = gelu_at<T>(load_tail(x + at + i, n));
      const vf dx = load_tail(dy + at + i, n) * here.derivative;
      store_tail(y + at + i, here.value, n);
      store_tail(dy + at + i, dx, n);
      store_tail(sums + i, load_tail(sums + i, n) + dx, n);
    }
  }
}

template <class T>
void sum_rows(const T* x, float* sums, int64_t width, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < width; i += LANES) {
    const int64_t n = part(i, width);
    vf sum = load_part(sums + i, n);
    for (int64_t r = begin; r < end; ++r) sum += load_part(x + r * width + i, n);
    store_part(sums + i, sum, n);
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

static void gelu(const Tensor& x, const Tensor& y) {
  check_packed(x, "x", x.scalar_type(), x.numel());
  check_packed(y, "y", x.scalar_type(), x.numel());
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((gelu_range<T>));
    parallel(x.numel(), 1 << 14, [&](int64_t begin, int64_t end) { kernel(data<T>(x), data<T>(y), begin, end); });
  });
}

static void gelu_backward(const Tensor& x, const Tensor& dy, const Tensor& y, const Tensor& sums) {
  check_matrix(x, "x");
  const int64_t width = x.size(1);
  check_packed(dy, "dy", x.scalar_type(), x.numel());
  check_packed(y, "y", x.scalar_type(), x.numel());
  check_packed(sums, "sums", ScalarType::Float, width);
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((gelu_backward_rows<T>));
    column_sums(x.size(0), width, data<float>(sums), [&](int64_t begin, int64_t end, float* partial) {
      kernel(data<T>(x), data<T>(dy), data<T>(y), partial, width, begin, end);
    });
  });
}

static void column_sum(const Tensor& x, const Tensor& sums) {
  check_matrix(x, "x");
  const int64_t width = x.size(1);
  check_packed(sums, "sums", ScalarType::Float, width);
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const auto kernel = SGMIM_SELECT((sum_rows<T>));
    column_sums(x.size(0), width, data<float>(sums), [&](int64_t begin, int64_t end, float* partial) {
      kernel(data<T>(x), partial, width, begin, end);
    });
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def("gelu(Tensor x, Tensor(a!) y) -> ()");
  m.def("gelu_backward(Tensor x, Tensor(a!) dy, Tensor(b!) y, Tensor(c!) sums) -> ()");
  m.def("column_sum(Tensor x, Tensor(a!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("gelu", TORCH_BOX(&gelu));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
  m.impl("column_sum", TORCH_BOX(&column_sum));
}

#endif
}  // namespace sgmim
