// SwinV2's continuous relative position bias, scale * sigmoid(W2 relu(W1 c + b1)) for pairs of coordinates c, forward
// and backward. The hidden features, (entries, hidden), are recomputed where they are needed and are not stored.
//
// The forward vectorizes over entries and the backward over hidden features, so that neither needs a reduction across
// lanes. Each sum is computed by one thread in a fixed order, so the result is the same for any number of threads.
#include "cpu/aligned.h"
#include "cpu/launch.h"
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/position_bias.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/norm_row.h"

namespace sgmim {
namespace SGMIM_ISA {

constexpr int64_t HEADS = 8;   // heads whose accumulators stay in registers
constexpr int64_t BLOCK = 16;  // entries or hidden features of a block: whole vectors in every instruction set
constexpr int64_t FEW = 32;    // entries of a partial sum: shorter sums have smaller rounding errors

// Computes the input of the ReLU.
template <class A, class B>
SGMIM_INLINE vf pre_activation(A x, A y, B weight_x, B weight_y, B bias) {
  return (x * weight_x + bias) + y * weight_y;
}

// This order of vmax's arguments preserves NaN.
SGMIM_INLINE vf relu(vf x) { return vmax(vf{}, x); }

// Computes the blocks of entries [begin, end): the table, and as slope its derivative with respect to the logits.
static void position_bias_blocks(
    const float* coordinates,  // (entries, 2)
    const float* fc1_weight,   // (hidden, 2)
    const float* fc1_bias,     // (hidden,)
    const float* fc2_weight,   // (heads, hidden)
    float scale, float* table, float* slope,  // (entries, heads)
    int64_t entries, int64_t hidden, int64_t heads, int64_t begin, int64_t end) {
  const int64_t last = end * BLOCK < entries ? end * BLOCK : entries;
  for (int64_t first = begin * BLOCK; first < last; first += LANES) {
    const int64_t count = part(first, entries);
    vf x = {}, y = {};
    for (int64_t l = 0; l < count; ++l) {
      x[l] = coordinates[(first + l) * 2];
      y[l] = coordinates[(first + l) * 2 + 1];
    }
    for (int64_t head = 0; head < heads; head += HEADS) {
      const int64_t together = heads - head < HEADS ? heads - head : HEADS;
      const float* weight[HEADS];  // heads past the last one use its weights, and their results are ignored
      for (int64_t h = 0; h < HEADS; ++h) weight[h] = fc2_weight + (head + (h < together ? h : together - 1)) * hidden;
      vf logits[HEADS] = {};
      for (int64_t j = 0; j < hidden; ++j) {
        const vf features = relu(pre_activation(x, y, fc1_weight[2 * j], fc1_weight[2 * j + 1], fc1_bias[j]));
        for (int64_t h = 0; h < HEADS; ++h) logits[h] += features * weight[h][j];
      }
      for (int64_t h = 0; h < together; ++h) {
        const vf share = 1.0f / (1.0f + exp(-logits[h])), bias = scale * share, derivative = bias * (1.0f - share);
        for (int64_t l = 0; l < count; ++l) {
          table[(first + l) * heads + head + h] = bias[l];
          slope[(first + l) * heads + head + h] = derivative[l];
        }
      }
    }
  }
}

// Computes the gradients of the weights of the blocks of hidden features [begin, end).
static void position_bias_backward_blocks(
    const float* dlogits,  // (entries, heads)
    const float* coordinates, const float* fc1_weight, const float* fc1_bias, const float* fc2_weight,
    float* dfc1_weight, float* dfc1_bias, float* dfc2_weight, int64_t entries, int64_t hidden, int64_t heads,
    int64_t begin, int64_t end) {
  Aligned<float> panel(heads * LANES);  // fc2_weight of these hidden features
  const int64_t last = end * BLOCK < hidden ? end * BLOCK : hidden;
  for (int64_t first = begin * BLOCK; first < last; first += LANES) {
    const int64_t count = part(first, hidden);
    vf weight_x = {}, weight_y = {}, bias = load_part(fc1_bias + first, count);
    for (int64_t l = 0; l < count; ++l) {
      weight_x[l] = fc1_weight[(first + l) * 2];
      weight_y[l] = fc1_weight[(first + l) * 2 + 1];
    }
    for (int64_t h = 0; h < heads; ++h)
      store(panel.data() + h * LANES, load_part(fc2_weight + h * hidden + first, count));
    for (int64_t head = 0; head < heads; head += HEADS) {
      const int64_t together = heads - head < HEADS ? heads - head : HEADS;
      int64_t at[HEADS];
      for (int64_t h = 0; h < HEADS; ++h) at[h] = head + (h < together ? h : together - 1);
      vf sums[HEADS] = {};
      for (int64_t start = 0; start < entries; start += FEW) {
        vf few[HEADS] = {};
        for (int64_t e = start; e < entries && e < start + FEW; ++e) {
          const float x = coordinates[2 * e], y = coordinates[2 * e + 1], *row = dlogits + e * heads;
          const vf features = relu(pre_activation(x, y, weight_x, weight_y, bias));
          for (int64_t h = 0; h < HEADS; ++h) few[h] += features * row[at[h]];
        }
        for (int64_t h = 0; h < HEADS; ++h) sums[h] += few[h];
      }
      for (int64_t h = 0; h < together; ++h) store_part(dfc2_weight + (head + h) * hidden + first, sums[h], count);
    }
    vf sum_x = {}, sum_y = {}, sum = {};
    for (int64_t start = 0; start < entries; start += FEW) {
      vf few_x = {}, few_y = {}, few = {};
      for (int64_t e = start; e < entries && e < start + FEW; ++e) {
        const float x = coordinates[2 * e], y = coordinates[2 * e + 1], *row = dlogits + e * heads;
        vf d = {};
        for (int64_t h = 0; h < heads; ++h) d += load(panel.data() + h * LANES) * row[h];
        d = pre_activation(x, y, weight_x, weight_y, bias) <= vf{} ? vf{} : d;
        few_x += d * x;
        few_y += d * y;
        few += d;
      }
      sum_x += few_x;
      sum_y += few_y;
      sum += few;
    }
    for (int64_t l = 0; l < count; ++l) {
      dfc1_weight[(first + l) * 2] = sum_x[l];
      dfc1_weight[(first + l) * 2 + 1] = sum_y[l];
    }
    store_part(dfc1_bias + first, sum, count);
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

// Checks the arguments that both directions share, and has their sizes.
struct PositionBias {
  int64_t entries, hidden, heads;

  PositionBias(const Tensor& coordinates, const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight) {
    check_matrix(fc2_weight, "fc2_weight");
    entries = coordinates.numel() / 2, hidden = fc2_weight.size(1), heads = fc2_weight.size(0);
    check_packed(coordinates, "coordinates", ScalarType::Float, 2 * entries);
    check_packed(fc1_weight, "fc1_weight", ScalarType::Float, 2 * hidden);
    check_packed(fc1_bias, "fc1_bias", ScalarType::Float, hidden);
    check_packed(fc2_weight, "fc2_weight", ScalarType::Float, heads * hidden);
  }
};

// Calls body(begin, end) in parallel over the blocks of `count` entries or hidden features.
template <class Body>
static void over_blocks(int64_t count, const Body& body) {
  parallel((count + SGMIM_ISA::BLOCK - 1) / SGMIM_ISA::BLOCK, 2, body);
}

static void position_bias(
    const Tensor& coordinates, const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight, double scale,
    const Tensor& table, const Tensor& slope) {
  const PositionBias size(coordinates, fc1_weight, fc1_bias, fc2_weight);
  check_packed(table, "table", ScalarType::Float, size.entries * size.heads);
  check_packed(slope, "slope", ScalarType::Float, size.entries * size.heads);
  const auto kernel = SGMIM_SELECT((position_bias_blocks));
  over_blocks(size.entries, [&](int64_t begin, int64_t end) {
    kernel(
        data<float>(coordinates), data<float>(fc1_weight), data<float>(fc1_bias), data<float>(fc2_weight),
        static_cast<float>(scale), data<float>(table), data<float>(slope), size.entries, size.hidden, size.heads, begin,
        end);
  });
}

static void position_bias_backward(
    const Tensor& grad, const Tensor& slope, const Tensor& coordinates, const Tensor& fc1_weight,
    const Tensor& fc1_bias, const Tensor& fc2_weight, const Tensor& dfc1_weight, const Tensor& dfc1_bias,
    const Tensor& dfc2_weight) {
  const PositionBias size(coordinates, fc1_weight, fc1_bias, fc2_weight);
  const int64_t numbers = size.entries * size.heads;
  check_packed(grad, "grad", ScalarType::Float, numbers);
  check_packed(slope, "slope", ScalarType::Float, numbers);
  check_packed(dfc1_weight, "dfc1_weight", ScalarType::Float, 2 * size.hidden);
  check_packed(dfc1_bias, "dfc1_bias", ScalarType::Float, size.hidden);
  check_packed(dfc2_weight, "dfc2_weight", ScalarType::Float, size.heads * size.hidden);
  std::vector<float> dlogits(numbers);
  for (int64_t i = 0; i < numbers; ++i) dlogits[i] = data<float>(grad)[i] * data<float>(slope)[i];
  const auto kernel = SGMIM_SELECT((position_bias_backward_blocks));
  over_blocks(size.hidden, [&](int64_t begin, int64_t end) {
    kernel(
        dlogits.data(), data<float>(coordinates), data<float>(fc1_weight), data<float>(fc1_bias),
        data<float>(fc2_weight), data<float>(dfc1_weight), data<float>(dfc1_bias), data<float>(dfc2_weight),
        size.entries, size.hidden, size.heads, begin, end);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def(
      "position_bias(Tensor coordinates, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, float scale, "
      "Tensor(a!) table, Tensor(b!) slope) -> ()");
  m.def(
      "position_bias_backward(Tensor grad, Tensor slope, Tensor coordinates, Tensor fc1_weight, Tensor fc1_bias, "
      "Tensor fc2_weight, Tensor(a!) dfc1_weight, Tensor(b!) dfc1_bias, Tensor(c!) dfc2_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("position_bias", TORCH_BOX(&position_bias));
  m.impl("position_bias_backward", TORCH_BOX(&position_bias_backward));
}

#endif
}  // namespace sgmim
