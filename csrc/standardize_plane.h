// Trimmed standardisation of one map by a group of threads. Device function of csrc/cuda/standardize_structure.cu.
//
// Radix selection finds the values of the first and last kept ranks, byte by byte, both in the same passes. One more
// pass sums the values strictly between them, in double and relative to the lower one. As both are among the kept
// values, the variance is at least (upper - lower)^2 / 2n, so the difference of squares loses at most a factor of 2n of
// double's precision. The last pass writes the result.
#pragma once

#include <cmath>
#include <cstring>

#include "radix.h"

namespace sgmim {

template <class To, class From>
SGMIM_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Storage formats of a map's elements. value() is exact.
struct Float32 {
  using Raw = float;
  static SGMIM_HOST_DEVICE float value(Raw raw) { return raw; }
};
struct BFloat16 {
  using Raw = uint16_t;
  static SGMIM_HOST_DEVICE float value(Raw raw) { return bit_cast<float>(uint32_t{raw} << 16); }
};
struct Float16 {
  using Raw = uint16_t;
  static SGMIM_HOST_DEVICE float value(Raw raw) {
    // A multiplication changes the exponent's bias from 15 to 127, which is right for subnormals too.
    const float magnitude = bit_cast<float>((uint32_t{raw} & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112
    const uint32_t special = (raw & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return bit_cast<float>(bit_cast<uint32_t>(magnitude) | special | (uint32_t{raw} & 0x8000) << 16);
  }
};
struct UInt16 {
  using Raw = uint16_t;
  static SGMIM_HOST_DEVICE float value(Raw raw) { return raw * (1.0f / 65536); }
};

// Maps floats to unsigned integers of the same order; infinities and NaN are at the ends.
SGMIM_HOST_DEVICE uint32_t key_of(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
SGMIM_HOST_DEVICE float value_of(uint32_t key) { return bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key); }
SGMIM_HOST_DEVICE bool is_finite(float value) { return (bit_cast<uint32_t>(value) & 0x7f800000u) != 0x7f800000u; }

// Calls body(i, x[i]) for this thread's share of x, with four loads in flight.
template <class Group, class Raw, class Body>
SGMIM_HOST_DEVICE void each(const Group& group, const Raw* x, uint32_t n, const Body& body) {
  const uint32_t step = group.size();
  uint32_t i = group.rank();
  for (; i + 3 * step < n; i += 4 * step) {
    const Raw raw[4] = {x[i], x[i + step], x[i + 2 * step], x[i + 3 * step]};
    for (uint32_t k = 0; k < 4; ++k) body(i + k * step, raw[k]);
  }
  for (; i < n; i += step) body(i, x[i]);
}

// A digit has COPIES counters, which adjacent threads use in turn: the upper bytes of real maps have few values, so
// that one counter would be contended.
constexpr uint32_t COPIES = 8;
constexpr uint32_t PLANE_MEMORY = 2 * DIGITS * COPIES + 2;  // words of the group's memory, for both ranks

// One pass of the selection of both ranks: computes the histograms of byte `level` of the finite values whose upper
// bytes are those found so far. Ends with a barrier.
template <class Input, class Group>
SGMIM_HOST_DEVICE void count_digits(
    const Group& group, const typename Input::Raw* x, uint32_t n, int32_t level, uint32_t low, uint32_t high,
    uint32_t* counts) {
  const int32_t shift = 24 - 8 * level;
  const uint32_t copy = group.rank() % COPIES;
  for (uint32_t i = group.rank(); i < 2 * DIGITS * COPIES; i += group.size()) counts[i] = 0;
  group.sync();
  each(group, x, n, [&](uint32_t, typename Input::Raw raw) {
    const float value = Input::value(raw);
    const uint32_t key = key_of(value), at = (key >> shift & 0xff) * COPIES + copy;
    if (level == 0) {
      if (is_finite(value)) group.add(&counts[at], 1);
    } else if (is_finite(value)) {  // checked again: 0x7f8 has 12 bits, so the first byte alone does not tell
      const uint32_t above = key >> (shift + 8);
      if (above == low) group.add(&counts[at], 1);
      if (above == high) group.add(&counts[DIGITS * COPIES + at], 1);
    }
  });
  group.sync();
}

// Standardises x (n,) into y (n,), n < 2^31 - 4096. x may be in the group's memory or elsewhere. counts: PLANE_MEMORY
// words of the group's memory. *nonfinite: receives the number of infinite or NaN values, which become 0.
template <class Input, class Group>
SGMIM_HOST_DEVICE void standardize_plane(
    const Group& group, const typename Input::Raw* x, uint32_t n, uint32_t* counts, float* y, int64_t* nonfinite) {
  Prefix low{0, 0}, high{0, 0};
  uint32_t kept = 0;
  for (int32_t level = 0; level < 4; ++level) {
    count_digits<Input>(group, x, n, level, low.bits, high.bits, counts);
    const uint32_t* const high_counts = level == 0 ? counts : counts + DIGITS * COPIES;
    if (level == 0) {
      uint32_t mine = 0, finite;
      for (uint32_t i = group.rank(); i < DIGITS * COPIES; i += group.size()) mine += counts[i];
      group.scan(mine, finite);
      if (group.rank() == 0) *nonfinite = n - finite;
      low.rank = static_cast<uint32_t>(0.1 * finite);
      kept = static_cast<uint32_t>(0.9 * finite) - low.rank;
      if (kept < 2) {
        each(group, x, n, [&](uint32_t i, typename Input::Raw) { y[i] = 0; });
        return;
      }
      high.rank = low.rank + kept - 1;
    }
    low = find_digit<COPIES>(group, counts, low, counts + 2 * DIGITS * COPIES);
    high = find_digit<COPIES>(group, high_counts, high, counts + 2 * DIGITS * COPIES);
  }

  const double origin = value_of(low.bits), spread = value_of(high.bits) - origin;
  double mean = 0, variance = 0;  // of the kept values minus `origin`
  if (low.bits != high.bits) {
    double sum = 0, squares = 0;
    each(group, x, n, [&](uint32_t, typename Input::Raw raw) {
      const float value = Input::value(raw);
      const uint32_t key = key_of(value);
      if (low.bits < key && key < high.bits) {
        const double difference = value - origin;
        sum += difference;
        squares += difference * difference;
      }
    });
    const double copies = high.rank + 1;  // kept values equal to the upper one; those equal to the lower one add 0
    mean = (group.sum(sum) + copies * spread) / kept;
    variance = (group.sum(squares) + copies * spread * spread - kept * mean * mean) / (kept - 1);
  }
  mean += origin;
  const double scale = 1 / sqrt(variance + 1e-6);
  each(group, x, n, [&](uint32_t i, typename Input::Raw raw) {
    const float value = Input::value(raw);
    y[i] = is_finite(value) ? static_cast<float>((value - mean) * scale) : 0.0f;
  });
}

}  // namespace sgmim
