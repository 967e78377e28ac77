// Draws the masks of a batch and lists their rows in one launch, with a warp per image if images are small, else with a
// block. draw_mask.h has the device function, which the tests also run on the host.
#include "cuda/groups.h"
#include "cuda/launch.h"
#include "draw_mask.h"

namespace sgmim {

namespace {

constexpr uint32_t WARPS = 4;         // warps, and images, of a block of draw_by_warps
constexpr int64_t WARP_CELLS = 1024;  // most cells of an image that is drawn by a warp
constexpr uint32_t BLOCK = 512;       // threads of a block that draws one image

struct MaskBatch {
  MaskGrid grid;
  int64_t images;
  int64_t masked;  // masked units per image, or -1: given by masked_offsets, which are an input then
  const int64_t* seed;
  bool* mask;
  int64_t *masked_rows, *masked_offsets, *visible_rows, *visible_offsets;
};

template <class Group>
__device__ void draw_image(const Group& group, const MaskBatch& batch, int64_t image, uint32_t* memory) {
  const int64_t cells = cells_of(batch.grid);
  const uint32_t per_unit = batch.grid.scale * batch.grid.scale;
  int64_t begin = image * batch.masked * per_unit, end = begin + batch.masked * per_unit;
  if (batch.masked < 0) {
    begin = batch.masked_offsets[image];
    end = batch.masked_offsets[image + 1];
  }
  if (group.rank() == 0) {
    if (image == 0) batch.visible_offsets[0] = 0;
    batch.visible_offsets[image + 1] = (image + 1) * cells - end;
    if (batch.masked >= 0) {
      if (image == 0) batch.masked_offsets[0] = 0;
      batch.masked_offsets[image + 1] = end;
    }
  }
  draw_mask(
      group, static_cast<uint32_t>(batch.seed[0]), static_cast<uint32_t>(batch.seed[1]), image,
      static_cast<uint32_t>(end - begin) / per_unit, batch.grid, memory, begin, image * cells - begin,
      batch.mask + image * cells, batch.masked_rows, batch.visible_rows);
}

// Both kernels write 9 bytes per cell and 16 per image, and read 16 bytes of seed. They are bound by latency.
// Shared memory: 1036 + 4 * units bytes per image. Registers: 36 to 48.

__global__ void __launch_bounds__(WARPS * WARP) draw_by_warps(MaskBatch batch) {
  extern __shared__ uint32_t memory[];
  const int64_t image = int64_t{blockIdx.x} * WARPS + threadIdx.x / WARP;
  if (image >= batch.images) return;  // all lanes of the warp
  draw_image(WarpGroup{}, batch, image, memory + threadIdx.x / WARP * mask_memory(batch.grid));
}

// Uses 256 more bytes of shared memory.
__global__ void __launch_bounds__(BLOCK) draw_by_blocks(MaskBatch batch) {
  extern __shared__ uint32_t memory[];
  __shared__ double scratch[WARP];
  draw_image(BlockGroup{scratch}, batch, blockIdx.x, memory);
}

// masked: masked units per image, or -1 if masked_offsets, (images + 1,), is an input. mask: (images, gh * scale,
// gw * scale).
void selective_mask(
    const Tensor& seed, int64_t masked, int64_t gh, int64_t gw, int64_t scale, const Tensor& mask,
    const Tensor& visible, const Tensor& visible_offsets, const Tensor& masked_rows, const Tensor& masked_offsets) {
  const int64_t images = masked_offsets.numel() - 1;
  SGMIM_CHECK(
      gh > 0 && gw > 0 && gh <= MOST_UNITS && gw <= MOST_UNITS && gh * gw <= MOST_UNITS, "a grid of ", gh, " x ", gw,
      " units; the CUDA kernel holds at most ", MOST_UNITS);
  SGMIM_CHECK(
      scale > 0 && scale <= INT16_MAX && gh * gw * scale * scale <= INT32_MAX, gh, " x ", gw,
      " units of scale ", scale, "; the CUDA kernel counts less than 2^31 cells per image");
  SGMIM_CHECK(-1 <= masked && masked <= gh * gw, masked, " of ", gh * gw, " units masked");
  const int64_t cells = gh * gw * scale * scale;
  SGMIM_CHECK(seed.is_cuda(), "seed must be on a GPU");
  check_packed(seed, "seed", ScalarType::Long, seed, 2);
  check_packed(mask, "mask", ScalarType::Bool, seed, images * cells);
  const int64_t hidden = masked < 0 ? masked_rows.numel() : images * masked * scale * scale;
  check_packed(masked_rows, "the masked rows", ScalarType::Long, seed, hidden);
  check_packed(visible, "the visible rows", ScalarType::Long, seed, images * cells - hidden);
  check_packed(masked_offsets, "the masked offsets", ScalarType::Long, seed, images + 1);
  check_packed(visible_offsets, "the visible offsets", ScalarType::Long, seed, images + 1);
  if (images == 0) return;

  const DeviceGuard guard(seed.get_device_index());
  const MaskBatch batch{
      {static_cast<int32_t>(gh), static_cast<int32_t>(gw), static_cast<int32_t>(scale)},
      images,
      masked,
      pointer<const int64_t>(seed),
      pointer<bool>(mask),
      pointer<int64_t>(masked_rows),
      pointer<int64_t>(masked_offsets),
      pointer<int64_t>(visible),
      pointer<int64_t>(visible_offsets)};
  const size_t memory = sizeof(uint32_t) * mask_memory(batch.grid);
  if (cells <= WARP_CELLS)
    launch(draw_by_warps, (images + WARPS - 1) / WARPS, WARPS * WARP, WARPS * memory, seed, batch);
  else
    launch(draw_by_blocks, images, BLOCK, memory, seed, batch);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cuda, m) {
  m.def(
      "selective_mask(Tensor seed, int masked, int gh, int gw, int scale, Tensor(a!) mask, Tensor(b!) visible, "
      "Tensor(c!) visible_offsets, Tensor(d!) masked_rows, Tensor(e!) masked_offsets) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cuda, CUDA, m) { m.impl("selective_mask", TORCH_BOX(&selective_mask)); }

}  // namespace sgmim
