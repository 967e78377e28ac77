// Trimmed standardisation of structure maps, plane by plane, without sorting.
//
// Radix selection finds the values of the first and last kept ranks exactly: a histogram of the upper 11 bits of every
// value, then two more digits for the few values in the bins of the two ranks. The sums over the values between them,
// in double, and the output take one pass each. A plane stays in cache, so the passes cost arithmetic only.
//
// Values are ordered by an int32 key: the bits of the float, with all but the sign bit flipped for negative values.
// Infinities and NaN fill the first and last four bins of that order, so the histogram counts them at no cost.
#include "cpu/launch.h"

#include <cmath>
#include <cstring>
#include <utility>
#undef SGMIM_THIS_FILE
#define SGMIM_THIS_FILE "cpu/standardize_structure.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"

#ifndef SGMIM_RADIX
#define SGMIM_RADIX
namespace sgmim {

constexpr int64_t BINS = 2048;    // one per value of a key's upper 11 bits
constexpr int64_t NONFINITE = 4;  // bins of infinities and NaN at either end

// Returns the bin that contains `rank`, and reduces `rank` to the rank within it.
inline int64_t find_bin(const int64_t* counts, int64_t& rank) {
  int64_t bin = 0;
  while (rank >= counts[bin]) rank -= counts[bin++];
  return bin;
}

// Copies the keys whose bits from `shift` on equal `prefix`; works in place if out == keys. Returns their number.
inline int64_t keep(const int32_t* keys, int64_t count, int shift, int32_t prefix, int32_t* out) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = keys[i];
    out[kept] = key;
    kept += key >> shift == prefix;
  }
  return kept;
}

// The key of a rank, and the number of equal keys at lower ranks.
struct Selected {
  int32_t key;
  int64_t before;
};

// Returns the key of a rank among the keys with the upper 11 bits `prefix`. scratch: room for `count` keys.
inline Selected select_key(const int32_t* keys, int64_t count, int32_t prefix, int64_t rank, int32_t* scratch) {
  for (const auto& [shift, bits] : {std::pair{10, 11}, std::pair{0, 10}}) {
    count = keep(keys, count, shift + bits, prefix, scratch);
    keys = scratch;
    int64_t counts[BINS] = {};
    for (int64_t i = 0; i < count; ++i) ++counts[keys[i] >> shift & ((1 << bits) - 1)];
    prefix = static_cast<int32_t>(static_cast<uint32_t>(prefix) << bits | find_bin(counts, rank));
  }
  return {prefix, rank};
}

inline double value_of(int32_t key) {
  key ^= key >> 31 & 0x7fffffff;
  float value;
  std::memcpy(&value, &key, sizeof value);
  return value;
}

}  // namespace sgmim
#endif

namespace sgmim {
namespace SGMIM_ISA {

constexpr int64_t HALF = LANES / 2;  // doubles in a vector
typedef float hf __attribute__((vector_size(SGMIM_VECTOR_BYTES / 2)));
typedef int32_t hi __attribute__((vector_size(SGMIM_VECTOR_BYTES / 2)));
typedef double vd __attribute__((vector_size(SGMIM_VECTOR_BYTES)));
typedef int64_t vl __attribute__((vector_size(SGMIM_VECTOR_BYTES)));

template <class V, class T>
SGMIM_INLINE V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
SGMIM_INLINE V keys_of(V bits) {
  return bits ^ (bits >> 31 & 0x7fffffff);
}

// Counts the values of each of the BINS bins, in ascending order of the values.
static void histogram(const float* x, int64_t size, int64_t* counts) {
  // Four tables: neighbouring values often share a bin, and consecutive increments of one counter take several cycles.
  uint32_t tables[4][BINS] = {};
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) {
    uint32_t bits[4];
    __builtin_memcpy(bits, x + i, sizeof bits);
    for (int64_t t = 0; t < 4; ++t) ++tables[t][bits[t] >> 21];
  }
  for (; i < size; ++i) ++tables[0][load_as<uint32_t>(x + i) >> 21];
  for (int64_t bin = 0; bin < BINS; ++bin) {
    const int64_t top = bin < BINS / 2 ? BINS - 1 - bin : bin - BINS / 2;  // bits of negative values, descending
    counts[bin] = int64_t{tables[0][top]} + tables[1][top] + tables[2][top] + tables[3][top];
  }
}

// Collects the keys with upper bits `low` or `high`, and returns their number. out: room for size + LANES keys.
static int64_t candidates(const float* x, int64_t size, int32_t low, int32_t high, int32_t* out) {
  int64_t count = 0, i = 0;
  for (; i + LANES <= size; i += LANES) {
    const vi keys = keys_of(load_as<vi>(x + i)), upper = keys >> 21;
    const vi wanted = (upper == low) | (upper == high);
    uint64_t words[LANES / 2], any = 0;
    __builtin_memcpy(words, &wanted, sizeof words);
    for (uint64_t word : words) any |= word;
    if (any == 0) continue;
    for (int64_t l = 0; l < LANES; ++l) {
      out[count] = keys[l];
      count -= wanted[l];  // true is -1
    }
  }
  for (; i < size; ++i) {
    const int32_t key = keys_of(load_as<int32_t>(x + i));
    if (key >> 21 == low || key >> 21 == high) out[count++] = key;
  }
  return count;
}

// Computes the sums of x - shift and of its square over the values with low < key < high.
static void sum_between(
    const float* x, int64_t size, int32_t low, int32_t high, double shift, double& sum, double& squares) {
  vd s = {}, q = {};
  const auto add = [&](hf values) __attribute__((always_inline)) {
    const hi keys = keys_of((hi)values);
    const vl inside = __builtin_convertvector((keys > low) & (keys < high), vl);
    const vd d = (vd)((vl)(__builtin_convertvector(values, vd) - shift) & inside);
    s += d;
    q += d * d;
  };
  int64_t i = 0;
  for (; i + HALF <= size; i += HALF) add(load_as<hf>(x + i));
  for (; i < size; ++i) {
    hf values = {};
    const int32_t excluded = low ^ (low >> 31 & 0x7fffffff);
    for (int64_t l = 0; l < HALF; ++l) __builtin_memcpy((char*)&values + 4 * l, &excluded, 4);
    values[0] = x[i];
    add(values);
  }
  sum = squares = 0;
  for (int64_t l = 0; l < HALF; ++l) {
    sum += s[l];
    squares += q[l];
  }
}

void standardize_planes(
    const float* input,  // (planes, size)
    float* output,       // (planes, size)
    int64_t* nonfinite,  // (planes,): number of infinite or NaN values
    int64_t size, int64_t begin, int64_t end) {
  std::vector<int32_t> buffer(2 * (size + LANES));
  int32_t *keys = buffer.data(), *scratch = keys + size + LANES;
  for (int64_t p = begin; p < end; ++p) {
    const float* x = input + p * size;
    float* y = output + p * size;
    int64_t counts[BINS];
    histogram(x, size, counts);
    nonfinite[p] = 0;
    for (int64_t bin = 0; bin < NONFINITE; ++bin) {
      nonfinite[p] += counts[bin] + counts[BINS - 1 - bin];
      counts[bin] = counts[BINS - 1 - bin] = 0;
    }
    const int64_t n = size - nonfinite[p];
    const int64_t first = static_cast<int64_t>(0.1 * n), kept = static_cast<int64_t>(0.9 * n) - first;
    if (kept < 2) {
      std::fill(y, y + size, 0.0f);
      continue;
    }
    int64_t first_rank = first, last_rank = first + kept - 1;
    const int32_t low_bin = find_bin(counts, first_rank) - BINS / 2, high_bin = find_bin(counts, last_rank) - BINS / 2;
    const int64_t count = candidates(x, size, low_bin, high_bin, keys);
    const Selected low = select_key(keys, count, low_bin, first_rank, scratch);
    const Selected high = select_key(keys, count, high_bin, last_rank, scratch);
    const double a = value_of(low.key), b = value_of(high.key);
    double mean = 0, variance = 0;  // of the kept values minus a
    if (low.key != high.key) {
      sum_between(x, size, low.key, high.key, a, mean, variance);
      const double last_copies = high.before + 1;
      mean = (mean + last_copies * (b - a)) / kept;
      variance = (variance + last_copies * (b - a) * (b - a) - kept * mean * mean) / (kept - 1);
    }
    mean += a;
    const double scale = 1 / std::sqrt(variance + 1e-6);
    for (int64_t i = 0; i < size; ++i) y[i] = static_cast<float>((x[i] - mean) * scale);
    if (nonfinite[p] > 0)
      for (int64_t i = 0; i < size; ++i) y[i] = std::isfinite(x[i]) ? y[i] : 0.0f;
  }
}

}  // namespace SGMIM_ISA

#ifdef SGMIM_ONCE

static void standardize_structure(const Tensor& input, const Tensor& output, const Tensor& nonfinite) {
  check_matrix(input, "input");
  check_packed(input, "input", ScalarType::Float, input.numel());
  check_packed(output, "output", ScalarType::Float, input.numel());
  check_packed(nonfinite, "nonfinite", ScalarType::Long, input.size(0));
  const auto kernel = SGMIM_SELECT((standardize_planes));
  parallel(input.size(0), 1, [&](int64_t begin, int64_t end) {
    kernel(data<float>(input), data<float>(output), data<int64_t>(nonfinite), input.size(1), begin, end);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def("standardize_structure(Tensor input, Tensor(a!) output, Tensor(b!) nonfinite) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) {
  m.impl("standardize_structure", TORCH_BOX(&standardize_structure));
}

#endif
}  // namespace sgmim
