// Whether and where a number stands in a list of distinct numbers, by an inverse of the list that nobody has to clear.
#pragma once

#include <cassert>

#include "group.h"

namespace sgmim {

// inverse[list[i]] = i, shared out among the group's threads; those of the `numbers` that are not in the list keep what
// was there.
template <class Group>
SGMIM_HOST_DEVICE void invert(
    const Group& group, const int64_t* list, int64_t count, int64_t numbers, int64_t* inverse) {
  for (int64_t i = group.rank(); i < count; i += group.size()) {
    assert(0 <= list[i] && list[i] < numbers && "a row is not the number of a cell or patch");
    inverse[list[i]] = i;
  }
}

// The place of a number in the list, or -1. Of a number that is not listed the inverse may say anything: the list
// itself has the last word.
SGMIM_HOST_DEVICE int64_t find(const int64_t* list, int64_t count, const int64_t* inverse, int64_t number) {
  const int64_t i = inverse[number];
  return 0 <= i && i < count && list[i] == number ? i : -1;
}

}  // namespace sgmim
