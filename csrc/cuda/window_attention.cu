// Attention of window_attention, forward and backward, one launch each after the one that spreads the bias, with a
// block per head and group of windows. attend_window.h has the device functions, which the tests also run on the host.
#include "attend_window.h"
#include "cuda/gemm.h"
#include "cuda/mma.h"

namespace sgmim {

namespace {

// Blocks per multiprocessor that registers must allow: at most 168 registers per thread, 96 or 128 in the forward.
template <int32_t TILES, int32_t DEPTH, bool BACKWARD>
constexpr int32_t BLOCKS = (BACKWARD ? 12 : DEPTH == 32 ? 20 : 16) / TILES;

constexpr uint32_t SPREAD_THREADS = 256;

__global__ void spread(
    const float* bias, const int64_t* index, int64_t entries, int64_t heads, int32_t tiles, int32_t n, float* out) {
  const int64_t at = int64_t{blockIdx.x} * SPREAD_THREADS + threadIdx.x;
  out[at] = spread_bias(bias, index, entries, heads, tiles, n, at);
}

// Reads every window's rows once, and for each window the bias, from L1 or L2; writes the result once.
template <class T, int32_t TILES, int32_t DEPTH, bool BACKWARD>
__global__ void __launch_bounds__(WARP * TILES, (BLOCKS<TILES, DEPTH, BACKWARD>))
    window_attention(const __grid_constant__ WindowCall<T> a) {
  extern __shared__ __align__(16) char memory[];
  using Head = WindowHead<MmaGroup, T, TILES, DEPTH, BACKWARD>;
  const MmaGroup group;
  Head head(group, a, *reinterpret_cast<typename Head::Memory*>(memory));
  head.walk(blockIdx.x % a.heads, blockIdx.x / a.heads);
  if constexpr (BACKWARD) head.finish(blockIdx.x / a.heads);
}

int64_t tiles_of(int64_t tokens) { return tokens <= 48 ? 3 : tokens <= 64 ? 4 : 9; }

// Calls body(tiles, depth) with constants. Above 64 tokens registers hold no more than 32 channels of a head.
template <class Body>
auto with_shape(int64_t tokens, int64_t depth, const Body& body) {
  SGMIM_CHECK(
      0 < tokens && tokens <= (depth == 32 ? 144 : 64) && (depth == 32 || depth == 64), "windows of ", tokens,
      " tokens and heads of ", depth, " channels; at most 144 with 32 channels, or 64 with 64");
  using std::integral_constant;
  if (tokens > 64) return body(integral_constant<int32_t, 9>{}, integral_constant<int32_t, 32>{});
  const auto with_tiles = [&](auto tiles) {
    return depth == 32 ? body(tiles, integral_constant<int32_t, 32>{}) : body(tiles, integral_constant<int32_t, 64>{});
  };
  return tokens > 48 ? with_tiles(integral_constant<int32_t, 4>{}) : with_tiles(integral_constant<int32_t, 3>{});
}

// Returns the bytes of shared memory of a block.
int64_t memory_of(int64_t tokens, int64_t depth, bool backward) {
  return with_shape(tokens, depth, [&](auto tiles, auto d) -> int64_t {
    return backward ? sizeof(WindowMemory<uint16_t, tiles.value, d.value, true>)
                    : sizeof(WindowMemory<uint16_t, tiles.value, d.value, false>);
  });
}

// Returns the number of blocks that a multiprocessor with `memory` bytes of shared memory holds. Each takes 1 KB more
// than it requests.
int64_t blocks_of(int64_t tokens, int64_t depth, bool backward, int64_t memory) {
  const int64_t most = with_shape(tokens, depth, [&](auto tiles, auto d) -> int64_t {
    return backward ? BLOCKS<tiles.value, d.value, true> : BLOCKS<tiles.value, d.value, false>;
  });
  return std::min(most, memory / (memory_of(tokens, depth, backward) + 1024));
}

// Returns the size of the spread bias of all heads.
int64_t spread_numbers(int64_t tokens, int64_t heads) { return spread_size(heads, tiles_of(tokens)); }

using Maybe = std::optional<Tensor>;

template <class P>
P* maybe_pointer(const Maybe& tensor, const char* name, ScalarType type, const Tensor& other, int64_t count) {
  if (!tensor.has_value()) return nullptr;
  check_packed(*tensor, name, type, other, count);
  return static_cast<P*>(tensor->data_ptr());
}

// Spreads the bias and runs one of the two passes. bias: (entries, heads), or (heads, tokens, tokens) without an index;
// logit_scale: (heads,); both float32. pad: like a row of qkv. The windows are divided into `groups` groups of
// consecutive windows. rest(call): sets the pointers that only this pass uses.
template <bool BACKWARD, class Rest>
void run(
    const Tensor& qkv, const Maybe& bias, const Maybe& index, const Maybe& logit_scale, const Maybe& pad, int64_t heads,
    int64_t window_h, int64_t window_w, int64_t shift_h, int64_t shift_w, int64_t groups, const Tensor& spread_to,
    const Rest& rest) {
  SGMIM_CHECK(qkv.is_cuda() && qkv.dim() == 4 && heads > 0, "qkv must be on a GPU, (B, H, W, 3 * heads * d)");
  const ScalarType type = qkv.scalar_type();
  SGMIM_CHECK(
      type == ScalarType::BFloat16 || type == ScalarType::Half, "qkv must be bfloat16 or float16, got ",
      torch::headeronly::toString(type));
  const int64_t tokens = window_h * window_w, width = qkv.size(3), depth = width / 3 / heads, n2 = tokens * tokens;
  SGMIM_CHECK(width == 3 * heads * depth, "heads ", heads, " must divide the channels, ", width, " / 3");
  SGMIM_CHECK(0 <= shift_h && shift_h < window_h && 0 <= shift_w && shift_w < window_w, "shift is not in the window");
  SGMIM_CHECK(qkv.numel() / width <= INT32_MAX / 2, qkv.numel() / width, " tokens; expected less than 2^30");
  const int64_t entries = bias.has_value() && index.has_value() ? bias->size(0) : 0;
  const int64_t numbers = spread_numbers(tokens, heads);
  check_packed(qkv, "qkv", type, qkv, qkv.numel());
  check_packed(spread_to, "the spread bias", ScalarType::Float, qkv, numbers);
  const int64_t values = index.has_value() ? entries * heads : heads * n2;
  const float* const biases = maybe_pointer<float>(bias, "bias", ScalarType::Float, qkv, values);
  const int64_t* const entry = maybe_pointer<int64_t>(index, "index", ScalarType::Long, qkv, n2);
  const float* const scale = maybe_pointer<float>(logit_scale, "logit_scale", ScalarType::Float, qkv, heads);
  const void* const padding = maybe_pointer<void>(pad, "pad", type, qkv, width);
  with_shape(tokens, depth, [&](auto tiles, auto d) {
    const auto with_type = [&](auto number) {
      using T = decltype(number);
      WindowCall<T> a{};
      a.qkv = pointer<const T>(qkv);
      a.pad = static_cast<const T*>(padding);
      a.bias = pointer<const float>(spread_to);
      a.logit_scale = scale;
      a.height = static_cast<int32_t>(qkv.size(1));
      a.width = static_cast<int32_t>(qkv.size(2));
      a.down = static_cast<int32_t>((qkv.size(1) + window_h - 1) / window_h);
      a.across = static_cast<int32_t>((qkv.size(2) + window_w - 1) / window_w);
      a.window_h = static_cast<int32_t>(window_h);
      a.window_w = static_cast<int32_t>(window_w);
      a.shift_h = static_cast<int32_t>(shift_h);
      a.shift_w = static_cast<int32_t>(shift_w);
      a.heads = static_cast<int32_t>(heads);
      const int64_t windows = qkv.size(0) * a.down * a.across;
      SGMIM_CHECK(windows <= INT32_MAX / 2 && 0 < groups, windows, " windows in ", groups, " groups");
      a.windows = static_cast<int32_t>(windows);
      a.each = static_cast<int32_t>((windows + groups - 1) / groups);
      a.most_inverse = type == ScalarType::Half ? 4096.0f : 1e30f;
      rest(a);
      SGMIM_CHECK(on_sixteen_bytes({a.qkv, a.pad, a.dout, a.out, a.dqkv}), "tensors must begin on 16 bytes");
      if (a.windows == 0) return;
      SGMIM_CHECK((groups - 1) * a.each < a.windows, groups, " groups of ", a.windows, " windows: some are empty");
      const DeviceGuard guard(qkv.get_device_index());
      launch(
          spread, numbers / SPREAD_THREADS, SPREAD_THREADS, 0, qkv, biases, entry, entries, heads,
          static_cast<int32_t>(tiles.value), static_cast<int32_t>(tokens), pointer<float>(spread_to));
      using Memory = WindowMemory<T, tiles.value, d.value, BACKWARD>;
      const auto kernel = window_attention<T, tiles.value, d.value, BACKWARD>;
      launch(kernel, heads * groups, WARP * tiles.value, sizeof(Memory), qkv, a);
    };
    if (type == ScalarType::Half)
      with_type(__half{});
    else
      with_type(__nv_bfloat16{});
  });
}

void run_forward(
    const Tensor& qkv, const Maybe& bias, const Maybe& index, const Maybe& logit_scale, const Maybe& pad, int64_t heads,
    int64_t window_h, int64_t window_w, int64_t shift_h, int64_t shift_w, int64_t groups, const Tensor& spread_to,
    const Tensor& out) {
  check_packed(out, "out", qkv.scalar_type(), qkv, qkv.numel() / 3);
  run<false>(
      qkv, bias, index, logit_scale, pad, heads, window_h, window_w, shift_h, shift_w, groups, spread_to,
      [&](auto& a) { a.out = static_cast<decltype(a.out)>(out.data_ptr()); });
}

// dbias (groups, heads, tokens, tokens), dscale (groups, heads) and dpad (groups, 3 * channels), float32: partial sums
// per group.
void run_backward(
    const Tensor& dout, const Tensor& qkv, const Maybe& bias, const Maybe& index, const Maybe& logit_scale,
    const Maybe& pad, int64_t heads, int64_t window_h, int64_t window_w, int64_t shift_h, int64_t shift_w,
    int64_t groups, const Tensor& spread_to, const Tensor& dqkv, const Maybe& dbias, const Maybe& dscale,
    const Maybe& dpad) {
  check_packed(dout, "dout", qkv.scalar_type(), qkv, qkv.numel() / 3);
  check_packed(dqkv, "dqkv", qkv.scalar_type(), qkv, qkv.numel());
  SGMIM_CHECK(logit_scale.has_value() || !dscale.has_value(), "dscale is wanted of no logit_scale");
  const int64_t tokens = window_h * window_w;
  run<true>(
      qkv, bias, index, logit_scale, pad, heads, window_h, window_w, shift_h, shift_w, groups, spread_to, [&](auto& a) {
        a.dout = static_cast<decltype(a.dout)>(dout.data_ptr());
        a.dqkv = static_cast<decltype(a.dqkv)>(dqkv.data_ptr());
        a.dbias = maybe_pointer<float>(dbias, "dbias", ScalarType::Float, qkv, groups * heads * tokens * tokens);
        a.dscale = maybe_pointer<float>(dscale, "dscale", ScalarType::Float, qkv, groups * heads);
        a.dpad = maybe_pointer<float>(dpad, "dpad", ScalarType::Float, qkv, groups * qkv.size(3));
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cuda, m) {
  m.def(
      "window_attention(Tensor qkv, Tensor? bias, Tensor? index, Tensor? logit_scale, Tensor? pad, int heads, "
      "int window_h, int window_w, int shift_h, int shift_w, int groups, Tensor(a!) spread, Tensor(b!) out) -> ()");
  m.def(
      "window_attention_backward(Tensor dout, Tensor qkv, Tensor? bias, Tensor? index, Tensor? logit_scale, "
      "Tensor? pad, int heads, int window_h, int window_w, int shift_h, int shift_w, int groups, Tensor(a!) spread, "
      "Tensor(b!) dqkv, Tensor(c!)? dbias, Tensor(d!)? dscale, Tensor(e!)? dpad) -> ()");
  m.def("window_attention_memory(int tokens, int depth, bool backward) -> int");
  m.def("window_attention_blocks(int tokens, int depth, bool backward, int memory) -> int");
  m.def("window_attention_spread(int tokens, int heads) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cuda, CUDA, m) {
  m.impl("window_attention", TORCH_BOX(&run_forward));
  m.impl("window_attention_backward", TORCH_BOX(&run_backward));
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("window_attention_memory", TORCH_BOX(&memory_of));
  m.impl("window_attention_blocks", TORCH_BOX(&blocks_of));
  m.impl("window_attention_spread", TORCH_BOX(&spread_numbers));
}

}  // namespace sgmim
