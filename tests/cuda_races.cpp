// Runs the bodies of the CUDA kernels in groups of host threads under the thread sanitizer, which reports any two
// accesses that no barrier orders, and compares the results with those of a group of one. host_build.py compiles it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "draw_mask.h"
#include "host_group.h"
#include "standardize_plane.h"

namespace {

void check(bool same, const char* what) {
  if (same) return;
  std::printf("%s differs from a group of one\n", what);
  std::exit(1);
}

struct Drawn {
  std::unique_ptr<bool[]> mask;
  std::vector<int64_t> masked, visible;
};

Drawn draw(const sgmim::MaskGrid& grid, uint32_t count, int32_t threads) {
  const int64_t cells = sgmim::cells_of(grid), hidden = int64_t{count} * grid.scale * grid.scale;
  Drawn drawn{std::unique_ptr<bool[]>(new bool[cells]), std::vector<int64_t>(hidden), std::vector<int64_t>(cells - hidden)};
  std::vector<uint32_t> memory(sgmim::mask_memory(grid));
  run_group(threads, [&](const HostGroup& group) {
    sgmim::draw_mask(
        group, 1, 2, 3, count, grid, memory.data(), 0, 0, drawn.mask.get(), drawn.masked.data(), drawn.visible.data());
  });
  return drawn;
}

std::vector<float> standardize(const std::vector<float>& x, int32_t threads, int64_t& nonfinite) {
  std::vector<uint32_t> counts(sgmim::PLANE_MEMORY);
  std::vector<float> y(x.size());
  run_group(threads, [&](const HostGroup& group) {
    sgmim::standardize_plane<sgmim::Float32>(
        group, x.data(), static_cast<uint32_t>(x.size()), counts.data(), y.data(), &nonfinite);
  });
  return y;
}

}  // namespace

int main() {
  for (int32_t rows : {1, 3, 17})
    for (uint32_t count : {0, 1, rows * 5}) {
      const sgmim::MaskGrid grid{rows, 5, 2};
      const Drawn one = draw(grid, count, 1), many = draw(grid, count, 3);
      check(!std::memcmp(one.mask.get(), many.mask.get(), sgmim::cells_of(grid)), "a mask");
      check(one.masked == many.masked && one.visible == many.visible, "a row list");
    }
  std::srand(1);
  for (size_t n : {1, 2, 7, 1000}) {
    std::vector<float> x(n);
    for (float& value : x) value = static_cast<float>(std::rand() % 50) / 7;  // integers' sums: the same in any order
    for (float& value : x) value = static_cast<float>(static_cast<int>(value));
    if (n > 100) x[n / 2] = INFINITY;
    int64_t bad_one = -1, bad_many = -1;
    check(standardize(x, 1, bad_one) == standardize(x, 3, bad_many) && bad_one == bad_many, "a standardised map");
  }
}
