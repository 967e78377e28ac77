// Attention of an image's visible rows over its shown keys and one key that represents all hidden cells, forward and
// backward, in tiles of QUERIES x KEYS. Device functions of csrc/cuda/relational_guidance.cu.
//
// The group must have gemm(), see group.h.
#pragma once

#include <cassert>
#include <cmath>
#include <type_traits>

#include "group.h"

namespace sgmim {

constexpr int32_t QUERIES = 32, KEYS = 32;
constexpr int32_t MOST_LANES = 8;  // most threads that share a row

// Arguments of both passes. q, out, dout, dq: (visible, heads * depth). k, v, dk, dv: (shown + 1, heads * depth), of
// which the last row is that of the hidden cells. lse (2, visible, heads): logsumexp of the logits in two parts,
// row_max and log(row_sum). Pointers that a pass does not use may be null.
template <class T>
struct Attention {
  const T *q, *k, *v, *dout;
  T *out, *dq, *dk, *dv;
  float* lse;
  float* hidden_sums;  // (2, images, heads * depth): workspace, each image's terms of the last rows of dk and dv
  const int64_t *visible_offsets, *shown_offsets;
  int64_t images, queries, last;  // queries: rows of q; last: index of the last row of k
  int32_t cells, heads, depth;
  float scale;
  bool keep;  // whether hidden cells are attended to
  bool aligned;  // whether depth is a multiple of 16 and every matrix is aligned to 16 bytes
};

// The packed rows of one image, and the head that a block computes.
struct Place {
  int64_t image, first_query, first_key;
  int32_t queries, shown, hidden, head;
};

template <class T>
SGMIM_HOST_DEVICE Place place_of(const Attention<T>& a, int64_t image, int32_t head) {
  Place p;
  p.image = image;
  p.head = head;
  p.first_query = a.visible_offsets[image];
  p.queries = static_cast<int32_t>(a.visible_offsets[image + 1] - p.first_query);
  p.first_key = a.shown_offsets[image];
  p.shown = static_cast<int32_t>(a.shown_offsets[image + 1] - p.first_key);
  assert(0 <= p.first_query && 0 <= p.queries && p.first_query + p.queries <= a.queries && "wrong visible.offsets");
  assert(0 <= p.first_key && 0 <= p.shown && p.first_key + p.shown <= a.last && "wrong shown.offsets");
  p.hidden = a.keep ? a.cells - p.shown : 0;
  return p;
}

// Allocator for arrays in the group's memory, which must be aligned to 32 bytes. Only counts bytes if `first` is null.
struct Memory {
  char* first;
  int64_t used = 0;

  template <class E>
  SGMIM_HOST_DEVICE void allocate(E*& pointer, int32_t elements) {
    pointer = reinterpret_cast<E*>(first + used);
    used += (elements * static_cast<int64_t>(sizeof(E)) + 31) / 32 * 32;
  }
};

// Tiles in the group's memory that forward and backward share: QUERIES x KEYS logits and their operands. Rows are
// padded by 16 bytes, so that adjacent rows start in different banks.
template <class T>
struct Tiles {
  T *q, *k, *v;    // (32, depth)
  T* p;            // (QUERIES, KEYS): the softmax; in the forward before its division by row_sum
  float* s;        // (QUERIES, KEYS): logits
  float* part;     // (QUERIES, MOST_LANES): partial results of a row reduction, one per thread of the row
  float* row_max;  // (QUERIES,): largest logit
  int32_t depth, stride, sum_stride;  // depth rounded up to 16; row strides of (32, depth) tiles of T and of float

  static constexpr int32_t P_STRIDE = KEYS + 16 / sizeof(T), S_STRIDE = KEYS + 4;

 protected:
  SGMIM_HOST_DEVICE void allocate_tiles(Memory& memory, int32_t true_depth) {
    depth = (true_depth + 15) / 16 * 16;
    stride = depth + 16 / static_cast<int32_t>(sizeof(T));
    sum_stride = depth + 4;
    memory.allocate(q, QUERIES * stride);
    memory.allocate(k, KEYS * stride);
    memory.allocate(v, KEYS * stride);
    memory.allocate(p, QUERIES * P_STRIDE);
    memory.allocate(s, QUERIES * S_STRIDE);
    memory.allocate(part, QUERIES * MOST_LANES);
    memory.allocate(row_max, QUERIES);
  }
};

template <class T>
struct ForwardTiles : Tiles<T> {
  float* out;        // (QUERIES, depth): p . v
  float* row_sum;    // (QUERIES,): sums of p over the blocks of keys so far
  float* block_sum;  // (QUERIES, MOST_LANES): partial sums of p over one block of keys

  // Assigns the pointers and returns the size in bytes.
  SGMIM_HOST_DEVICE int64_t lay_out(char* first, int32_t true_depth) {
    Memory memory{first};
    this->allocate_tiles(memory, true_depth);
    memory.allocate(out, QUERIES * this->sum_stride);
    memory.allocate(row_sum, QUERIES);
    memory.allocate(block_sum, QUERIES * MOST_LANES);
    return memory.used;
  }
};

template <class T>
struct BackwardTiles : Tiles<T> {
  T* dout;                 // (QUERIES, depth)
  T* ds;                   // (QUERIES, KEYS): gradient of q . k
  float* dp;               // (QUERIES, KEYS)
  float *log_sum, *delta;  // (QUERIES,): log(row_sum), the second part of lse; row sums of dout * out
  float *dq, *dk, *dv;     // (32, depth): dq of a block of queries, or dk and dv of one of keys; dq and dk share memory

  // Assigns the pointers and returns the size in bytes.
  SGMIM_HOST_DEVICE int64_t lay_out(char* first, int32_t true_depth) {
    Memory memory{first};
    this->allocate_tiles(memory, true_depth);
    memory.allocate(dout, QUERIES * this->stride);
    memory.allocate(ds, QUERIES * this->P_STRIDE);
    memory.allocate(dp, QUERIES * this->S_STRIDE);
    memory.allocate(log_sum, QUERIES);
    memory.allocate(delta, QUERIES);
    memory.allocate(dk, KEYS * this->sum_stride);
    memory.allocate(dv, KEYS * this->sum_stride);
    dq = dk;
    return memory.used;
  }
};

// Loads rows [begin, begin + 32) of one head into a tile, with zeros from row `count` on and beyond the depth. row(i)
// returns the index of the i-th row in the matrix.
template <class Group, class T, class Row>
SGMIM_HOST_DEVICE void load_rows(
    const Group& group, const Attention<T>& a, int32_t head, const T* matrix, int32_t begin, int32_t count,
    const Row& row, const Tiles<T>& t, T* tile) {
  constexpr int32_t MANY = 16 / sizeof(T);
  const int64_t width = int64_t{a.heads} * a.depth;
  matrix += int64_t{head} * a.depth;
  if (a.aligned) {
    const int32_t per_row = a.depth / MANY;
    for (int32_t i = group.rank(); i < 32 * per_row; i += group.size()) {
      const int32_t r = i / per_row, d = i % per_row * MANY;
      Sixteen value{};
      if (begin + r < count) value = *reinterpret_cast<const Sixteen*>(matrix + row(begin + r) * width + d);
      *reinterpret_cast<Sixteen*>(tile + r * t.stride + d) = value;
    }
  } else {
    for (int32_t i = group.rank(); i < 32 * t.depth; i += group.size()) {
      const int32_t r = i / t.depth, d = i % t.depth;
      const bool there = begin + r < count && d < a.depth;
      tile[r * t.stride + d] = there ? matrix[row(begin + r) * width + d] : static_cast<T>(0.0f);
    }
  }
}

template <class Group>
SGMIM_HOST_DEVICE void clear(const Group& group, float* tile, int32_t count) {
  for (int32_t i = group.rank(); i < count; i += group.size()) tile[i] = 0;
}

// Stores the first `rows` rows of a float tile to a matrix, divided by divisors[row] where it is given and positive.
template <class Group, class T, class Row>
SGMIM_HOST_DEVICE void store_rows(
    const Group& group, const Attention<T>& a, int32_t head, const float* tile, const float* divisors, int32_t rows,
    const Row& row, const Tiles<T>& t, T* matrix) {
  for (int32_t i = group.rank(); i < rows * a.depth; i += group.size()) {
    const int32_t r = i / a.depth, d = i % a.depth;
    const float divisor = divisors && divisors[r] > 0 ? divisors[r] : 1.0f;
    matrix[row(r) * a.heads * a.depth + int64_t{head} * a.depth + d] =
        static_cast<T>(tile[r * t.sum_stride + d] / divisor);
  }
}

// Calls body(row, lane, lanes) for this thread's rows of a tile of 32 rows; `lanes` threads share a row.
template <class Group, class Body>
SGMIM_HOST_DEVICE void each_row(const Group& group, const Body& body) {
  const int32_t lanes =
      group.size() < 2 * QUERIES ? 1 : group.size() < MOST_LANES * QUERIES ? group.size() / QUERIES : MOST_LANES;
  for (int32_t i = group.rank(); i < QUERIES * lanes; i += group.size()) body(i / lanes, i % lanes, lanes);
}

// Returns the logit of q . k: -infinity beyond the last key; log(number of hidden cells) is added for the hidden key.
SGMIM_HOST_DEVICE float logit(float dot, int32_t key, const Place& place, float scale, float log_hidden) {
  if (key < place.shown) return dot * scale;
  return key == place.shown && place.hidden > 0 ? dot * scale + log_hidden : -INFINITY;
}

SGMIM_HOST_DEVICE float log_of(int32_t hidden) { return logf(static_cast<float>(hidden > 1 ? hidden : 1)); }

// Computes the attention of the queries [begin, begin + QUERIES) of an image; begin < queries.
template <class Group, class T>
SGMIM_HOST_DEVICE void attend(
    const Group& group, const Attention<T>& a, const Place& place, int32_t begin, const ForwardTiles<T>& t) {
  const auto query_row = [&](int32_t i) { return place.first_query + i; };
  const auto key_row = [&](int32_t j) { return j < place.shown ? place.first_key + j : a.last; };
  const float log_hidden = log_of(place.hidden);
  const int32_t keys = place.shown + (place.hidden > 0);
  load_rows(group, a, place.head, a.q, begin, place.queries, query_row, t, t.q);
  clear(group, t.out, QUERIES * t.sum_stride);
  for (int32_t i = group.rank(); i < QUERIES; i += group.size()) {
    t.row_max[i] = -INFINITY;
    t.row_sum[i] = 0;
  }
  for (int32_t first = 0; first < keys; first += KEYS) {
    load_rows(group, a, place.head, a.k, first, keys, key_row, t, t.k);
    load_rows(group, a, place.head, a.v, first, keys, key_row, t, t.v);
    clear(group, t.s, QUERIES * Tiles<T>::S_STRIDE);
    group.sync();
    group.template gemm<false, true>(
        t.q, t.stride, t.k, t.stride, t.s, Tiles<T>::S_STRIDE, QUERIES, KEYS, t.depth);
    group.sync();
    each_row(group, [&](int32_t row, int32_t lane, int32_t lanes) {
      float block_max = -INFINITY;
      for (int32_t j = lane; j < KEYS; j += lanes) {
        float& s = t.s[row * Tiles<T>::S_STRIDE + j];
        s = logit(s, first + j, place, a.scale, log_hidden);
        block_max = s > block_max ? s : block_max;
      }
      t.part[row * MOST_LANES + lane] = block_max;
    });
    group.sync();
    // Every block has at least one key, so the new maximum is finite.
    each_row(group, [&](int32_t row, int32_t lane, int32_t lanes) {
      float row_max = t.row_max[row], total = 0;
      for (int32_t l = 0; l < lanes; ++l) row_max = fmaxf(row_max, t.part[row * MOST_LANES + l]);
      for (int32_t j = lane; j < KEYS; j += lanes) {
        const float p = expf(t.s[row * Tiles<T>::S_STRIDE + j] - row_max);
        t.p[row * Tiles<T>::P_STRIDE + j] = static_cast<T>(p);
        total += p;
      }
      t.block_sum[row * MOST_LANES + lane] = total;
      const float rescale = expf(t.row_max[row] - row_max);
      for (int32_t d = lane; d < t.depth; d += lanes) t.out[row * t.sum_stride + d] *= rescale;
    });
    group.sync();
    group.template gemm<false, false>(
        t.p, Tiles<T>::P_STRIDE, t.v, t.stride, t.out, t.sum_stride, QUERIES, t.depth, KEYS);
    each_row(group, [&](int32_t row, int32_t lane, int32_t lanes) {
      if (lane > 0) return;
      float row_max = t.row_max[row], total = 0;
      for (int32_t l = 0; l < lanes; ++l) {
        row_max = fmaxf(row_max, t.part[row * MOST_LANES + l]);
        total += t.block_sum[row * MOST_LANES + l];
      }
      t.row_sum[row] = t.row_sum[row] * expf(t.row_max[row] - row_max) + total;
      t.row_max[row] = row_max;
    });
    group.sync();
  }
  if (keys == 0) group.sync();
  const int32_t rows = place.queries - begin < QUERIES ? place.queries - begin : QUERIES;
  const auto out_row = [&](int32_t i) { return place.first_query + begin + i; };
  store_rows(group, a, place.head, t.out, t.row_sum, rows, out_row, t, a.out);
  for (int32_t i = group.rank(); i < rows; i += group.size()) {
    float* const lse = a.lse + out_row(i) * a.heads + place.head;
    lse[0] = t.row_sum[i] > 0 ? t.row_max[i] : 0.0f;
    lse[a.queries * a.heads] = t.row_sum[i] > 0 ? logf(t.row_sum[i]) : 0.0f;
  }
}

// Loads what the backward needs for the queries [begin, begin + QUERIES): q, dout and both parts of lse; computes
// delta. Ends with a barrier.
template <class Group, class T>
SGMIM_HOST_DEVICE void load_queries(
    const Group& group, const Attention<T>& a, const Place& place, int32_t begin, const BackwardTiles<T>& t) {
  const auto row_of = [&](int32_t i) { return place.first_query + i; };
  load_rows(group, a, place.head, a.q, begin, place.queries, row_of, t, t.q);
  load_rows(group, a, place.head, a.dout, begin, place.queries, row_of, t, t.dout);
  each_row(group, [&](int32_t row, int32_t lane, int32_t lanes) {
    float total = 0;
    if (begin + row < place.queries) {
      const int64_t at = row_of(begin + row) * a.heads * a.depth + int64_t{place.head} * a.depth;
      for (int32_t d = lane; d < a.depth; d += lanes)
        total += static_cast<float>(a.dout[at + d]) * static_cast<float>(a.out[at + d]);
      if (lane == 0) {
        const float* const lse = a.lse + row_of(begin + row) * a.heads + place.head;
        t.row_max[row] = lse[0];
        t.log_sum[row] = lse[a.queries * a.heads];
      }
    }
    t.part[row * MOST_LANES + lane] = total;
  });
  group.sync();
  each_row(group, [&](int32_t row, int32_t lane, int32_t lanes) {
    if (lane > 0) return;
    float total = 0;
    for (int32_t l = 0; l < lanes; ++l) total += t.part[row * MOST_LANES + l];
    t.delta[row] = total;
  });
  group.sync();
}

// Computes p, the softmax, and ds, the gradient of q . k, from the tiles q, k, v and dout, for the queries from `begin`
// and the keys from `first` on. Starts with a barrier, after which the tiles are complete, and ends with one.
template <class Group, class T>
SGMIM_HOST_DEVICE void weights_and_gradients(
    const Group& group, const Attention<T>& a, const Place& place, int32_t begin, int32_t first, float log_hidden,
    const BackwardTiles<T>& t) {
  clear(group, t.s, QUERIES * Tiles<T>::S_STRIDE);
  clear(group, t.dp, QUERIES * Tiles<T>::S_STRIDE);
  group.sync();
  group.template gemm<false, true>(t.q, t.stride, t.k, t.stride, t.s, Tiles<T>::S_STRIDE, QUERIES, KEYS, t.depth);
  group.template gemm<false, true>(
      t.dout, t.stride, t.v, t.stride, t.dp, Tiles<T>::S_STRIDE, QUERIES, KEYS, t.depth);
  group.sync();
  // The gradient of a single key's logit is exactly 0: its softmax is 1, whatever the logit.
  const float scale = place.shown + (place.hidden > 0) == 1 ? 0 : a.scale;
  each_row(group, [&](int32_t row, int32_t lane, int32_t lanes) {
    for (int32_t j = lane; j < KEYS; j += lanes) {
      const float s = logit(t.s[row * Tiles<T>::S_STRIDE + j], first + j, place, a.scale, log_hidden);
      const float p = begin + row < place.queries ? expf(s - t.row_max[row] - t.log_sum[row]) : 0.0f;
      const float ds = p != 0 ? p * (t.dp[row * Tiles<T>::S_STRIDE + j] - t.delta[row]) * scale : 0.0f;
      t.p[row * Tiles<T>::P_STRIDE + j] = static_cast<T>(p);
      t.ds[row * Tiles<T>::P_STRIDE + j] = static_cast<T>(ds);
    }
  });
  group.sync();
}

// Computes dq of the queries [begin, begin + QUERIES) of an image; begin < queries.
template <class Group, class T>
SGMIM_HOST_DEVICE void attend_backward_queries(
    const Group& group, const Attention<T>& a, const Place& place, int32_t begin, const BackwardTiles<T>& t) {
  const auto key_row = [&](int32_t j) { return j < place.shown ? place.first_key + j : a.last; };
  const float log_hidden = log_of(place.hidden);
  const int32_t keys = place.shown + (place.hidden > 0);
  clear(group, t.dq, QUERIES * t.sum_stride);
  load_queries(group, a, place, begin, t);
  for (int32_t first = 0; first < keys; first += KEYS) {
    load_rows(group, a, place.head, a.k, first, keys, key_row, t, t.k);
    load_rows(group, a, place.head, a.v, first, keys, key_row, t, t.v);
    weights_and_gradients(group, a, place, begin, first, log_hidden, t);  // starts with a barrier
    group.template gemm<false, false>(
        t.ds, Tiles<T>::P_STRIDE, t.k, t.stride, t.dq, t.sum_stride, QUERIES, t.depth, KEYS);
    group.sync();
  }
  const int32_t rows = place.queries - begin < QUERIES ? place.queries - begin : QUERIES;
  const auto out_row = [&](int32_t i) { return place.first_query + begin + i; };
  store_rows(group, a, place.head, t.dq, static_cast<const float*>(nullptr), rows, out_row, t, a.dq);
}

// Computes dk and dv of the keys [first, first + KEYS) of an image; first <= shown. Those of the hidden key go to the
// image's part of hidden_sums: zeros if no hidden cell is attended to.
template <class Group, class T>
SGMIM_HOST_DEVICE void attend_backward_keys(
    const Group& group, const Attention<T>& a, const Place& place, int32_t first, const BackwardTiles<T>& t) {
  const auto key_row = [&](int32_t j) { return j < place.shown ? place.first_key + j : a.last; };
  const float log_hidden = log_of(place.hidden);
  const int32_t keys = place.shown + (place.hidden > 0);
  load_rows(group, a, place.head, a.k, first, keys, key_row, t, t.k);
  load_rows(group, a, place.head, a.v, first, keys, key_row, t, t.v);
  clear(group, t.dk, KEYS * t.sum_stride);
  clear(group, t.dv, KEYS * t.sum_stride);
  for (int32_t begin = 0; begin < place.queries; begin += QUERIES) {
    load_queries(group, a, place, begin, t);
    weights_and_gradients(group, a, place, begin, first, log_hidden, t);
    group.template gemm<true, false>(
        t.ds, Tiles<T>::P_STRIDE, t.q, t.stride, t.dk, t.sum_stride, KEYS, t.depth, QUERIES);
    group.template gemm<true, false>(
        t.p, Tiles<T>::P_STRIDE, t.dout, t.stride, t.dv, t.sum_stride, KEYS, t.depth, QUERIES);
    group.sync();
  }
  if (place.queries == 0) group.sync();
  const int32_t rows = place.shown - first < KEYS ? place.shown - first : KEYS;
  const auto row_of = [&](int32_t j) { return place.first_key + first + j; };
  store_rows(group, a, place.head, t.dk, static_cast<const float*>(nullptr), rows, row_of, t, a.dk);
  store_rows(group, a, place.head, t.dv, static_cast<const float*>(nullptr), rows, row_of, t, a.dv);
  if (rows == KEYS) return;  // the hidden key is in a later block
  const int64_t width = int64_t{a.heads} * a.depth;
  for (int32_t d = group.rank(); d < a.depth; d += group.size()) {
    const int64_t at = place.image * width + int64_t{place.head} * a.depth + d;
    a.hidden_sums[at] = t.dk[rows * t.sum_stride + d];
    a.hidden_sums[a.images * width + at] = t.dv[rows * t.sum_stride + d];
  }
}

// Computes the last rows of dk and dv: sums the images' parts in order. Works with any group.
template <class Group, class T>
SGMIM_HOST_DEVICE void add_hidden(const Group& group, const Attention<T>& a) {
  const int64_t width = int64_t{a.heads} * a.depth;
  for (int64_t i = group.rank(); i < 2 * width; i += group.size()) {
    const float* const parts = a.hidden_sums + i / width * a.images * width + i % width;
    double total = 0;
    SGMIM_UNROLL_BY(8)
    for (int64_t image = 0; image < a.images; ++image) total += parts[image * width];
    (i < width ? a.dk : a.dv)[a.last * width + i % width] = static_cast<T>(static_cast<float>(total));
  }
}

// Division of the backward of all images and heads: parts that sum over queries, for dk and dv, and parts that sum over
// keys, for dq. No sum is shared between parts.
struct Parts {
  int32_t of_keys, of_queries;  // of one image and head
  int64_t all;                  // of all images and heads
};

template <class T>
SGMIM_HOST_DEVICE Parts parts_of(const Attention<T>& a) {
  const int32_t of_keys = (a.cells + KEYS) / KEYS, of_queries = (a.cells + QUERIES - 1) / QUERIES;
  return {of_keys, of_queries, a.images * a.heads * (of_keys + of_queries)};
}

// Computes dq, dk and dv with `blocks` groups, of which this is number `block`; `launch` is the group of all threads.
template <class Group, class Launch, class T>
SGMIM_HOST_DEVICE void attend_backward(
    const Group& group, const Launch& launch, const Attention<T>& a, int64_t block, int64_t blocks,
    const BackwardTiles<T>& t) {
  const Parts parts = parts_of(a);
  const int32_t together = parts.of_keys + parts.of_queries;
  for (int64_t i = block; i < parts.all; i += blocks) {
    const Place place = place_of(a, i / together / a.heads, static_cast<int32_t>(i / together % a.heads));
    const int32_t part = static_cast<int32_t>(i % together), begin = (part - parts.of_keys) * QUERIES;
    if (part < parts.of_keys && part * KEYS <= place.shown) attend_backward_keys(group, a, place, part * KEYS, t);
    if (0 <= begin && begin < place.queries) attend_backward_queries(group, a, place, begin, t);
    group.sync();  // the next part overwrites the tiles
  }
  launch.sync();
  add_hidden(launch, a);
}

}  // namespace sgmim
