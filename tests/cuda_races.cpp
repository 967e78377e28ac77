// Runs the device functions of the CUDA kernels in groups of host threads under the thread sanitizer, which reports
// conflicting accesses that no barrier orders, and compares the results with those of one thread. host_build.py
// compiles this program.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "attend.h"
#include "draw_mask.h"
#include "patch_copy.h"
#include "host_group.h"
#include "place_tokens.h"
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
  Drawn drawn{std::unique_ptr<bool[]>(new bool[cells]), std::vector<int64_t>(hidden),
              std::vector<int64_t>(cells - hidden)};
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

// Forward and backward of one image and head: 40 queries, 35 shown keys of 45 cells, depth 20.
std::vector<float> attend(int32_t threads) {
  constexpr int32_t QUERIES = 40, SHOWN = 35, DEPTH = 20, ROWS = SHOWN + 1;
  std::srand(2);
  const auto random = [](int32_t n) {
    std::vector<float> values(n);
    for (float& value : values) value = std::rand() / static_cast<float>(RAND_MAX) - 0.5f;
    return values;
  };
  const auto q = random(QUERIES * DEPTH), k = random(ROWS * DEPTH), v = random(ROWS * DEPTH);
  const auto dout = random(QUERIES * DEPTH);
  std::vector<float> all(2 * QUERIES * DEPTH + 2 * ROWS * DEPTH + 2 * QUERIES + 2 * DEPTH);
  const int64_t visible[2] = {0, QUERIES}, shown[2] = {0, SHOWN};
  sgmim::Attention<float> a{};
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.dout = dout.data();
  a.out = all.data(), a.dq = a.out + QUERIES * DEPTH, a.dk = a.dq + QUERIES * DEPTH, a.dv = a.dk + ROWS * DEPTH;
  a.lse = a.dv + ROWS * DEPTH, a.hidden_sums = a.lse + 2 * QUERIES;
  a.visible_offsets = visible, a.shown_offsets = shown;
  a.images = 1, a.queries = QUERIES, a.last = SHOWN, a.cells = 45, a.heads = 1, a.depth = DEPTH,
  a.scale = 0.2f, a.keep = true;
  constexpr int32_t BLOCKS = 2;
  std::vector<float> memory[1 + BLOCKS];
  const auto lay_out = [&](auto& tiles, std::vector<float>& own) {
    own.resize(tiles.lay_out(nullptr, DEPTH) / sizeof(float));
    tiles.lay_out(reinterpret_cast<char*>(own.data()), DEPTH);
  };
  sgmim::ForwardTiles<float> forward;
  sgmim::BackwardTiles<float> backward[BLOCKS];
  lay_out(forward, memory[BLOCKS]);
  for (int32_t block = 0; block < BLOCKS; ++block) lay_out(backward[block], memory[block]);
  const sgmim::Place place = sgmim::place_of(a, 0, 0);
  run_group(threads, [&](const HostGroup& group) {
    for (int32_t begin : {0, 32}) {
      sgmim::attend(group, a, place, begin, forward);
      group.sync();
    }
  });
  run_launch(BLOCKS, 1, threads, [&](const HostThread& t) {
    sgmim::attend_backward(t.block, t.launch, a, t.block_number, BLOCKS, backward[t.block_number]);
  });
  return all;
}

// Copies the cells 4, 1 and 7 of nine back to a map; the other cells become zero.
std::vector<uint32_t> unpack(int32_t threads) {
  constexpr int32_t SIDE = 3, CELL = 4, WIDTH = SIDE * CELL;
  const int64_t cells[] = {4, 1, 7}, strides[] = {WIDTH * WIDTH, WIDTH * WIDTH, WIDTH, 1};
  const sgmim::CellGrid grid = sgmim::cell_grid(1, WIDTH, WIDTH, strides, CELL, 2, true);
  std::vector<uint32_t> packed(3 * CELL * CELL), map(WIDTH * WIDTH, 9);
  for (size_t i = 0; i < packed.size(); ++i) packed[i] = static_cast<uint32_t>(i) + 10;
  std::vector<int64_t> inverse(SIDE * SIDE, 2);
  run_group(threads, [&](const HostGroup& group) {
    sgmim::fill_cells<sgmim::Straight<uint32_t>>(
        group, grid, cells, 3, SIDE * SIDE, 1, inverse.data(), packed.data(), map.data());
  });
  return map;
}

// Forward and backward of the tokens of 11 patches, 5 of them visible, with a norm over 18 channels. A block has two
// warps of three lanes, so that every thread reads values that others have written.
std::vector<float> place(int32_t blocks) {
  constexpr int32_t ROWS = 11, COUNT = 5, WIDTH = 18, WARPS = 2, LANES = 3;
  const int64_t visible[COUNT] = {7, 0, 10, 3, 4};
  std::vector<float> embedded(COUNT * WIDTH), dout(ROWS * WIDTH), ones(WIDTH, 1.5f);
  for (size_t i = 0; i < embedded.size(); ++i) embedded[i] = static_cast<float>(i * i % 13);
  for (size_t i = 0; i < dout.size(); ++i) dout[i] = static_cast<float>(i * i % 7);
  std::vector<int64_t> inverse(ROWS, 1);
  std::vector<float> out(ROWS * WIDTH), dembedded(COUNT * WIDTH), statistics(2 * COUNT), sums(sgmim::SUMS * WIDTH);
  std::vector<float> partials(sgmim::parts_of(ROWS) * sums.size());
  const sgmim::Tokens<float> tokens{
      embedded.data(), visible, inverse.data(), ones.data(), ones.data(), statistics.data(), COUNT, ROWS, WIDTH, 1e-5f};
  std::vector<std::vector<float>> memory(blocks, std::vector<float>(sgmim::place_memory(WIDTH, WARPS)));
  run_launch(blocks, WARPS, LANES, [&](const HostThread& t) {
    const sgmim::GroupIndex in_launch{t.block_number * WARPS + t.warp_number, blocks * WARPS};
    sgmim::place_tokens<1>(t.warp, in_launch, t.launch, tokens, ones.data(), out.data());
  });
  run_launch(blocks, WARPS, LANES, [&](const HostThread& t) {
    sgmim::place_tokens_backward<1>(
        t.warp, sgmim::GroupIndex{t.warp_number, WARPS}, t.block, sgmim::GroupIndex{t.block_number, blocks}, t.launch,
        tokens, dout.data(), dembedded.data(), partials.data(), sums.data(), memory[t.block_number].data());
  });
  for (const auto* values : {&dembedded, &statistics, &sums}) out.insert(out.end(), values->begin(), values->end());
  return out;
}

}  // namespace

int main() {
  check(place(1) == place(3), "tokens, or their gradients,");
  check(unpack(1) == unpack(3), "a map's gradient");
  check(attend(1) == attend(3), "attention");
  attend(64);  // two threads per row sum in another order, so this is for the sanitizer alone
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
    for (float& value : x) value = static_cast<float>(std::rand() % 50) / 7;  // integers: same sums in any order
    for (float& value : x) value = static_cast<float>(static_cast<int>(value));
    if (n > 100) x[n / 2] = INFINITY;
    int64_t bad_one = -1, bad_many = -1;
    check(standardize(x, 1, bad_one) == standardize(x, 3, bad_many) && bad_one == bad_many, "a standardised map");
  }
}
