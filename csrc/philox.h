// Philox 4x32-10, the counter-based random number generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers:
// as easy as 1, 2, 3" (2011). Plain C++ for the host and the device.
#pragma once

#include "group.h"

namespace sgmim {

struct Philox {
  uint32_t words[4];
};

SGMIM_HOST_DEVICE Philox philox(Philox counter, uint32_t key0, uint32_t key1) {
  uint32_t(&c)[4] = counter.words;
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = uint64_t{0xD2511F53} * c[0], high = uint64_t{0xCD9E8D57} * c[2];
    c[0] = static_cast<uint32_t>(high >> 32) ^ c[1] ^ key0;
    c[1] = static_cast<uint32_t>(high);
    c[2] = static_cast<uint32_t>(low >> 32) ^ c[3] ^ key1;
    c[3] = static_cast<uint32_t>(low);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

}  // namespace sgmim
