// Attention inside the windows of a token grid on tensor cores, forward and backward. Device functions of
// csrc/cuda/window_attention.cu. A group of TILES warps iterates over windows of one head, of up to 16 * TILES tokens.
// Each warp computes 16 queries (and, in the backward, 16 keys). Shift, padding and partition are index arithmetic on
// the rows of qkv. The rows of the next window are copied asynchronously while one window is computed.
//
// Logits stay in registers; four adjacent lanes share a row. The forward holds CHUNK tiles of keys at a time, the
// backward all of them. The backward recomputes the softmax: from a saved logsumexp it would be less accurate where
// logits are large. For the gradients of keys and values the warps exchange probabilities and logit gradients, rounded
// once to T, through shared memory, which also holds the gradient of the bias, summed over the windows of the group.
//
// Beside rank() and sync() of csrc/group.h, which are those of the block, the group must have, for each of its warps,
//   sync_warp()                       barrier of the warp
//   shuffle_xor(value, mask)          the `value` of the lane whose index is this lane's xor `mask`
//   ldmatrix<transposed>(f, row)      ldmatrix.x4: four 8 x 8 matrices of 16-bit elements; lane i passes row i % 8 of
//                                     matrix i / 8, aligned to 16 bytes. f[m] of lane 4 g + t: row g, columns 2 t
//                                     and 2 t + 1 of matrix m, or, transposed, rows 2 t and 2 t + 1 of column g
//   mma<T>(c, a, b0, b1)              m16n8k16: c (16, 8) += a (16, 16) . b (16, 8), fragments as in the PTX ISA
//   pack<T>(x, y)                     two numbers rounded to T, x in the lower half
//   exp2(x), reciprocal(x)            2^x and 1 / x, to the last place or two
//   anew(x)                           returns x, opaque to the compiler: nothing that it derives from x is kept in
//                                     registers from one window to the next
//   copy_async(to, from, there)       starts to copy 16 bytes into the group's memory; zeros if not `there`
//   wait_copies()                     waits for this thread's copies
#pragma once

#include <cmath>

#include "group.h"

namespace sgmim {

constexpr float LOG2_E = 1.4426950408889634f;
// Constants of sgmim_fast/ops/window_attention.py.
constexpr float APART = -100.0f, MAX_LOGIT_SCALE = 4.605170185988092f, TINY = 1e-12f;

// Arguments of both passes. qkv, dqkv: (images, height, width, 3 * heads * depth). out, dout: (images, height, width,
// heads * depth). pad: (3 * heads * depth,). Pointers that a pass does not use, and gradients not requested, are null.
template <class T>
struct WindowCall {
  const T *qkv, *pad, *dout;
  const float* bias;         // in the layout of spread_bias()
  const float* logit_scale;  // (heads,), or null: dot products instead of cosines
  T *out, *dqkv;
  float *dbias, *dscale, *dpad;  // (groups, heads, tokens, tokens), (groups, heads), (groups, 3 * heads * depth)
  int32_t height, width, down, across;  // tokens, and windows, along the grid's sides
  int32_t window_h, window_w, shift_h, shift_w, heads;
  int32_t windows, each;  // number of windows of all images, and of a group
  float most_inverse;     // largest 1 / norm that the backward applies in T; vectors of smaller norm count as 0

  SGMIM_HOST_DEVICE int32_t tokens() const { return window_h * window_w; }
};

// Size of the bias in fragment layout: (heads, warps, tiles of 8 keys, lanes, 4).
SGMIM_HOST_DEVICE int64_t spread_size(int64_t heads, int64_t tiles) { return heads * tiles * tiles * 256; }

// Returns element `at` of the bias in fragment layout: in base 2, and -infinity beyond the window's keys. index: null
// if the bias is (heads, n, n).
SGMIM_HOST_DEVICE float spread_bias(
    const float* bias, const int64_t* index, int64_t entries, int64_t heads, int32_t tiles, int32_t n, int64_t at) {
  const int64_t c = at % 4, lane = at / 4 % 32, tile = at / 128 % (2 * tiles), warp = at / 128 / (2 * tiles) % tiles;
  const int64_t head = at / spread_size(1, tiles);
  const int64_t i = 16 * warp + lane / 4 + c / 2 * 8, j = 8 * tile + lane % 4 * 2 + c % 2;
  if (j >= n) return -INFINITY;
  if (bias == nullptr || i >= n) return 0;
  if (index == nullptr) return bias[(head * n + i) * n + j] * LOG2_E;
  int64_t entry = index[i * n + j];  // not checked on a GPU, so clamped: nothing outside of the bias is read
  entry = entry < 0 ? 0 : entry < entries ? entry : entries - 1;
  return bias[entry * heads + head] * LOG2_E;
}

enum Matrix { Q, K, V, GRAD };

// Shared memory of a block. Rows are padded by 16 bytes, so that eight of them are in different banks.
template <class T, int32_t TILES, int32_t DEPTH, bool BACKWARD>
struct alignas(16) WindowMemory {
  static constexpr int32_t TOKENS = 16 * TILES;
  T matrices[2][BACKWARD ? 4 : 3][TOKENS][DEPTH + 8];  // double buffer: the current window and the next one
  T exchange[BACKWARD ? TOKENS : 1][TOKENS + 8];       // (queries, keys): probabilities, then the logits' gradient
  float dbias[BACKWARD ? 2 * TILES : 1][TILES][128];   // in fragments: (tiles of 8 keys, warps, lanes x 4)
  int32_t rows[2][TOKENS];                             // rows of qkv, -1 for padding tokens
  int32_t sides[2][TOKENS];                            // groups of tokens that the cyclic shift has brought together
  float inverses[2][TOKENS];                           // 1 / norm of queries and keys
  float sums[BACKWARD ? TILES : 1][2 * DEPTH + 1];     // per warp: gradients of the padding's k and v, and of the scale
  float scale;                                         // of the dot products or cosines
  int32_t head, last;                                  // last: end of the group's windows
};

template <class Group, class T, int32_t TILES, int32_t DEPTH, bool BACKWARD>
class WindowHead {
 public:
  using Memory = WindowMemory<T, TILES, DEPTH, BACKWARD>;

  SGMIM_HOST_DEVICE WindowHead(const Group& group, const WindowCall<T>& a, Memory& memory)
      : group_(group), a_(a), m_(memory) {}

  // Computes the windows of group `number` for one head.
  SGMIM_HOST_DEVICE void walk(int32_t head, int32_t number) {
    rank_ = group_.rank();
    const int32_t first = number * a_.each;
    if (rank_ == 0) {
      m_.head = head;
      m_.last = a_.windows - first < a_.each ? a_.windows : first + a_.each;
      m_.scale = a_.logit_scale == nullptr ? 1 / sqrtf(static_cast<float>(DEPTH))
                                           : expf(fminf(a_.logit_scale[head], MAX_LOGIT_SCALE));
    }
    for (int32_t i = rank_; i < 2 * TOKENS; i += THREADS) m_.inverses[i / TOKENS][i % TOKENS] = 1;
    if constexpr (BACKWARD) {
      float* const sums = &m_.sums[0][0];
      for (int32_t i = rank_; i < TILES * (2 * DEPTH + 1); i += THREADS) sums[i] = 0;
      float* const dbias = &m_.dbias[0][0][0];
      for (int32_t i = rank_; i < 2 * TILES * TILES * 128; i += THREADS) dbias[i] = 0;
    }
    group_.sync();
    recompute_indices();
    b_ = -1;  // the first iteration only fetches
    for (int32_t window = first - 1; window < m_.last; ++window) {
      group_.wait_copies();
      group_.sync();
      recompute_indices();
      const int32_t next = b_ == 0;
      if (window + 1 < m_.last) fetch(window + 1, next);
      if (b_ >= 0) attend(window);
      b_ = next;
    }
  }

  // Writes the gradients that were summed over the windows of the group.
  SGMIM_HOST_DEVICE void finish(int32_t number) {
    group_.sync();
    recompute_indices();
    const int64_t channels = int64_t{a_.heads} * DEPTH;
    for (int32_t i = rank_; i <= 2 * DEPTH; i += THREADS) {
      float total = 0;
      for (int32_t warp = 0; warp < TILES; ++warp) total += m_.sums[warp][i];
      if (i < 2 * DEPTH && a_.dpad != nullptr) {
        float* const to = a_.dpad + 3 * number * channels + int64_t{head_} * DEPTH + i % DEPTH;
        to[(1 + i / DEPTH) * channels] = total;
        if (i < DEPTH) to[0] = 0;  // the results of padding queries are discarded, so these have no gradient
      } else if (i == 2 * DEPTH && a_.dscale != nullptr) {
        a_.dscale[int64_t{number} * a_.heads + head_] = a_.logit_scale[head_] <= MAX_LOGIT_SCALE ? total : 0.0f;
      }
    }
    if (a_.dbias == nullptr) return;
    const int32_t n = a_.tokens();
    float* const to = a_.dbias + (int64_t{number} * a_.heads + head_) * n * n;
    for (int32_t j = 0; j < 2 * TILES; ++j)
      for (int32_t c = 0; c < 4; ++c) {
        const int32_t row = 16 * warp_ + g_ + c / 2 * 8, column = 8 * j + 2 * t_ + c % 2;
        if (row < n && column < n) to[row * n + column] = dbias(j)[c];
      }
  }

 private:
  static constexpr int32_t TOKENS = Memory::TOKENS, THREADS = 32 * TILES, PARTS = DEPTH / 8;
  static constexpr int32_t CHUNK = BACKWARD ? TILES : TILES % 3 == 0 ? 3 : 4;  // tiles of 16 keys at a time
  using Rows = T[TOKENS][DEPTH + 8];
  using Result = float[DEPTH / 8][4];   // accumulator fragments of 16 rows
  using Own = uint32_t[DEPTH / 16][4];  // 16 rows as fragments of the left operand
  using Logits = float[2 * CHUNK][4];   // accumulator fragments of 16 queries' logits

  struct Corner {
    int32_t image, top, left;  // image: the first row of its tokens
  };

  SGMIM_HOST_DEVICE Corner corner(int32_t window) const {
    const int32_t across = group_.anew(a_.across), all = a_.down * across, of_image = window % all;
    return {
        window / all * a_.height * a_.width, of_image / across * a_.window_h, of_image % across * a_.window_w};
  }

  // Recomputes everything derived from the thread's index, so that it does not occupy registers beside the logits.
  SGMIM_HOST_DEVICE void recompute_indices() {
    rank_ = group_.anew(group_.rank());
    lane_ = rank_ & 31;  // instead of %, since the compiler does not know that rank_ is not negative
    warp_ = rank_ >> 5;
    g_ = lane_ >> 2;
    t_ = lane_ & 3;
    head_ = m_.head;
  }

  SGMIM_HOST_DEVICE void attend(int32_t window) {
    const Corner at = corner(window);
    const int32_t below = at.top + a_.window_h, right = at.left + a_.window_w;
    has_mask_ = below > a_.down * a_.window_h - a_.shift_h || right > a_.across * a_.window_w - a_.shift_w;
    has_padding_ = below > a_.height || right > a_.width;
    if (a_.logit_scale != nullptr) {
      compute_inverse_norms();
      group_.sync();
    }
    if constexpr (BACKWARD)
      backward();
    else
      forward();
  }

  // Starts to load a window's rows. Padding tokens have zero queries and gradients, and the keys and values of `pad`.
  // Rows beyond the window are zero.
  SGMIM_HOST_DEVICE void fetch(int32_t window, int32_t b) {
    const Corner at = corner(window);
    const int64_t channels = int64_t{a_.heads} * DEPTH;
    const int32_t window_w = group_.anew(a_.window_w), height = group_.anew(a_.height), width = group_.anew(a_.width);
    SGMIM_UNROLL_BY(1)
    for (int32_t i = rank_; i < TOKENS * PARTS; i += THREADS) {
      const int32_t token = i / PARTS, column = i % PARTS * 8;
      const int32_t y = at.top + token / window_w, x = at.left + token % window_w;
      const bool inside = token < a_.tokens(), exists = inside && y < height && x < width;
      const int32_t turned_y = (y + a_.shift_h) % height, turned_x = (x + a_.shift_w) % width;
      const int32_t row = exists ? at.image + turned_y * width + turned_x : -1;
      const int64_t start = int64_t{head_} * DEPTH + column;
      const bool padded = inside && !exists && a_.pad != nullptr;
      const T* const from = (padded ? a_.pad : a_.qkv + 3 * channels * (exists ? row : 0)) + start;
      group_.copy_async(&m_.matrices[b][Q][token][column], from, exists);
      group_.copy_async(&m_.matrices[b][K][token][column], from + channels, exists || padded);
      group_.copy_async(&m_.matrices[b][V][token][column], from + 2 * channels, exists || padded);
      if constexpr (BACKWARD) {
        const T* const grad = a_.dout + channels * (exists ? row : 0) + start;
        group_.copy_async(&m_.matrices[b][GRAD][token][column], grad, exists);
      }
      if (column == 0) {
        m_.rows[b][token] = row;
        const bool below = y >= a_.down * a_.window_h - a_.shift_h, right = x >= a_.across * a_.window_w - a_.shift_w;
        m_.sides[b][token] = 2 * below + right;
      }
    }
  }

  SGMIM_HOST_DEVICE Rows& rows(int32_t matrix) const { return m_.matrices[b_][matrix]; }

  // Computes the inverse norms of queries and keys, a row per thread.
  SGMIM_HOST_DEVICE void compute_inverse_norms() {
    for (int32_t i = rank_; i < 2 * TOKENS; i += THREADS) {
      const T* const row = rows(i / TOKENS)[i % TOKENS];
      float total = 0;
      SGMIM_UNROLL
      for (int32_t d = 0; d < DEPTH; d += 8) {
        const Few<T, 8> few = Few<T, 8>::load(row + d);
        SGMIM_UNROLL
        for (int32_t c = 0; c < 8; ++c) total += static_cast<float>(few.values[c]) * static_cast<float>(few.values[c]);
      }
      m_.inverses[i / TOKENS][i % TOKENS] = 1 / fmaxf(sqrtf(total), TINY);
    }
  }

  // Address of the row that this lane passes to ldmatrix() for a 16 x 16 block: the four 8 x 8 matrices in column-major
  // order (down_first) or in row-major order (across_first).
  SGMIM_HOST_DEVICE const T* down_first(const T* corner, int32_t stride) const {
    return corner + (lane_ & 15) * stride + (lane_ >> 4) * 8;
  }
  SGMIM_HOST_DEVICE const T* across_first(const T* corner, int32_t stride) const {
    return corner + ((lane_ >> 4) * 8 + (lane_ & 7)) * stride + (lane_ >> 3 & 1) * 8;
  }

  // Loads this warp's rows of `left` as fragments.
  SGMIM_HOST_DEVICE void load_own(Own& f, int32_t left) const {
    SGMIM_UNROLL
    for (int32_t k = 0; k < DEPTH / 16; ++k)
      group_.template ldmatrix<false>(f[k], down_first(&rows(left)[16 * warp_][16 * k], DEPTH + 8));
  }

  // s (16, 16) = the rows in `left` . (rows [16 j, 16 j + 16) of `right`)^T.
  SGMIM_HOST_DEVICE void product(float (&s)[2][4], const Own& left, int32_t right, int32_t j) const {
    SGMIM_UNROLL
    for (int32_t c = 0; c < 8; ++c) s[c / 4][c % 4] = 0;
    SGMIM_UNROLL
    for (int32_t k = 0; k < DEPTH / 16; ++k) {
      uint32_t f[4];
      group_.template ldmatrix<false>(f, across_first(&rows(right)[16 * j][16 * k], DEPTH + 8));
      group_.template mma<T>(s[0], left[k], f[0], f[1]);
      group_.template mma<T>(s[1], left[k], f[2], f[3]);
    }
  }

  // x += left (16, 16) . rows [16 j, 16 j + 16) of `right`.
  SGMIM_HOST_DEVICE void accumulate(Result& x, const uint32_t (&left)[4], int32_t right, int32_t j) const {
    SGMIM_UNROLL
    for (int32_t e = 0; e < DEPTH / 16; ++e) {
      uint32_t f[4];
      group_.template ldmatrix<true>(f, down_first(&rows(right)[16 * j][16 * e], DEPTH + 8));
      group_.template mma<T>(x[2 * e], left, f[0], f[1]);
      group_.template mma<T>(x[2 * e + 1], left, f[2], f[3]);
    }
  }

  // Computes the logits of this warp's queries and the keys from tile `first` on, in base 2.
  SGMIM_HOST_DEVICE void logits(int32_t first, Logits& s) const {
    Own q;
    load_own(q, Q);
    const float scale = m_.scale * LOG2_E;
    const float factors[2] = {m_.inverses[Q][16 * warp_ + g_] * scale, m_.inverses[Q][16 * warp_ + g_ + 8] * scale};
    const int32_t* const sides = m_.sides[b_];
    const int32_t own[2] = {sides[16 * warp_ + g_], sides[16 * warp_ + g_ + 8]};
    const float* bias = a_.bias + ((int64_t{head_ * TILES + warp_} * TILES + first) * 64 + lane_) * 4;
    const float* const inverses = m_.inverses[K] + 16 * first + 2 * t_;
    SGMIM_UNROLL
    for (int32_t j = 0; j < CHUNK; ++j) {
      float qk[2][4];
      product(qk, q, K, first + j);
      SGMIM_UNROLL
      for (int32_t h = 0; h < 2; ++h) {
        const Few<float, 4> biases = Few<float, 4>::load(bias + (2 * j + h) * 128);
        SGMIM_UNROLL
        for (int32_t c = 0; c < 4; ++c)
          s[2 * j + h][c] = qk[h][c] * (factors[c / 2] * inverses[16 * j + 8 * h + c % 2]) + biases.values[c];
      }
    }
    if (!has_mask_) return;
    SGMIM_UNROLL
    for (int32_t j = 0; j < 2 * CHUNK; ++j)
      SGMIM_UNROLL
      for (int32_t c = 0; c < 4; ++c)
        if (own[c / 2] != sides[16 * first + 8 * j + 2 * t_ + c % 2]) s[j][c] += APART * LOG2_E;
  }

  // Sums x over the four lanes that share a row.
  SGMIM_HOST_DEVICE float sum_of_row(float x) const {
    x += group_.shuffle_xor(x, 1);
    return x + group_.shuffle_xor(x, 2);
  }

  // Step of the online softmax: updates row_max, replaces s by 2^(s - row_max), and updates this lane's part of
  // row_sum. rescale: the factors by which the caller has to multiply earlier results.
  SGMIM_HOST_DEVICE void exponentials(Logits& s, float (&row_max)[2], float (&row_sum)[2], float (&rescale)[2]) const {
    SGMIM_UNROLL
    for (int32_t r = 0; r < 2; ++r) {
      float max = row_max[r];
      SGMIM_UNROLL
      for (int32_t j = 0; j < 2 * CHUNK; ++j) max = fmaxf(max, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      max = fmaxf(max, group_.shuffle_xor(max, 1));
      max = fmaxf(max, group_.shuffle_xor(max, 2));
      rescale[r] = group_.exp2(row_max[r] - max);
      row_max[r] = max;
      row_sum[r] *= rescale[r];
      SGMIM_UNROLL
      for (int32_t i = 0; i < 4 * CHUNK; ++i) {
        float& x = s[i / 2][2 * r + i % 2];
        row_sum[r] += x = group_.exp2(x - max);
      }
    }
  }

  // Converts columns [16 j, 16 j + 16) of s to a fragment of the left operand.
  SGMIM_HOST_DEVICE void as_left(uint32_t (&f)[4], const Logits& s, int32_t j) const {
    SGMIM_UNROLL
    for (int32_t i = 0; i < 4; ++i)
      f[i] = group_.template pack<T>(s[2 * j + i / 2][i % 2 * 2], s[2 * j + i / 2][i % 2 * 2 + 1]);
  }

  SGMIM_HOST_DEVICE void forward() {
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {}, scale[2];
    Result x = {};
    SGMIM_UNROLL_BY(1)
    for (int32_t first = 0; first < TILES; first += CHUNK) {  // every window has a key in the first chunk
      recompute_indices();
      Logits s;
      logits(first, s);
      exponentials(s, row_max, row_sum, scale);
      multiply(x, scale);
      SGMIM_UNROLL
      for (int32_t j = 0; j < CHUNK; ++j) {
        uint32_t p[4];
        as_left(p, s, j);
        accumulate(x, p, V, first + j);
      }
    }
    recompute_indices();
    for (int32_t r = 0; r < 2; ++r) scale[r] = group_.reciprocal(sum_of_row(row_sum[r]));
    multiply(x, scale);
    store(x, Q, a_.out, int64_t{a_.heads} * DEPTH, 0);
  }

  SGMIM_HOST_DEVICE void multiply(Result& x, const float (&scale)[2]) const {
    SGMIM_UNROLL
    for (int32_t i = 0; i < DEPTH / 2; ++i) x[i / 4][i % 4] *= scale[i % 4 / 2];
  }

  // Stores x to the columns from `first` on of the matrix `to`, in the rows of this warp's tokens. It goes through this
  // warp's rows of a matrix in shared memory that is no longer read, so that whole sectors are written.
  SGMIM_HOST_DEVICE void store(const Result& x, int32_t through, T* to, int64_t width, int64_t first) const {
    Rows& own = rows(through);
    group_.sync_warp();
    SGMIM_UNROLL
    for (int32_t e = 0; e < DEPTH / 8; ++e)
      SGMIM_UNROLL
      for (int32_t r = 0; r < 2; ++r) {
        const uint32_t pair = group_.template pack<T>(x[e][2 * r], x[e][2 * r + 1]);
        memcpy(&own[16 * warp_ + g_ + 8 * r][8 * e + 2 * t_], &pair, sizeof pair);
      }
    group_.sync_warp();
    SGMIM_UNROLL
    for (int32_t i = lane_; i < 16 * PARTS; i += 32) {
      const int32_t token = 16 * warp_ + i / PARTS, column = i % PARTS * 8, row = m_.rows[b_][token];
      T* const place = to + row * width + first + int64_t{head_} * DEPTH + column;
      if (row >= 0) Few<T, 8>::load(&own[token][column]).store(place);
    }
  }

  // Writes s, multiplied by a factor per row, to this warp's rows of the exchange buffer.
  SGMIM_HOST_DEVICE void write_exchange(const Logits& s, const float (&scale)[2]) const {
    SGMIM_UNROLL
    for (int32_t j = 0; j < 2 * TILES; ++j)
      SGMIM_UNROLL
      for (int32_t r = 0; r < 2; ++r) {
        const uint32_t pair = group_.template pack<T>(s[j][2 * r] * scale[r], s[j][2 * r + 1] * scale[r]);
        memcpy(&m_.exchange[16 * warp_ + g_ + 8 * r][8 * j + 2 * t_], &pair, sizeof pair);
      }
  }

  // x += (this warp's columns of the exchange buffer)^T . the rows of the matrix `right`.
  SGMIM_HOST_DEVICE void accumulate_exchange(Result& x, int32_t right) const {
    SGMIM_UNROLL
    for (int32_t j = 0; j < TILES; ++j) {
      uint32_t left[4];
      group_.template ldmatrix<true>(left, across_first(&m_.exchange[16 * j][16 * warp_], TOKENS + 8));
      accumulate(x, left, right, j);
    }
  }

  // Backward of x / |x| for this warp's rows: replaces the gradient of the result by that of x, and adds the gradient
  // of the logarithm of the scale to dscale.
  SGMIM_HOST_DEVICE void unit_backward(Result& dx, int32_t matrix, float* dscale) const {
    float total = 0;
    SGMIM_UNROLL
    for (int32_t r = 0; r < 2; ++r) {
      const int32_t token = 16 * warp_ + g_ + 8 * r;
      const T* const row = rows(matrix)[token] + 2 * t_;
      const float inverse = m_.inverses[matrix][token];
      float along = 0;
      SGMIM_UNROLL
      for (int32_t i = 0; i < DEPTH / 4; ++i)
        along += dx[i / 2][2 * r + i % 2] * static_cast<float>(row[i / 2 * 8 + i % 2]) * inverse;
      const float whole = sum_of_row(along), back = inverse < 1 / TINY ? whole : 0.0f;
      total += whole;
      SGMIM_UNROLL
      for (int32_t i = 0; i < DEPTH / 4; ++i) {
        float& to = dx[i / 2][2 * r + i % 2];
        to = (to - static_cast<float>(row[i / 2 * 8 + i % 2]) * inverse * back) * inverse;
      }
    }
    if (dscale == nullptr) return;
    for (int32_t mask = 4; mask < 32; mask *= 2) total += group_.shuffle_xor(total, mask);
    if (lane_ == 0) *dscale += total;
  }

  SGMIM_HOST_DEVICE float unit_factor(int32_t matrix, int32_t token) const {
    const float inverse = m_.inverses[matrix][token];
    return inverse <= a_.most_inverse ? inverse : 0.0f;
  }

  // Adds the gradients of padding tokens to this warp's sums.
  SGMIM_HOST_DEVICE void add_padding(const Result& x, float* sums) const {
    if (!has_padding_ || a_.dpad == nullptr) return;
    bool outside[2];
    for (int32_t r = 0; r < 2; ++r) {
      const int32_t token = 16 * warp_ + g_ + 8 * r;
      outside[r] = token < a_.tokens() && m_.rows[b_][token] < 0;
    }
    SGMIM_UNROLL
    for (int32_t i = 0; i < DEPTH / 4; ++i) {
      float total = (outside[0] ? x[i / 2][i % 2] : 0.0f) + (outside[1] ? x[i / 2][i % 2 + 2] : 0.0f);
      for (int32_t mask = 4; mask < 32; mask *= 2) total += group_.shuffle_xor(total, mask);
      if (g_ == 0) sums[i / 2 * 8 + 2 * t_ + i % 2] += total;
    }
  }

  // This lane's four elements of the gradient of the bias, for a tile of 8 keys.
  SGMIM_HOST_DEVICE float* dbias(int32_t j) const { return m_.dbias[j][warp_] + 4 * lane_; }

  SGMIM_HOST_DEVICE void backward() {
    const int64_t channels = int64_t{a_.heads} * DEPTH;
    const float ones[2] = {1, 1};
    Logits s;
    {
      float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {}, scale[2];
      logits(0, s);
      exponentials(s, row_max, row_sum, scale);
      for (int32_t r = 0; r < 2; ++r) scale[r] = group_.reciprocal(sum_of_row(row_sum[r]));
      SGMIM_UNROLL
      for (int32_t i = 0; i < 8 * TILES; ++i) s[i / 4][i % 4] *= scale[i % 4 / 2];
    }
    write_exchange(s, ones);
    {
      Own grad;
      load_own(grad, GRAD);
      float means[2] = {}, dp[2][4];
      SGMIM_UNROLL
      for (int32_t j = 0; j < TILES; ++j) {
        product(dp, grad, V, j);
        SGMIM_UNROLL
        for (int32_t i = 0; i < 8; ++i) means[i % 4 / 2] += s[2 * j + i / 4][i % 4] * dp[i / 4][i % 4];
      }
      for (int32_t r = 0; r < 2; ++r) means[r] = sum_of_row(means[r]);
      SGMIM_UNROLL
      for (int32_t j = 0; j < TILES; ++j) {  // recomputes dp: registers cannot hold it beside s
        product(dp, grad, V, j);
        SGMIM_UNROLL
        for (int32_t h = 0; h < 2; ++h) {
          Few<float, 4> sums = Few<float, 4>::load(dbias(2 * j + h));
          SGMIM_UNROLL
          for (int32_t c = 0; c < 4; ++c) sums.values[c] += s[2 * j + h][c] *= dp[h][c] - means[c / 2];
          memcpy(dbias(2 * j + h), &sums, sizeof sums);
        }
      }
    }
    group_.sync();  // probabilities have been written; values are no longer read
    {
      Result dv = {};
      accumulate_exchange(dv, GRAD);
      add_padding(dv, m_.sums[warp_] + DEPTH);
      store(dv, V, a_.dqkv, 3 * channels, 2 * channels);
    }
    group_.sync();  // probabilities and the gradient are no longer read
    const int32_t token = 16 * warp_ + g_;
    const float units[2] = {unit_factor(Q, token), unit_factor(Q, token + 8)};
    write_exchange(s, units);
    {
      Result dq = {};
      SGMIM_UNROLL
      for (int32_t j = 0; j < TILES; ++j) {
        SGMIM_UNROLL
        for (int32_t i = 0; i < 8; ++i)
          s[2 * j + i / 4][i % 4] *= unit_factor(K, 16 * j + i / 4 * 8 + 2 * t_ + i % 2);
        uint32_t ds[4];
        as_left(ds, s, j);
        accumulate(dq, ds, K, j);
      }
      multiply(dq, {m_.scale, m_.scale});
      if (a_.logit_scale != nullptr) unit_backward(dq, Q, &m_.sums[warp_][2 * DEPTH]);
      store(dq, GRAD, a_.dqkv, 3 * channels, 0);
    }
    group_.sync();  // the logits' gradient has been written; keys of other warps are no longer read
    {
      Result dk = {};
      accumulate_exchange(dk, Q);
      multiply(dk, {m_.scale, m_.scale});
      if (a_.logit_scale != nullptr) unit_backward(dk, K, nullptr);
      add_padding(dk, m_.sums[warp_]);
      store(dk, K, a_.dqkv, 3 * channels, channels);
    }
  }

  const Group& group_;
  const WindowCall<T>& a_;
  Memory& m_;
  int32_t rank_, lane_, warp_, g_, t_, head_, b_ = 0;
  bool has_mask_ = false, has_padding_ = false;
};

}  // namespace sgmim
