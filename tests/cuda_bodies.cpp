// Python module that runs the device functions of the CUDA kernels on the host. host_build.py compiles this file, which
// needs neither torch nor CUDA.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>

#include "attend.h"
#include "attend_window.h"
#include "draw_mask.h"
#include "patch_copy.h"
#include "host_group.h"
#include "host_warps.h"
#include "place_tokens.h"
#include "standardize_plane.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// A "group" of threads without barriers: the tests run one rank after another.
struct Rank {
  int32_t rank_, size_;
  int32_t rank() const { return rank_; }
  int32_t size() const { return size_; }
};

// A tensor and its packed cells. each() calls run(access, grid) with the access that fits both.
template <class Element>
struct Patches {
  sgmim::CellGrid grid;
  void *outside, *inside;

  Patches(py::array_t<Element>& tensor, py::array_t<Element>& packed, int32_t cell, int32_t patch, bool zorder) {
    const auto stride = [&](int axis) { return static_cast<int64_t>(tensor.strides(axis)) / int64_t{sizeof(Element)}; };
    const int64_t strides[4] = {stride(0), stride(1), stride(2), stride(3)};
    grid = sgmim::cell_grid(tensor.shape(1), tensor.shape(2), tensor.shape(3), strides, cell, patch, zorder);
    outside = tensor.mutable_data();
    inside = packed.mutable_data();
  }

  // Returns the numbers of pixels and channels that an access copies.
  template <class Run>
  py::tuple each(const Run& run) const {
    using namespace sgmim;
    constexpr int64_t SIZE = sizeof(Element);
    const uint64_t addresses = reinterpret_cast<uintptr_t>(outside) | reinterpret_cast<uintptr_t>(inside);
    if (const int32_t channels = channels_per_access(grid, SIZE, addresses)) {
      if constexpr (SIZE == 2 || SIZE == 4) {
        if (channels == 3)
          run(Transposed<Element, 3>{}, grid);
        else
          run(Transposed<Element, 16 / SIZE>{}, grid);
        return py::make_tuple(16 / SIZE, channels);
      }
      throw std::logic_error("turned elements of another size");
    }
    const int32_t pixels = pixels_per_access(grid, SIZE, addresses);
    const CellGrid wide = widen(grid, pixels);
    switch (SIZE * pixels) {
      case 2: run(Straight<uint16_t>{}, wide); break;
      case 4: run(Straight<uint32_t>{}, wide); break;
      case 8: run(Straight<uint64_t>{}, wide); break;
      case 16: run(Straight<Sixteen>{}, wide); break;
      default: throw std::logic_error("an access of no such size");
    }
    return py::make_tuple(pixels, 1);
  }
};

template <class Element>
py::tuple pack_patches(
    py::array_t<Element> tensor, py::array_t<int64_t> cells, py::array_t<Element> packed, int32_t cell, int32_t patch,
    bool zorder, int32_t threads) {
  const Patches<Element> patches(tensor, packed, cell, patch, zorder);
  return patches.each([&](auto access, const sgmim::CellGrid& grid) {
    using Unit = typename decltype(access)::Element;
    const int32_t per_cell = sgmim::patches_per_cell(grid);
    for (int64_t row = 0; row < cells.size() * per_cell; ++row)
      for (int32_t rank = 0; rank < threads; ++rank)
        sgmim::copy_patch<decltype(access)>(
            Rank{rank, threads}, grid, cells.data()[row / per_cell], row, static_cast<Unit*>(patches.outside),
            static_cast<Unit*>(patches.inside));
  });
}

// inverse (cells,): may have any content.
template <class Element>
py::tuple unpack_patches(
    py::array_t<Element> packed, py::array_t<int64_t> cells, Array<int64_t> inverse, py::array_t<Element> tensor,
    int32_t cell, int32_t patch, bool zorder, int32_t threads, int32_t lanes) {
  const Patches<Element> patches(tensor, packed, cell, patch, zorder);
  return patches.each([&](auto access, const sgmim::CellGrid& grid) {
    using Unit = typename decltype(access)::Element;
    run_group(threads, [&](const HostGroup& group) {
      sgmim::fill_cells<decltype(access)>(
          group, grid, cells.data(), cells.size(), inverse.size(), lanes, inverse.mutable_data(),
          static_cast<Unit*>(patches.inside), static_cast<Unit*>(patches.outside));
    });
  });
}

// Returns the key of each rank of `ranks`, and the number of equal keys at lower ranks.
py::tuple select_key(Array<uint32_t> keys, Array<uint32_t> ranks, int32_t threads) {
  Array<uint32_t> found(ranks.size()), before(ranks.size());
  std::vector<uint32_t> counts(sgmim::DIGITS + 2, 12345);
  run_group(threads, [&](const HostGroup& group) {
    for (py::ssize_t i = 0; i < ranks.size(); ++i) {
      const sgmim::Prefix key = sgmim::select_key(
          group, keys.data(), static_cast<uint32_t>(keys.size()), ranks.data()[i], counts.data());
      if (group.rank() == 0) {
        found.mutable_data()[i] = key.bits;
        before.mutable_data()[i] = key.rank;
      }
    }
  });
  return py::make_tuple(found, before);
}

// Returns the number of masked units before each unit, for given keys.
Array<uint32_t> count_masked(Array<uint32_t> keys, uint32_t masked, int32_t threads) {
  const uint32_t units = static_cast<uint32_t>(keys.size());
  Array<uint32_t> before(units + 1);
  std::copy(keys.data(), keys.data() + units, before.mutable_data());
  std::vector<uint32_t> counts(sgmim::DIGITS + 2, 12345);
  run_group(threads, [&](const HostGroup& group) {
    sgmim::count_masked(group, units, masked, before.mutable_data(), counts.data());
  });
  return before;
}

// mask: (images, rows * scale, columns * scale). masked_rows and visible_rows have the length that follows from
// `masked`.
void draw_masks(
    uint64_t key0, uint64_t key1, Array<int64_t> masked, int32_t rows, int32_t columns, int32_t scale, Array<bool> mask,
    Array<int64_t> masked_rows, Array<int64_t> visible_rows, int32_t threads) {
  const sgmim::MaskGrid grid{rows, columns, scale};
  const int64_t cells = sgmim::cells_of(grid);
  int64_t first = 0;
  std::vector<uint32_t> memory(sgmim::mask_memory(grid), 12345);
  for (int64_t image = 0; image < masked.size(); ++image) {
    const int64_t count = masked.data()[image];
    run_group(threads, [&](const HostGroup& group) {
      sgmim::draw_mask(
          group, static_cast<uint32_t>(key0), static_cast<uint32_t>(key1), image, static_cast<uint32_t>(count), grid,
          memory.data(), first, image * cells - first, mask.mutable_data() + image * cells, masked_rows.mutable_data(),
          visible_rows.mutable_data());
    });
    first += count * scale * scale;
  }
}

// x: (planes, n) in the storage type of Input; y: (planes, n) float32; nonfinite: (planes,).
template <class Input>
void standardize(Array<typename Input::Raw> x, Array<float> y, Array<int64_t> nonfinite, int32_t threads) {
  std::vector<uint32_t> counts(sgmim::PLANE_MEMORY, 12345);
  for (int64_t plane = 0; plane < x.shape(0); ++plane)
    run_group(threads, [&](const HostGroup& group) {
      sgmim::standardize_plane<Input>(
          group, x.data() + plane * x.shape(1), static_cast<uint32_t>(x.shape(1)), counts.data(),
          y.mutable_data() + plane * x.shape(1), nonfinite.mutable_data() + plane);
    });
}

template <class Input>
Array<float> values(Array<typename Input::Raw> raw) {
  Array<float> result(raw.size());
  for (py::ssize_t i = 0; i < raw.size(); ++i) result.mutable_data()[i] = Input::value(raw.data()[i]);
  return result;
}

// bfloat16 for the device functions, which convert by casts only.
struct Half {
  uint16_t bits;
  Half() = default;
  explicit Half(float value) {
    const uint32_t wide = sgmim::bit_cast<uint32_t>(value);
    bits = static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);  // to nearest, ties to even
  }
  explicit operator float() const { return sgmim::BFloat16::value(bits); }
};

// NumPy has no bfloat16, so its arrays contain the bits.
template <class T>
using Matrix = Array<std::conditional_t<sizeof(T) == 2, uint16_t, T>>;
template <class T>
const T* read(const Matrix<T>& matrix) {
  return reinterpret_cast<const T*>(matrix.data());
}
template <class T>
T* write(Matrix<T>& matrix) {
  return reinterpret_cast<T*>(matrix.mutable_data());
}

template <class T>
sgmim::Attention<T> describe(
    const Matrix<T>& q, const Matrix<T>& k, const Matrix<T>& v, const Array<int64_t>& visible_offsets,
    const Array<int64_t>& shown_offsets, int32_t cells, int32_t heads, bool keep) {
  sgmim::Attention<T> a{};
  a.q = read<T>(q);
  a.k = read<T>(k);
  a.v = read<T>(v);
  a.visible_offsets = visible_offsets.data();
  a.shown_offsets = shown_offsets.data();
  a.images = visible_offsets.size() - 1;
  a.queries = q.shape(0);
  a.last = k.shape(0) - 1;
  a.cells = cells;
  a.heads = heads;
  a.depth = static_cast<int32_t>(q.shape(1)) / heads;
  a.scale = 1 / std::sqrt(static_cast<float>(a.depth));
  a.keep = keep;
  a.aligned = a.depth % 16 == 0;
  return a;
}

// Tiles with memory of their own, filled with NaN.
template <class Tiles>
struct OwnTiles {
  Tiles tiles;
  std::vector<float> memory;

  explicit OwnTiles(int32_t depth) : memory(tiles.lay_out(nullptr, depth) / sizeof(float), NAN) {
    tiles.lay_out(reinterpret_cast<char*>(memory.data()), depth);
  }
};

template <class T>
void attend(
    Matrix<T> q, Matrix<T> k, Matrix<T> v, Array<int64_t> visible_offsets, Array<int64_t> shown_offsets, Matrix<T> out,
    Array<float> lse, int32_t cells, int32_t heads, bool keep, int32_t threads) {
  auto a = describe<T>(q, k, v, visible_offsets, shown_offsets, cells, heads, keep);
  a.out = write<T>(out);
  a.lse = lse.mutable_data();
  for (int64_t image = 0; image < a.images; ++image)
    for (int32_t head = 0; head < a.heads; ++head) {
      const OwnTiles<sgmim::ForwardTiles<T>> own(a.depth);
      const sgmim::Place place = sgmim::place_of(a, image, head);
      run_group(threads, [&](const HostGroup& group) {
        for (int32_t begin = 0; begin < place.queries; begin += sgmim::QUERIES) {
          sgmim::attend(group, a, place, begin, own.tiles);
          group.sync();
        }
      });
    }
}

template <class T>
void attend_backward(
    Matrix<T> dout, Matrix<T> q, Matrix<T> k, Matrix<T> v, Matrix<T> out, Array<float> lse,
    Array<int64_t> visible_offsets, Array<int64_t> shown_offsets, Matrix<T> dq, Matrix<T> dk, Matrix<T> dv,
    Array<float> hidden_sums, int32_t cells, int32_t heads, bool keep, int32_t threads, int32_t blocks) {
  auto a = describe<T>(q, k, v, visible_offsets, shown_offsets, cells, heads, keep);
  a.dout = read<T>(dout);
  a.out = write<T>(out);
  a.lse = lse.mutable_data();
  a.dq = write<T>(dq);
  a.dk = write<T>(dk);
  a.dv = write<T>(dv);
  a.hidden_sums = hidden_sums.mutable_data();
  using Tiles = OwnTiles<sgmim::BackwardTiles<T>>;
  std::vector<std::unique_ptr<Tiles>> tiles(blocks);
  for (auto& each : tiles) each = std::make_unique<Tiles>(a.depth);
  run_launch(blocks, 1, threads, [&](const HostThread& t) {
    sgmim::attend_backward(t.block, t.launch, a, t.block_number, blocks, tiles[t.block_number]->tiles);
  });
}

struct WindowSizes {
  std::array<int32_t, 2> window, shift;
  int32_t heads, groups;
};

template <class P>
P* maybe(Array<std::remove_const_t<P>>& array) {
  return array.size() > 0 ? array.mutable_data() : nullptr;
}

// Runs one block after another, with memory filled with NaN. depth: of a head; the number of tiles follows from the
// tokens.
template <class T, bool BACKWARD>
void walk_windows(const sgmim::WindowCall<T>& a, int32_t groups, int32_t depth, bool backwards) {
  const auto run = [&](auto tiles, auto d) {
    using Head = sgmim::WindowHead<HostWarpThread, T, tiles.value, d.value, BACKWARD>;
    using Memory = typename Head::Memory;
    for (int32_t block = 0; block < groups * a.heads; ++block) {
      const auto memory = std::make_unique<Memory>();
      std::memset(static_cast<void*>(memory.get()), 0xff, sizeof(Memory));
      HostBlock(tiles.value).run(
          [&](const HostWarpThread& thread) {
            Head head(thread, a, *memory);
            head.walk(block % a.heads, block / a.heads);
            if constexpr (BACKWARD) head.finish(block / a.heads);
          },
          backwards);
    }
  };
  using std::integral_constant;
  const auto with_depth = [&](auto tiles) {
    if (depth == 64)
      run(tiles, integral_constant<int32_t, 64>{});
    else
      run(tiles, integral_constant<int32_t, 32>{});
  };
  if (a.tokens() <= 48)
    with_depth(integral_constant<int32_t, 3>{});
  else if (a.tokens() <= 64)
    with_depth(integral_constant<int32_t, 4>{});
  else
    run(integral_constant<int32_t, 9>{}, integral_constant<int32_t, 32>{});
}

// Arrays of size 0 are treated as None. dout, dqkv and the sums belong to the backward, which does not need `out`.
template <class T>
void window_attention(
    Array<uint16_t> qkv, Array<float> bias, Array<int64_t> index, Array<float> logit_scale, Array<uint16_t> pad,
    WindowSizes sizes, Array<float> spread, Array<uint16_t> out, Array<uint16_t> dout, Array<uint16_t> dqkv,
    Array<float> dbias, Array<float> dscale, Array<float> dpad, bool backwards) {
  sgmim::WindowCall<T> a{};
  a.qkv = reinterpret_cast<const T*>(qkv.data());
  a.pad = reinterpret_cast<const T*>(maybe<const uint16_t>(pad));
  a.dout = reinterpret_cast<const T*>(maybe<const uint16_t>(dout));
  a.bias = spread.data();
  a.logit_scale = maybe<const float>(logit_scale);
  a.out = reinterpret_cast<T*>(maybe<uint16_t>(out));
  a.dqkv = reinterpret_cast<T*>(maybe<uint16_t>(dqkv));
  a.dbias = maybe<float>(dbias);
  a.dscale = maybe<float>(dscale);
  a.dpad = maybe<float>(dpad);
  a.height = static_cast<int32_t>(qkv.shape(1));
  a.width = static_cast<int32_t>(qkv.shape(2));
  a.window_h = sizes.window[0];
  a.window_w = sizes.window[1];
  a.shift_h = sizes.shift[0];
  a.shift_w = sizes.shift[1];
  a.down = (a.height + a.window_h - 1) / a.window_h;
  a.across = (a.width + a.window_w - 1) / a.window_w;
  a.heads = sizes.heads;
  a.windows = static_cast<int32_t>(qkv.shape(0)) * a.down * a.across;
  a.each = (a.windows + sizes.groups - 1) / sizes.groups;
  a.most_inverse = std::is_same_v<T, Half> ? 1e30f : 4096.0f;
  const int32_t tiles = a.tokens() <= 48 ? 3 : a.tokens() <= 64 ? 4 : 9;
  if (spread.size() != sgmim::spread_size(a.heads, tiles)) throw std::logic_error("the spread bias has another size");
  for (int64_t at = 0; at < spread.size(); ++at)
    spread.mutable_data()[at] = sgmim::spread_bias(
        maybe<const float>(bias), maybe<const int64_t>(index), index.size() > 0 ? bias.shape(0) : 0, a.heads, tiles,
        a.tokens(), at);
  const int32_t depth = static_cast<int32_t>(qkv.shape(3)) / 3 / a.heads;
  if (dqkv.size() > 0)
    walk_windows<T, true>(a, sizes.groups, depth, backwards);
  else
    walk_windows<T, false>(a, sizes.groups, depth, backwards);
}

// weight, bias, statistics: of the norm; of size 0 without a norm.
template <class T>
sgmim::Tokens<T> describe_tokens(
    const Matrix<T>& embedded, const Array<int64_t>& visible, Array<int64_t>& inverse, const Array<float>& weight,
    const Array<float>& bias, Array<float>& statistics, int32_t width, float eps) {
  const bool norm = weight.size() > 0;
  return {
      read<T>(embedded), visible.data(), inverse.mutable_data(), norm ? weight.data() : nullptr,
      norm ? bias.data() : nullptr, norm ? statistics.mutable_data() : nullptr, visible.size(), inverse.size(), width,
      eps};
}

// Calls run(constant) with the number of elements that an access copies.
template <class T, class Run>
void with_many(int32_t width, std::initializer_list<const void*> pointers, const Run& run) {
  constexpr int32_t MANY = 16 / sizeof(T);
  uintptr_t addresses = 0;
  for (const void* pointer : pointers) addresses |= reinterpret_cast<uintptr_t>(pointer);
  if (width % MANY == 0 && addresses % 16 == 0)
    run(std::integral_constant<int32_t, MANY>{});
  else
    run(std::integral_constant<int32_t, 1>{});
}

// shape: blocks, warps in a block, lanes in a warp.
using LaunchShape = std::array<int32_t, 3>;

template <class T>
void place_tokens(
    Matrix<T> embedded, Array<int64_t> visible, Array<int64_t> inverse, Array<float> token, Array<float> weight,
    Array<float> bias, float eps, Matrix<T> out, Array<float> statistics, LaunchShape shape) {
  const int32_t width = static_cast<int32_t>(out.shape(1));
  const auto tokens = describe_tokens<T>(embedded, visible, inverse, weight, bias, statistics, width, eps);
  T* const to = write<T>(out);
  with_many<T>(width, {tokens.embedded, to}, [&](auto many) {
    const auto [blocks, warps, lanes] = shape;
    const int64_t all = int64_t{blocks} * warps, per_block = warps;
    run_launch(blocks, warps, lanes, [&](const HostThread& t) {
      const sgmim::GroupIndex in_launch{t.block_number * per_block + t.warp_number, all};
      sgmim::place_tokens<decltype(many)::value>(t.warp, in_launch, t.launch, tokens, token.data(), to);
    });
  });
}

template <class T>
void place_tokens_backward(
    Matrix<T> dout, Matrix<T> embedded, Array<int64_t> visible, Array<int64_t> inverse, Array<float> weight,
    Array<float> statistics, Matrix<T> dembedded, Array<float> partials, Array<float> sums, LaunchShape shape) {
  const int32_t width = static_cast<int32_t>(dout.shape(1));
  const auto tokens = describe_tokens<T>(embedded, visible, inverse, weight, weight, statistics, width, 0);
  T* const to = write<T>(dembedded);
  if (partials.size() != sgmim::parts_of(tokens.rows) * sums.size())
    throw std::logic_error("the parts have another size");
  with_many<T>(width, {tokens.embedded, dout.data(), to}, [&](auto many) {
    const auto [blocks, warps, lanes] = shape;
    const int64_t all = blocks, per_block = warps;
    std::vector<std::vector<float>> memory(blocks, std::vector<float>(sgmim::place_memory(width, warps), NAN));
    run_launch(blocks, warps, lanes, [&](const HostThread& t) {
      sgmim::place_tokens_backward<decltype(many)::value>(
          t.warp, sgmim::GroupIndex{t.warp_number, per_block}, t.block, sgmim::GroupIndex{t.block_number, all},
          t.launch, tokens, read<T>(dout), to, partials.mutable_data(), sums.mutable_data(),
          memory[t.block_number].data());
    });
  });
}

}  // namespace

PYBIND11_MODULE(cuda_bodies, m) {
  const auto define_patches = [&](auto element) {
    using Element = decltype(element);
    m.def("pack_patches", &pack_patches<Element>, py::arg("tensor").noconvert(), py::arg("cells").noconvert(),
          py::arg("packed").noconvert(), py::arg("cell"), py::arg("patch"), py::arg("zorder"), py::arg("threads"));
    m.def("unpack_patches", &unpack_patches<Element>, py::arg("packed").noconvert(), py::arg("cells").noconvert(),
          py::arg("inverse").noconvert(), py::arg("tensor").noconvert(), py::arg("cell"), py::arg("patch"),
          py::arg("zorder"), py::arg("threads"), py::arg("lanes"));
  };
  define_patches(double{});
  define_patches(uint32_t{});
  define_patches(uint16_t{});
  m.def("patch_corner", [](int64_t cell_number, int32_t order, int64_t down, int64_t across, int64_t stride_image,
                           int64_t stride_row, int32_t cell, int32_t patch, bool zorder) {
    const int64_t strides[4] = {stride_image, 0, stride_row, 1};
    const auto grid = sgmim::cell_grid(1, down * cell, across * cell, strides, cell, patch, zorder);
    return sgmim::patch_corner(grid, cell_number, order);
  });
  m.def("select_key", &select_key);
  m.def("count_masked", &count_masked);
  m.def("draw_masks", &draw_masks, py::arg("key0"), py::arg("key1"), py::arg("masked").noconvert(), py::arg("rows"),
        py::arg("columns"), py::arg("scale"), py::arg("mask").noconvert(), py::arg("masked_rows").noconvert(),
        py::arg("visible_rows").noconvert(), py::arg("threads"));
  m.def("place_tokens", &place_tokens<float>);
  m.def("place_tokens_bfloat16", &place_tokens<Half>);
  m.def("place_tokens_backward", &place_tokens_backward<float>);
  m.def("place_tokens_backward_bfloat16", &place_tokens_backward<Half>);
  py::class_<WindowSizes>(m, "WindowSizes").def(py::init([](std::array<int32_t, 2> window, std::array<int32_t, 2> shift,
                                                           int32_t heads, int32_t groups) {
    return WindowSizes{window, shift, heads, groups};
  }));
  m.def("window_attention_bfloat16", &window_attention<Half>);
#ifdef __FLT16_MAX__
  m.def("window_attention_float16", &window_attention<_Float16>);
#endif
  m.def("attend", &attend<float>);
  m.def("attend_backward", &attend_backward<float>);
  m.def("attend_bfloat16", &attend<Half>);
  m.def("attend_backward_bfloat16", &attend_backward<Half>);
  const auto define = [&](const char* name, auto input) {
    using Input = decltype(input);
    m.def((std::string("standardize_") + name).c_str(), &standardize<Input>, py::arg("x").noconvert(),
          py::arg("y").noconvert(), py::arg("nonfinite").noconvert(), py::arg("threads"));
    m.def((std::string("values_") + name).c_str(), &values<Input>);
  };
  define("float32", sgmim::Float32{});
  define("float16", sgmim::Float16{});
  define("bfloat16", sgmim::BFloat16{});
  define("uint16", sgmim::UInt16{});
}
