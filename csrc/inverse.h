// Look-up of numbers in a list of distinct numbers, through an inverse of the list that needs no initialization.
#pragma once

#include <cassert>

#include "group.h"

namespace sgmim {

// Writes inverse[list[i]] = i with all threads of the group. Elements of `inverse`, of which there are `numbers`, that
// do not correspond to the list keep their values.
template <class Group>
SGMIM_HOST_DEVICE void invert(
    const Group& group, const int64_t* list, int64_t count, int64_t numbers, int64_t* inverse) {
  for (int64_t i = group.rank(); i < count; i += group.size()) {
    assert(0 <= list[i] && list[i] < numbers && "a row is not the number of a cell or patch");
    inverse[list[i]] = i;
  }
}

// Returns the position of a number in the list, or -1. The inverse is arbitrary for numbers that are not in the list,
// so the result is verified against the list.
SGMIM_HOST_DEVICE int64_t find(const int64_t* list, int64_t count, const int64_t* inverse, int64_t number) {
  const int64_t i = inverse[number];
  return 0 <= i && i < count && list[i] == number ? i : -1;
}

}  // namespace sgmim
