// Salience of the tokens of an image: the attention that each receives from the others, without an attention matrix in
// memory.
//
// Six queries are processed at a time. Their logits, 6 x N floats that stay in cache, become exponentials in place.
// Each row, divided by its sum, is added to the column sums s, and its total is subtracted from the sum of its own
// token: this gives s_j - 1. The attention of a token to itself would cancel and is left out, since it is close to 1
// for tokens of large norm. The sums are in double, so that those of equal tokens are 0. The tokens of an image are
// packed once into panels of two vectors of tokens, channel by channel, as the right operand of the gemm.
//
// The rows of an image are divided into blocks that depend on its shape alone, and the blocks' column sums are added in
// order: the result has the same bits for any number of threads.
#include "cpu/launch.h"

#include <cmath>
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/token_salience.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"

#include "cpu/small_gemm.h"

namespace sgmim {
namespace SGMIM_ISA {

constexpr int64_t PANEL = 2 * LANES;  // tokens in a panel

SGMIM_INLINE int64_t padded(int64_t tokens) { return (tokens + PANEL - 1) / PANEL * PANEL; }

int64_t padded_tokens(int64_t tokens) { return padded(tokens); }

// Packs x (tokens, depth) into panels (ceil(tokens / PANEL), depth, PANEL), with zeros after the last token.
void pack_tokens(const float* x, float* out, int64_t tokens, int64_t depth) {
  for (int64_t first = 0; first < tokens; first += PANEL)
    for (int64_t t = 0; t < depth; ++t)
      for (int64_t l = 0; l < PANEL; ++l) {
        const bool there = first + l < tokens;
        *out++ = there ? x[(first + l) * depth + t] : 0.0f;
      }
}

constexpr int64_t HALF = LANES / 2;  // doubles in a vector
typedef float hf __attribute__((vector_size(SGMIM_VECTOR_BYTES / 2)));
typedef double vd __attribute__((vector_size(SGMIM_VECTOR_BYTES)));

// Adds a row, padded to whole vectors, to `sums`, and returns the sum of its elements.
SGMIM_INLINE double add_row(const float* row, double* sums, int64_t stride) {
  vd total = {};
  for (int64_t n = 0; n < stride; n += HALF) {
    hf narrow;
    vd sum;
    __builtin_memcpy(&narrow, row + n, sizeof narrow);
    __builtin_memcpy(&sum, sums + n, sizeof sum);
    const vd wide = __builtin_convertvector(narrow, vd);
    sum += wide;
    total += wide;
    __builtin_memcpy(sums + n, &sum, sizeof sum);
  }
  double result = 0;
  for (int64_t l = 0; l < HALF; ++l) result += total[l];
  return result;
}

// For the queries [begin, end): adds their attention to each other token to `sums`, and subtracts it from their own
// sums.
void attend_rows(
    const float* x,       // (tokens, depth)
    const float* panels,  // written by pack_tokens
    double* sums,         // (padded(tokens),)
    int64_t tokens, int64_t depth, int64_t begin, int64_t end) {
  constexpr int64_t SPAN = 256;  // channels that are summed sequentially, which bounds the rounding error
  const int64_t stride = padded(tokens);
  std::vector<float> logits(6 * stride);
  by_six_rows(end - begin, [&](auto count, int64_t first) SGMIM_INLINE_LAMBDA {
    constexpr int ROWS = decltype(count)::value;
    const float* rows = x + (begin + first) * depth;
    for (int64_t n = 0; n < stride; n += PANEL)
      for (int64_t t = 0; t < depth; t += SPAN) {
        const float* panel = panels + n * depth + t * PANEL;
        const int64_t span = std::min(SPAN, depth - t);
        if (t == 0)
          register_tile<ROWS, 2>(
              rows, depth, 1, panel, PANEL, span, 0, 0, StoreEpilogue<false>{logits.data() + n, stride});
        else
          register_tile<ROWS, 2>(
              rows + t, depth, 1, panel, PANEL, span, 0, 0, StoreEpilogue<true>{logits.data() + n, stride});
      }
    for (int r = 0; r < ROWS; ++r) {
      float* row = logits.data() + r * stride;
      for (int64_t n = tokens; n < stride; ++n) row[n] = -INFINITY;
      vf max = load(row);
      for (int64_t n = LANES; n < stride; n += LANES) max = vmax(max, load(row + n));
      const float row_max = hmax(max);  // may ignore NaN, which remains in the row
      vf total = {};
      for (int64_t n = 0; n < stride; n += LANES) {
        const vf e = exp(load(row + n) - row_max);
        store(row + n, e);
        total += e;
      }
      const vf inverse_sum = set1(1.0f / hsum(total));
      for (int64_t n = 0; n < stride; n += LANES) store(row + n, load(row + n) * inverse_sum);
      float& own = row[begin + first + r];
      own = own == own ? 0.0f : own;
      sums[begin + first + r] -= add_row(row, sums, stride);
    }
  });
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

// totals: (images, tokens), s_j - 1 of each token, in float64.
static void token_salience(const Tensor& x, const Tensor& totals) {
  SGMIM_CHECK(x.dim() == 3, "x must have 3 dimensions, got ", x.dim());
  const int64_t images = x.size(0), tokens = x.size(1), depth = x.size(2);
  check_packed(x, "x", ScalarType::Float, images * tokens * depth);
  check_packed(totals, "totals", ScalarType::Double, images * tokens);
  SGMIM_CHECK(tokens > 0 && depth > 0, "x must have at least one token and channel");
  const int64_t blocks = std::clamp<int64_t>(tokens / 48, 1, 16);
  const auto pack = SGMIM_SELECT((pack_tokens));
  const auto attend = SGMIM_SELECT((attend_rows));
  const int64_t stride = SGMIM_SELECT((padded_tokens))(tokens), size = stride * depth;
  // Images are processed in groups whose panels take a few MB: enough work for all threads, while memory does not grow
  // with the batch.
  const int64_t together = std::max<int64_t>(1, (int64_t{1} << 20) / size);
  std::vector<float> panels(std::min(together, images) * size);
  std::vector<double> sums(std::min(together, images) * blocks * stride);
  for (int64_t first = 0; first < images; first += together) {
    const int64_t count = std::min(together, images - first);
    const float* from = data<float>(x) + first * tokens * depth;
    parallel(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        pack(from + b * tokens * depth, panels.data() + b * size, tokens, depth);
    });
    std::fill(sums.begin(), sums.end(), 0.0);
    parallel(count * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / blocks, block = i % blocks;
        attend(
            from + b * tokens * depth, panels.data() + b * size, sums.data() + i * stride, tokens, depth,
            block * tokens / blocks, (block + 1) * tokens / blocks);
      }
    });
    for (int64_t b = 0; b < count; ++b) {
      const double* of_blocks = sums.data() + b * blocks * stride;
      double* total = data<double>(totals) + (first + b) * tokens;
      std::copy_n(of_blocks, tokens, total);
      for (int64_t block = 1; block < blocks; ++block)
        for (int64_t n = 0; n < tokens; ++n) total[n] += of_blocks[block * stride + n];
    }
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def("token_salience(Tensor x, Tensor(a!) totals) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) { m.impl("token_salience", TORCH_BOX(&token_salience)); }

#endif
}  // namespace sgmim
