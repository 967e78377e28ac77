// Attention of relational_guidance, forward and backward, one launch each, with a block per 32 queries (and, in the
// backward, per 32 keys) of one head and image. attend.h has the device functions. The tests also run them on the host.
#include <cmath>

#include "attend.h"
#include "cuda/launch.h"
#include "cuda/gemm.h"

namespace sgmim {

namespace {

constexpr uint32_t THREADS = 128;

// Registers: 75 to 150. Shared memory at depth 128: 52,480 bytes in half precision, 79,104 in float32.
// Reads q once, and k and v once per block of queries; writes out and lse.
template <class T>
__global__ void __launch_bounds__(THREADS, 2) attention(Attention<T> a, int32_t parts) {
  extern __shared__ __align__(32) char memory[];
  const uint32_t head = blockIdx.x / parts;  // of all images
  const int32_t begin = static_cast<int32_t>(blockIdx.x % parts) * QUERIES;
  const Place place = place_of(a, head / a.heads, static_cast<int32_t>(head % a.heads));
  if (begin >= place.queries) return;  // all threads of the block
  ForwardTiles<T> tiles;
  tiles.lay_out(memory, a.depth);
  attend(GemmGroup{}, a, place, begin, tiles);
}

// Has as many blocks as the GPU holds at once. After a barrier across blocks they sum the gradients of the hidden key
// and value over the images, in an order that does not depend on the number of blocks.
// Registers: 80 to 139. Shared memory at depth 128: 84,224 bytes in half precision, 121,088 in float32.
// Reads q, dout and out once per block of keys, and k and v once per block of queries. Writes dq, dk and dv, and two
// rows of float32 per image, which it reads once.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) attention_backward(Attention<T> a) {
  extern __shared__ __align__(32) char memory[];
  BackwardTiles<T> tiles;
  tiles.lay_out(memory, a.depth);
  attend_backward(GemmGroup{}, LaunchGroup{}, a, blockIdx.x, gridDim.x, tiles);
}

// Checks the tensors that both passes share, and collects them.
template <class T>
Attention<T> describe(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& visible_offsets, const Tensor& shown_offsets, int64_t cells, int64_t heads, bool keep) {
  const ScalarType type = q.scalar_type();
  const int64_t width = q.size(1), images = visible_offsets.numel() - 1;
  SGMIM_CHECK(heads > 0 && width % heads == 0, "heads ", heads, " must divide the width ", width);
  SGMIM_CHECK(0 < cells && cells <= INT32_MAX - 64, "an image of ", cells, " cells; expected less than 2^31 - 64");
  check_packed(q, "q", type, q, q.numel());
  check_packed(k, "k", type, q, k.numel());
  check_packed(v, "v", type, q, k.numel());
  check_packed(out, "out", type, q, q.numel());
  check_packed(lse, "lse", ScalarType::Float, q, 2 * q.size(0) * heads);
  check_packed(visible_offsets, "visible_offsets", ScalarType::Long, q, images + 1);
  check_packed(shown_offsets, "shown_offsets", ScalarType::Long, q, images + 1);
  SGMIM_CHECK(k.size(0) > 0 && k.size(1) == width, "k must be (shown cells + 1, ", width, ")");
  Attention<T> a{};
  a.q = pointer<const T>(q);
  a.k = pointer<const T>(k);
  a.v = pointer<const T>(v);
  a.out = pointer<T>(out);
  a.lse = pointer<float>(lse);
  a.visible_offsets = pointer<const int64_t>(visible_offsets);
  a.shown_offsets = pointer<const int64_t>(shown_offsets);
  a.images = images;
  a.queries = q.size(0);
  a.last = k.size(0) - 1;
  a.cells = static_cast<int32_t>(cells);
  a.heads = static_cast<int32_t>(heads);
  a.depth = static_cast<int32_t>(width / heads);
  a.scale = 1 / std::sqrt(static_cast<float>(a.depth));
  a.keep = keep;
  a.aligned = a.depth % 16 == 0 && on_sixteen_bytes({a.q, a.k, a.v});
  return a;
}

void attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& visible_offsets, const Tensor& shown_offsets,
    const Tensor& out, const Tensor& lse, int64_t cells, int64_t heads, bool keep) {
  dispatch_float(q, "q", [&](auto type) {
    using T = decltype(type);
    const Attention<T> a = describe<T>(q, k, v, out, lse, visible_offsets, shown_offsets, cells, heads, keep);
    if (q.size(0) == 0) return;
    const DeviceGuard guard(q.get_device_index());
    const int32_t parts = (a.cells + QUERIES - 1) / QUERIES;
    launch(
        attention<T>, a.images * heads * parts, THREADS, ForwardTiles<T>{}.lay_out(nullptr, a.depth), q, a, parts);
  });
}

// hidden_sums (2, images, C), float32: workspace.
void attention_gradients(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& visible_offsets, const Tensor& shown_offsets, const Tensor& dq, const Tensor& dk, const Tensor& dv,
    const Tensor& hidden_sums, int64_t cells, int64_t heads, bool keep) {
  dispatch_float(q, "q", [&](auto type) {
    using T = decltype(type);
    Attention<T> a = describe<T>(q, k, v, out, lse, visible_offsets, shown_offsets, cells, heads, keep);
    check_packed(dout, "dout", q.scalar_type(), q, q.numel());
    check_packed(dq, "dq", q.scalar_type(), q, q.numel());
    check_packed(dk, "dk", q.scalar_type(), q, k.numel());
    check_packed(dv, "dv", q.scalar_type(), q, k.numel());
    check_packed(hidden_sums, "hidden_sums", ScalarType::Float, q, 2 * a.images * q.size(1));
    if (a.images == 0) return;
    a.dout = pointer<const T>(dout);
    a.aligned = a.aligned && on_sixteen_bytes({a.dout});
    a.dq = pointer<T>(dq);
    a.dk = pointer<T>(dk);
    a.dv = pointer<T>(dv);
    a.hidden_sums = pointer<float>(hidden_sums);
    const DeviceGuard guard(q.get_device_index());
    launch_together(
        attention_backward<T>, parts_of(a).all, THREADS, BackwardTiles<T>{}.lay_out(nullptr, a.depth), q, a);
  });
}

int64_t attention_memory(int64_t element_size, int64_t depth, bool backward) {
  const auto bytes = [&](auto tiles) { return tiles.lay_out(nullptr, static_cast<int32_t>(depth)); };
  if (element_size == 2) return backward ? bytes(BackwardTiles<uint16_t>{}) : bytes(ForwardTiles<uint16_t>{});
  return backward ? bytes(BackwardTiles<float>{}) : bytes(ForwardTiles<float>{});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cuda, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor visible_offsets, Tensor shown_offsets, Tensor(a!) out, "
      "Tensor(b!) lse, int cells, int heads, bool keep) -> ()");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor visible_offsets, "
      "Tensor shown_offsets, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) hidden_sums, int cells, int heads, "
      "bool keep) -> ()");
  m.def("attention_memory(int element_size, int depth, bool backward) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cuda, CUDA, m) {
  m.impl("attention", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_gradients));
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("attention_memory", TORCH_BOX(&attention_memory));
}

}  // namespace sgmim
