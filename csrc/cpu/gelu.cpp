// GELU, its backward with the gradient of the bias before it (gelu_at.h), and column sums of a matrix.
#include "cpu/launch.h"
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/gelu.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"
#include "cpu/vectors.h"
#include "cpu/gelu_at.h"

namespace sgmim {
namespace SGMIM_ISA {

// Calls step(i, n, Vectors<N>{}) for all elements [begin, end): N vectors at i, each of n <= LANES elements.
template <class Step>
SGMIM_INLINE void for_vectors(int64_t begin, int64_t end, const Step& step) {
  constexpr int64_t FEW = 4 * LANES;
  int64_t i = begin;
  for (; i + FEW <= end; i += FEW) step(i, LANES, Vectors<4>{});
  for (; i < end; i += LANES) step(i, part(i, end), Vectors<1>{});
}

template <class T>
void gelu_range(const T* x, T* y, int64_t begin, int64_t end) {
  for_vectors(begin, end, [&](int64_t i, int64_t n, auto like) SGMIM_INLINE_LAMBDA {
    store_vectors(y + i, gelu_at<T>(load_vectors<decltype(like)>(x + i, n)).value, n);
  });
}

// x: (rows, width), the pre-activation. Replaces dy by dx, recomputes y = GELU(x), and adds dx to the column sums.
template <class T>
void gelu_backward_rows(const T* x, T* dy, T* y, float* sums, int64_t width, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * width;
    for_vectors(0, width, [&](int64_t i, int64_t n, auto like) SGMIM_INLINE_LAMBDA {
      using V = decltype(like);
      const auto here = gelu_at<T>(load_vectors<V>(x + at + i, n));
      const V dx = load_vectors<V>(dy + at + i, n) * here.derivative;
      store_vectors(y + at + i, here.value, n);
      store_vectors(dy + at + i, dx, n);
      store_vectors(sums + i, load_vectors<V>(sums + i, n) + dx, n);
    });
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
