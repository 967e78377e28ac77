// A head's product whose epilogue compares with pixels read in place and keeps only the signs, packed to bits; the sum
// of the tiles' distances, in a second launch and a fixed order; and the gradients, whose products unpack the signs as
// they load them. l1_tile.h holds the bodies; the tests run them on the host.
#include "cuda/launch.h"
#include "cuda/products.h"
#include "l1_tile.h"

namespace sgmim {

namespace {

constexpr uint32_t THREADS = 128;

// Registers: 76 to 178. Shared memory: 52,224 bytes in half precision, 84,992 in float32, and 256.
// Reads x once per 64 outputs and the weight once per 64 rows (of the second-level cache, mostly), every pixel once;
// writes a quarter of a byte per pixel and 8 bytes per tile.
template <class T>
__global__ void __launch_bounds__(THREADS, 2) distances(Head<T> head, double* partials, int32_t tiles_across) {
  extern __shared__ __align__(32) char memory[];
  __shared__ double scratch[WARP];
  const int64_t first_row = int64_t{blockIdx.x / tiles_across} * TILE;
  const int32_t first_out = static_cast<int32_t>(blockIdx.x % tiles_across) * TILE;
  const double sum = l1_tile(ProductGroup{{scratch}}, head, first_row, first_out, memory);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Registers: 26 at most. Shared memory: 256 bytes. Reads 8 bytes per tile.
__global__ void __launch_bounds__(1024) add_partials(const double* partials, int64_t count, double scale, float* result) {
  __shared__ double scratch[WARP];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
  sum = BlockGroup{scratch}.sum(sum);
  if (threadIdx.x == 0) *result = static_cast<float>(sum * scale);
}

// Tiles of dx and of dweight, none of one that nobody wants, and how many lie side by side.
struct Tilings {
  int64_t dx, dweight;
  int32_t across;
};

// Registers: 64 to 168. Shared memory: 54,528 bytes in half precision, 87,296 in float32.
// Reads the weight once per 64 rows and x once per 64 outputs (of the second-level cache, mostly), the signs once per
// 64 columns of either; writes dx, dweight and dbias.
template <class T>
__global__ void __launch_bounds__(THREADS, 2) head_gradients(Head<T> head, HeadGradients<T> to, Tilings tilings) {
  extern __shared__ __align__(32) char memory[];
  const int64_t tile = blockIdx.x < tilings.dx ? blockIdx.x : blockIdx.x - tilings.dx;
  const int64_t first = tile / tilings.across * TILE;
  const int32_t first_column = static_cast<int32_t>(tile % tilings.across) * TILE;
  if (blockIdx.x < tilings.dx)
    l1_input_gradient(ProductGroup{}, head, to, first, first_column, memory);
  else
    l1_weight_gradient(ProductGroup{}, head, to, static_cast<int32_t>(first), first_column, memory);
}

int64_t tiles_of(int64_t rows, int64_t columns) { return (rows + TILE - 1) / TILE * ((columns + TILE - 1) / TILE); }

// What forward and backward have in common: x (count, width) if packed, else (cells, width); weight (outs, width) of
// the same dtype; rows (count,); signs (count, 2, words) int32.
template <class T>
Head<T> describe(
    const Tensor& x, const Tensor& weight, const Tensor& rows, const Tensor& signs, bool packed, int64_t cells) {
  const int64_t count = rows.numel(), outs = weight.size(0), width = x.size(1);
  SGMIM_CHECK(
      width <= INT32_MAX - DEPTH && outs <= INT32_MAX - DEPTH, "a head of ", width, " x ", outs, " is too large");
  check_packed(x, "x", x.scalar_type(), x, (packed ? count : cells) * width);
  check_packed(weight, "weight", x.scalar_type(), x, outs * width);
  check_packed(rows, "rows", ScalarType::Long, x, count);
  check_packed(signs, "signs", ScalarType::Int, x, count * 2 * words_of(outs));
  Head<T> head{};
  head.x = pointer<const T>(x);
  head.weight = pointer<const T>(weight);
  head.cells = pointer<const int64_t>(rows);
  head.all_cells = cells;
  head.signs = pointer<uint32_t>(signs);
  head.count = count;
  head.width = static_cast<int32_t>(width);
  head.outs = static_cast<int32_t>(outs);
  head.packed = packed;
  head.wide = width % 8 == 0 && on_sixteen_bytes({head.x, head.weight});
  return head;
}

// bias (outs,) and target (B, S, H, W) float32; valid like the target; partials float64, one per tile of 64 x 64;
// sum () float32, times `scale`.
void linear_l1(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& target, const std::optional<Tensor>& valid,
    const Tensor& rows, int64_t cell, bool packed, double scale, const Tensor& signs, const Tensor& partials, const Tensor& sum) {
  const int64_t count = rows.numel();
  SGMIM_CHECK(
      target.is_cuda() && target.get_device_index() == x.get_device_index() && target.dim() == 4 &&
          target.scalar_type() == ScalarType::Float,
      "target must be float32, (B, S, H, W), on the GPU of x");
  SGMIM_CHECK(
      0 < cell && cell <= INT16_MAX && target.size(2) % cell == 0 && target.size(3) % cell == 0,
      "height and width must be multiples of cell ", cell);
  const int64_t outs = target.size(1) * cell * cell, cells = target.size(0) * (target.size(2) / cell) * (target.size(3) / cell);
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    SGMIM_CHECK(weight.size(0) == outs, "weight must have ", outs, " rows, got ", weight.size(0));
    Head<T> head = describe<T>(x, weight, rows, signs, packed, cells);
    check_packed(bias, "bias", ScalarType::Float, x, outs);
    check_packed(partials, "partials", ScalarType::Double, x, tiles_of(count, outs));
    check_packed(sum, "sum", ScalarType::Float, x, 1);
    head.bias = pointer<const float>(bias);
    head.target.values = pointer<const float>(target);
    head.target.across = target.size(3) / cell;
    head.target.per_image = target.size(2) / cell * head.target.across;
    head.target.cell = static_cast<int32_t>(cell);
    for (int64_t i = 0; i < 4; ++i) head.target.strides[i] = target.stride(i);
    if (valid.has_value()) {
      SGMIM_CHECK(
          valid->is_cuda() && valid->get_device_index() == x.get_device_index() && valid->numel() == target.numel() &&
              valid->scalar_type() == ScalarType::Bool,
          "valid must be bool, of the target's shape, on the GPU of x");
      head.target.valid = pointer<const bool>(*valid);
      for (int64_t i = 0; i < 4; ++i) head.target.valid_strides[i] = valid->stride(i);
    }
    const DeviceGuard guard(x.get_device_index());
    const int32_t across = static_cast<int32_t>((outs + TILE - 1) / TILE);
    if (count > 0)
      launch(
          distances<T>, tiles_of(count, outs), THREADS, l1_memory<T>(), x, head, pointer<double>(partials), across);
    launch(add_partials, 1, 1024, 0, x, pointer<const double>(partials), tiles_of(count, outs), scale, pointer<float>(sum));
  });
}

// A gradient (rows, columns) in float32 or in the products' dtype, or empty if nobody wants it.
template <class T>
Gradient<T> gradient(const Tensor& tensor, const char* name, const Tensor& x, int64_t values) {
  const bool single = tensor.scalar_type() == ScalarType::Float;
  check_packed(tensor, name, single ? ScalarType::Float : x.scalar_type(), x, tensor.numel() > 0 ? values : 0);
  return {tensor.data_ptr(), single};
}

// grad () float32; dx like x, or zeros beforehand where x is not packed; dweight like weight, with dbias (outs,)
// float32.
void linear_l1_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& signs, const Tensor& rows, bool packed,
    double scale, const Tensor& dx, const Tensor& dweight, const Tensor& dbias) {
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const int64_t count = rows.numel(), outs = weight.size(0), width = x.size(1);
    const Head<T> head = describe<T>(x, weight, rows, signs, packed, x.size(0));
    check_packed(grad, "grad", ScalarType::Float, x, 1);
    check_packed(dbias, "dbias", ScalarType::Float, x, dweight.numel() > 0 ? outs : 0);
    const HeadGradients<T> to{
        gradient<T>(dx, "dx", x, x.numel()), gradient<T>(dweight, "dweight", x, weight.numel()), pointer<float>(dbias),
        pointer<const float>(grad), static_cast<float>(scale)};
    const Tilings tilings{
        dx.numel() > 0 ? tiles_of(count, width) : 0, dweight.numel() > 0 ? tiles_of(outs, width) : 0,
        static_cast<int32_t>((width + TILE - 1) / TILE)};
    if (tilings.dx + tilings.dweight == 0) return;
    const DeviceGuard guard(x.get_device_index());
    launch(
        head_gradients<T>, tilings.dx + tilings.dweight, THREADS, l1_backward_memory<T>(), x, head, to, tilings);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cuda, m) {
  m.def(
      "linear_l1(Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor? valid, Tensor rows, int cell, bool packed, "
      "float scale, Tensor(a!) signs, Tensor(b!) partials, Tensor(c!) sum) -> ()");
  m.def(
      "linear_l1_backward(Tensor grad, Tensor x, Tensor weight, Tensor signs, Tensor rows, bool packed, float scale, "
      "Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cuda, CUDA, m) {
  m.impl("linear_l1", TORCH_BOX(&linear_l1));
  m.impl("linear_l1_backward", TORCH_BOX(&linear_l1_backward));
}

}  // namespace sgmim
