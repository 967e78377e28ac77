// Radix selection of the element of a given rank among 32-bit keys: four passes, one byte each, most significant first.
#pragma once

#include "group.h"

namespace sgmim {

constexpr uint32_t DIGITS = 256;

// The upper bytes of a key that are known so far, and the wanted rank among the keys that start with them. After the
// last byte: the key, and the number of equal keys at lower ranks.
struct Prefix {
  uint32_t bits, rank;
};

// Appends the next byte of the wanted key to the prefix. counts: COPIES adjacent counters per digit; the caller has put
// a barrier after the last addition, and their total is greater than the rank. found: 2 words of the group's memory.
// Ends with a barrier, after which counts and found may be overwritten.
template <uint32_t COPIES, class Group>
SGMIM_HOST_DEVICE Prefix find_digit(const Group& group, const uint32_t* counts, Prefix prefix, uint32_t* found) {
  uint32_t running = 0;
  for (uint32_t first = 0; first < DIGITS; first += group.size()) {
    const uint32_t digit = first + group.rank();
    uint32_t count = 0, total;
    if (digit < DIGITS)
      for (uint32_t copy = 0; copy < COPIES; ++copy) count += counts[digit * COPIES + copy];
    const uint32_t before = running + group.scan(count, total);
    if (before <= prefix.rank && prefix.rank - before < count) {  // true for exactly one digit
      found[0] = digit;
      found[1] = prefix.rank - before;
    }
    running += total;
  }
  group.sync();
  const Prefix longer{prefix.bits << 8 | found[0], found[1]};
  group.sync();
  return longer;
}

// Returns the key of a rank (0: the smallest) among `count` keys in the group's memory; rank < count. counts: DIGITS +
// 2 words of the group's memory. Ends with a barrier.
template <class Group>
SGMIM_HOST_DEVICE Prefix
select_key(const Group& group, const uint32_t* keys, uint32_t count, uint32_t rank, uint32_t* counts) {
  Prefix prefix{0, rank};
  for (int32_t shift = 24; shift >= 0; shift -= 8) {
    for (uint32_t digit = group.rank(); digit < DIGITS; digit += group.size()) counts[digit] = 0;
    group.sync();
    for (uint32_t i = group.rank(); i < count; i += group.size())
      if (shift == 24 || keys[i] >> (shift + 8) == prefix.bits) group.add(&counts[keys[i] >> shift & 0xff], 1);
    group.sync();
    prefix = find_digit<1>(group, counts, prefix, counts + DIGITS);
  }
  return prefix;
}

}  // namespace sgmim
