// Tokens of a masked stem: the embeddings of the visible patches, normalised if the stem has a LayerNorm, and the mask
// token everywhere else. Each row of the result is written once; the backward reads each row of the gradient once.
#include "cpu/launch.h"
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/masked_patch_embed.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"

#ifndef SGMIM_STEM_NORM
#define SGMIM_STEM_NORM
namespace sgmim {
// The LayerNorm after the embedding; all pointers are null if there is none.
struct StemNorm {
  const float *weight, *bias;  // (width,); bias is null in the backward, which does not need it
  float *mean, *rstd;          // (visible,)
};
}  // namespace sgmim
#endif

namespace sgmim {
namespace SGMIM_ISA {

template <class T, class Y>
void place_token_rows(
    const T* embedded,        // (visible, width)
    const int64_t* position,  // (rows,): row of `embedded`, or -1 for a masked patch
    const float* token,       // (width,)
    const StemNorm* norm, float eps,
    Y* out,  // (rows, width)
    int64_t width, int64_t begin, int64_t end) {
  std::vector<float> scratch(2 * (width + LANES));
  float *t = scratch.data(), *masked = t + width + LANES;
  load_row(token, masked, width);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t p = position[r];
    if (p < 0) {
      store_row(masked, out + r * width, width);
      continue;
    }
    load_row(embedded + p * width, t, width);
    if (norm->weight) {
      moments(t, width, eps, norm->mean[p], norm->rstd[p]);
      normalize_row(t, width, norm->mean[p], norm->rstd[p]);
      affine_row(t, norm->weight, norm->bias, out + r * width, width);
    } else {
      store_row(t, out + r * width, width);
    }
  }
}

template <class T, class Y>
void place_token_backward_rows(
    const Y* dout,            // (rows, width)
    const T* embedded,        // (visible, width); not read without a norm
    const int64_t* position,  // (rows,)
    const StemNorm* norm,
    T* dembedded,  // (visible, width)
    float* sums,   // (4, width): gradients of the mask token, norm weight and norm bias, and column sums of dembedded
    int64_t width, int64_t begin, int64_t end) {
  std::vector<float> scratch(2 * (width + LANES));
  float *g = scratch.data(), *xhat = g + width + LANES;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t p = position[r];
    load_row(dout + r * width, g, width);
    if (p < 0) {
      accumulate_row(g, sums, width);
      continue;
    }
    if (norm->weight) {
      load_row(embedded + p * width, xhat, width);
      normalize_row(xhat, width, norm->mean[p], norm->rstd[p]);
      norm_backward_row(g, xhat, norm->weight, norm->rstd[p], sums + width, sums + 2 * width, width);
    }
    accumulate_row(g, sums + 3 * width, width);
    store_row(g, dembedded + p * width, width);
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

static StemNorm stem_norm(
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& statistics,
    int64_t count, int64_t width) {
  SGMIM_CHECK(weight.has_value() == statistics.has_value(), "expected both norm_weight and statistics, or neither");
  check_packed(weight, "weight", ScalarType::Float, width);
  check_packed(bias, "bias", ScalarType::Float, width);
  check_packed(statistics, "statistics", ScalarType::Float, 2 * count);
  float* mean = data<float>(statistics);
  return {data<float>(weight), data<float>(bias), mean, mean ? mean + count : nullptr};
}

static void place_tokens(
    const Tensor& embedded, const Tensor& visible, const Tensor& token, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, double eps, const Tensor& out, const std::optional<Tensor>& statistics) {
  check_matrix(out, "out");
  const int64_t width = out.size(1), rows = out.size(0), count = visible.numel();
  const std::vector<int64_t> position = places(visible, rows, "visible");
  SGMIM_CHECK(weight.has_value() == bias.has_value(), "expected both norm_weight and norm_bias, or neither");
  const StemNorm norm = stem_norm(weight, bias, statistics, count, width);
  check_packed(embedded, "embedded", embedded.scalar_type(), count * width);
  check_packed(token, "token", ScalarType::Float, width);
  dispatch_float(embedded, "embedded", [&](auto type) {
    dispatch_float(out, "out", [&](auto out_type) {
      using T = decltype(type);
      using Y = decltype(out_type);
      const auto kernel = SGMIM_SELECT((place_token_rows<T, Y>));
      parallel(rows, 16, [&](int64_t begin, int64_t end) {
        kernel(data<T>(embedded), position.data(), data<float>(token), &norm, eps, data<Y>(out), width, begin, end);
      });
    });
  });
}

static void place_tokens_backward(
    const Tensor& dout, const std::optional<Tensor>& embedded, const Tensor& visible,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& statistics, const Tensor& dembedded,
    const Tensor& sums) {
  check_matrix(dout, "dout");
  const int64_t width = dout.size(1), rows = dout.size(0), count = visible.numel();
  const std::vector<int64_t> position = places(visible, rows, "visible");
  const StemNorm norm = stem_norm(weight, std::nullopt, statistics, count, width);
  SGMIM_CHECK(embedded.has_value() || !weight.has_value(), "norm_weight is given without embedded");
  check_packed(embedded, "embedded", dembedded.scalar_type(), count * width);
  check_packed(dembedded, "dembedded", dembedded.scalar_type(), count * width);
  check_packed(sums, "sums", ScalarType::Float, 4 * width);
  dispatch_float(dembedded, "dembedded", [&](auto type) {
    dispatch_float(dout, "dout", [&](auto out_type) {
      using T = decltype(type);
      using Y = decltype(out_type);
      const auto kernel = SGMIM_SELECT((place_token_backward_rows<T, Y>));
      column_sums(rows, 4 * width, data<float>(sums), [&](int64_t begin, int64_t end, float* partial) {
        kernel(data<Y>(dout), data<T>(embedded), position.data(), &norm, data<T>(dembedded), partial, width, begin,
               end);
      });
    });
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def(
      "place_tokens(Tensor embedded, Tensor visible, Tensor token, Tensor? weight, Tensor? bias, float eps, "
      "Tensor(a!) out, Tensor(b!)? statistics) -> ()");
  m.def(
      "place_tokens_backward(Tensor dout, Tensor? embedded, Tensor visible, Tensor? weight, Tensor? statistics, "
      "Tensor(a!) dembedded, Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("place_tokens", TORCH_BOX(&place_tokens));
  m.impl("place_tokens_backward", TORCH_BOX(&place_tokens_backward));
}

#endif
}  // namespace sgmim
