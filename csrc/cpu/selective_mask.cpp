// Draws the masks of a batch and lists their rows. In each image the units with the smallest random keys are masked.
//
// The keys are a function of (seed, image, unit), and the offsets of the row lists follow from the given counts, so
// images are independent of each other and of the number of threads.
#include "cpu/launch.h"
#include "philox.h"

namespace sgmim {

namespace {

// Fills `keys` with key << 32 | unit: the unit breaks ties between equal keys.
void draw_keys(uint32_t key0, uint32_t key1, uint32_t image, std::vector<uint64_t>& keys) {
  for (size_t unit = 0; unit < keys.size(); unit += 4) {
    const Philox random = philox({{static_cast<uint32_t>(unit / 4), image, 0, 0}}, key0, key1);
    for (size_t i = unit; i < std::min(unit + 4, keys.size()); ++i)
      keys[i] = uint64_t{random.words[i - unit]} << 32 | i;
  }
}

// Writes the mask of one image, and its visible and masked rows.
void write_image(
    const std::vector<uint8_t>& drawn,  // (gh * gw,): 1 for masked units
    int64_t gh, int64_t gw, int64_t scale,
    int64_t cell,  // index of the image's first cell
    bool* mask,    // (gh * scale, gw * scale)
    int64_t* visible, int64_t* masked) {
  for (int64_t y = 0; y < gh; ++y) {
    for (int64_t i = 0; i < scale; ++i) {
      for (int64_t x = 0; x < gw; ++x) {
        const bool is_masked = drawn[y * gw + x];
        int64_t*& rows = is_masked ? masked : visible;
        for (int64_t j = 0; j < scale; ++j) {
          *mask++ = is_masked;
          *rows++ = cell++;
        }
      }
    }
  }
}

void selective_mask(
    const Tensor& seed, const std::vector<int64_t>& counts, int64_t gh, int64_t gw, int64_t scale, const Tensor& mask,
    const Tensor& visible, const Tensor& visible_offsets, const Tensor& masked, const Tensor& masked_offsets) {
  SGMIM_CHECK(
      0 < gh && 0 < gw && 0 < scale && gh <= INT32_MAX && gw <= INT32_MAX / gh && scale <= INT16_MAX,
      "grid must have from 1 to 2^31 - 1 units and scale be from 1 to 2^15 - 1, got ", gh, " x ", gw, " and ", scale);
  const int64_t batch = counts.size(), units = gh * gw, per_unit = scale * scale, cells = units * per_unit;
  check_packed(seed, "seed", ScalarType::Long, 2);
  check_packed(visible_offsets, "visible_offsets", ScalarType::Long, batch + 1);
  check_packed(masked_offsets, "masked_offsets", ScalarType::Long, batch + 1);
  int64_t *v = data<int64_t>(visible_offsets), *m = data<int64_t>(masked_offsets);
  v[0] = m[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    SGMIM_CHECK(0 <= counts[b] && counts[b] <= units, "image ", b, " must have 0 to ", units,
                " masked units, got ", counts[b]);
    v[b + 1] = v[b] + (units - counts[b]) * per_unit;
    m[b + 1] = m[b] + counts[b] * per_unit;
  }
  check_packed(visible, "visible", ScalarType::Long, v[batch]);
  check_packed(masked, "masked", ScalarType::Long, m[batch]);
  check_packed(mask, "mask", ScalarType::Bool, batch * cells);
  const int64_t* key = data<int64_t>(seed);
  parallel(batch, 1 + 4096 / cells, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(units);
    std::vector<uint8_t> drawn(units);
    for (int64_t b = begin; b < end; ++b) {
      draw_keys(static_cast<uint32_t>(key[0]), static_cast<uint32_t>(key[1]), static_cast<uint32_t>(b), keys);
      std::nth_element(keys.begin(), keys.begin() + counts[b], keys.end());
      std::fill(drawn.begin(), drawn.end(), 0);
      for (int64_t i = 0; i < counts[b]; ++i) drawn[static_cast<uint32_t>(keys[i])] = 1;
      write_image(
          drawn, gh, gw, scale, b * cells, data<bool>(mask) + b * cells, data<int64_t>(visible) + v[b],
          data<int64_t>(masked) + m[b]);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) {
  m.def(
      "selective_mask(Tensor seed, int[] masked_units, int gh, int gw, int scale, Tensor(a!) mask, Tensor(b!) visible, "
      "Tensor(c!) visible_offsets, Tensor(d!) masked, Tensor(e!) masked_offsets) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CPU, m) { m.impl("selective_mask", TORCH_BOX(&selective_mask)); }

}  // namespace sgmim
