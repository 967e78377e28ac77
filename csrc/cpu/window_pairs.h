// window_attention in bfloat16 where there are instructions for it: VDPBF16PS adds the products of two bfloat16 to each
// float, so what a gemm sums over lies in pairs: rows as they are, `interleaved` (two rows at a time) or `transposed`
// pair by pair. Probabilities and the gradient of the logits are rounded to bfloat16 for the gemms that read them, as
// in plain PyTorch; the logits, their softmax and all sums are float32.
//
// As in window_head.h the logits are kept transposed, (keys, queries), QUERIES at a time. Queries and keys are multiplied
// as they come: scale and cosines' norms are factors of the logits, so unit vectors are never rounded.
//
// Included once, after vec.h, small_gemm.h and window_head.h, for the instruction set that has SGMIM_HAS_BF16.
namespace sgmim {
namespace SGMIM_ISA {

typedef uint32_t Pair;

template <bool ADD, int ROWS, int VECTORS>
SGMIM_INLINE void pair_tile(
    const Pair* a, int64_t a_stride, int64_t a_step, const Pair* b, int64_t b_stride, float* c, int64_t c_stride,
    int64_t depth) {
  __m512 sum[ROWS][VECTORS];
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < VECTORS; ++v) sum[m][v] = ADD ? (__m512)load(c + m * c_stride + v * LANES) : (__m512)vf{};
  for (int64_t t = 0; t < depth; ++t) {
    __m512i right[VECTORS];
    for (int v = 0; v < VECTORS; ++v) right[v] = _mm512_loadu_si512(b + t * b_stride + v * LANES);
    for (int m = 0; m < ROWS; ++m) {
      const __m512i left = _mm512_set1_epi32(a[m * a_stride + t * a_step]);
      for (int v = 0; v < VECTORS; ++v)
        sum[m][v] = _mm512_dpbf16_ps(sum[m][v], (__m512bh)left, (__m512bh)right[v]);
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < VECTORS; ++v) store(c + m * c_stride + v * LANES, (vf)sum[m][v]);
}

template <bool ADD, int ROWS>
void pair_rows(
    const Pair* a, int64_t a_stride, int64_t a_step, const Pair* b, int64_t b_stride, float* c, int64_t c_stride,
    int64_t columns, int64_t depth) {
  for (; columns >= 2 * LANES; ) {
    const int64_t vectors = columns % (2 * LANES) ? 3 : 2;  // 2, 3, 2 + 2, 3 + 2, ...
    if (vectors == 3)
      pair_tile<ADD, ROWS, 3>(a, a_stride, a_step, b, b_stride, c, c_stride, depth);
    else
      pair_tile<ADD, ROWS, 2>(a, a_stride, a_step, b, b_stride, c, c_stride, depth);
    b += vectors * LANES;
    c += vectors * LANES;
    columns -= vectors * LANES;
  }
  if (columns) pair_tile<ADD, ROWS, 1>(a, a_stride, a_step, b, b_stride, c, c_stride, depth);
}

// C (+)= A . B: element (m, t) of A, a pair, at a[m * a_stride + t * a_step]; B (depth, columns) pairs; C (rows, columns)
// floats. `columns` is a multiple of LANES.
template <bool ADD>
void pair_product(
    const Pair* a, int64_t a_stride, int64_t a_step, const Pair* b, int64_t b_stride, float* c, int64_t c_stride,
    int64_t rows, int64_t columns, int64_t depth) {
  by_six_rows(rows, [&](auto count, int64_t m) SGMIM_INLINE_LAMBDA {
    pair_rows<ADD, decltype(count)::value>(
        a + m * a_stride, a_stride, a_step, b, b_stride, c + m * c_stride, c_stride, columns, depth);
  });
}

// 2^power, as `coarse_exp2`.
SGMIM_INLINE vf coarse_exp(vf power) {
  const __m512 whole = _mm512_maskz_roundscale_ps(0xffff, (__m512)power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)coarse_exp2(power - (vf)whole), whole);
}

// Numbers of two rows as pairs.
SGMIM_INLINE __m512i pairs_of(vf low, vf high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_maskz_permutexvar_epi16(~0u, _mm512_load_si512(order), both);
}

// to (columns, rows) = from^T for 16 x 16 pairs.
SGMIM_INLINE void transpose16(const Pair* from, int64_t from_stride, Pair* to, int64_t to_stride) {
  __m512i a[16], b[16];
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(from + r * from_stride);
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_maskz_unpacklo_epi32(0xffff, a[r], a[r + 1]);
    b[r + 1] = _mm512_maskz_unpackhi_epi32(0xffff, a[r], a[r + 1]);
  }
  for (int r = 0; r < 16; r += 4) {
    for (int h = 0; h < 2; ++h) {
      a[r + 2 * h] = _mm512_maskz_unpacklo_epi64(0xff, b[r + h], b[r + 2 + h]);
      a[r + 2 * h + 1] = _mm512_maskz_unpackhi_epi64(0xff, b[r + h], b[r + 2 + h]);
    }
  }
  // a[4 g + i], quarter q: columns 4 q + i of rows 4 g to 4 g + 3
  for (int i = 0; i < 4; ++i) {
    const __m512i low0 = _mm512_maskz_shuffle_i32x4(0xffff, a[i], a[4 + i], 0x44);
    const __m512i low1 = _mm512_maskz_shuffle_i32x4(0xffff, a[8 + i], a[12 + i], 0x44);
    const __m512i high0 = _mm512_maskz_shuffle_i32x4(0xffff, a[i], a[4 + i], 0xee);
    const __m512i high1 = _mm512_maskz_shuffle_i32x4(0xffff, a[8 + i], a[12 + i], 0xee);
    _mm512_storeu_si512(to + i * to_stride, _mm512_maskz_shuffle_i32x4(0xffff, low0, low1, 0x88));
    _mm512_storeu_si512(to + (4 + i) * to_stride, _mm512_maskz_shuffle_i32x4(0xffff, low0, low1, 0xdd));
    _mm512_storeu_si512(to + (8 + i) * to_stride, _mm512_maskz_shuffle_i32x4(0xffff, high0, high1, 0x88));
    _mm512_storeu_si512(to + (12 + i) * to_stride, _mm512_maskz_shuffle_i32x4(0xffff, high0, high1, 0xdd));
  }
}

// One window and head: where its tokens are in the grid, and copies of its matrices. Rows and tokens are padded with
// zeros: ds is a multiple of 32, ns of 16.
class WindowPairs {
 public:
  WindowPairs(const WindowGrid& grid, const Bf16* qkv, const Bf16* pad)
      : n(grid.tokens()), ns(grid.padded_tokens), d(grid.head_width), ds((d + 31) / 32 * 32), rows(n), grid_(grid),
        qkv_(qkv), pad_(pad), group_(n), next_group_(n), apart_(4 * ns), by_(2 * ns), norms_(2 * ns), pairs_(10 * ns * ds / 2) {
    Pair** const matrices[] = {&q, &k, &v, &grad, &q2, &k2, &v2, &grad2, &qt, &grad_t};
    for (int i = 0; i < 10; ++i) *matrices[i] = pairs_.data() + i * ns * ds / 2;
    of_queries = by_.data();
    of_keys = of_queries + ns;
  }

  // `last`: whether no other window follows. Else its tokens are looked up, too, for `load_head` to fetch ahead.
  void enter(int64_t window, bool last) {
    masked_ = grid_.locate(window, rows.data(), group_.data());
    next_rows_.resize(last ? 0 : n);
    if (!last) grid_.locate(window + 1, next_rows_.data(), next_group_.data());
    if (!masked_) return;
    for (int64_t g = 0; g < 4; ++g)
      for (int64_t t = 0; t < n; ++t) apart_.data()[g * ns + t] = group_[t] == g ? 0.0f : APART;
  }

  // Queries, keys and values of a head, and the factors of the logits. `next`: the head that the next window begins with,
  // after this window's last head, else -1.
  void load_head(int64_t head, int64_t next, const Bf16* dout = nullptr) {
    const int64_t width = grid_.channels();
    if (next >= 0)
      for (const int64_t row : next_rows_)
        if (row >= 0) {
          for (int64_t part = 0; part < 3; ++part) fetch(qkv_ + row * 3 * width + part * width + next * d);
          if (dout) fetch(dout + row * width + next * d);
        }
    scale = cosines() ? grid_.logit_scale[head] : 1.0f / __builtin_sqrtf(d);
    load_rows(qkv_, 3 * width, head * d, pad_, q);
    load_rows(qkv_, 3 * width, width + head * d, pad_, k);
    load_rows(qkv_, 3 * width, 2 * width + head * d, pad_, v);
    for (int64_t t = 0; t < n; ++t) {
      of_queries[t] = cosines() ? scale * inverse_norm(q + t * ds / 2, norms_.data() + t) : scale;
      if (cosines()) of_keys[t] = inverse_norm(k + t * ds / 2, norms_.data() + ns + t);
    }
    transpose(q, qt);
  }

  // The gradient of the result, 0 outside the grid, and what else the backward reads.
  void load_grad(int64_t head, const Bf16* dout) {
    load_rows(dout, grid_.channels(), head * d, static_cast<const Bf16*>(nullptr), grad);
    transpose(grad, grad_t);
    interleave(grad, grad2);
    interleave(q, q2);
    interleave(k, k2);
  }

  void load_values() { interleave(v, v2); }

  // Logits of the queries [first, first + count), (n, QUERIES), times log2(e) and less the highest of each query: their
  // powers of two are the softmax's exponentials.
  void powers(int64_t head, int64_t first, int64_t count, float* p) {
    pair_product<false>(k, ds / 2, 1, qt + first, ns, p, QUERIES, n, padded(count), ds / 2);
    const float* bias = grid_.bias ? grid_.bias + head * n * ns + first : nullptr;
    const float* apart = apart_.data() + first;
    for (int64_t c = 0; c < count; c += LANES) {
      const vf by = load(of_queries + first + c);
      vf highest = set1(-__builtin_inff());
      for (int64_t j = 0; j < n; ++j) {
        vf x = load(p + j * QUERIES + c) * by;
        if (cosines()) x *= of_keys[j];
        if (bias) x += load(bias + j * ns + c);
        if (masked_) x += load(apart + group_[j] * ns + c);
        store(p + j * QUERIES + c, x);
        highest = vmax(highest, x);
      }
      for (int64_t j = 0; j < n; ++j) {
        float* at = p + j * QUERIES + c;
        store(at, (load(at) - highest) * 1.44269504f);
      }
    }
  }

  // Gradients of the factors' products as gradients of what came in: g (n, ds) in place. Returns the sum of gradient . x
  // over the scaled unit vectors x: for the queries that is the gradient of the logit scale's logarithm.
  float finish(bool keys, float* g) {
    const Pair* x = keys ? k : q;
    const float factor = keys ? 1.0f : scale, *by = keys ? of_keys : of_queries, *norm = norms_.data() + keys * ns;
    float total = 0;
    if (!cosines() && keys) return total;
    for (int64_t t = 0; t < n; ++t, x += ds / 2, g += ds) {
      const Bf16* row = reinterpret_cast<const Bf16*>(x);
      if (!cosines()) {
        for (int64_t i = 0; i < ds; i += LANES) store(g + i, load(g + i) * factor);
        continue;
      }
      vf dot = {};
      for (int64_t i = 0; i < ds; i += LANES) dot += load(row + i) * load(g + i);
      float along = hsum(dot) * by[t];
      total += along;
      if (!(norm[t] > TINY)) along = 0;
      for (int64_t i = 0; i < ds; i += LANES)
        store(g + i, (load(g + i) - load(row + i) * (by[t] * along / (factor * factor))) * by[t]);
    }
    return total;
  }

  void store_row(const float* from, Bf16* to) const {
    for (int64_t i = 0; i < d; i += 32) {
      const __m512i h = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(from + i + LANES), (__m512)load(from + i));
      _mm512_mask_storeu_epi16(to + i, lanes(i), h);
    }
  }

  bool cosines() const { return grid_.logit_scale != nullptr; }

 private:
  // Into L2.
  void fetch(const Bf16* from) const {
    for (int64_t i = 0; i < d; i += 32) __builtin_prefetch(from + i, 0, 2);
  }

  __mmask32 lanes(int64_t i) const { return d - i >= 32 ? ~0u : (1u << (d - i)) - 1; }

  void load_rows(const Bf16* source, int64_t width, int64_t column, const Bf16* outside, Pair* out) const {
    for (int64_t t = 0; t < n; ++t, out += ds / 2) {
      const Bf16* row = rows[t] >= 0 ? source + rows[t] * width + column : outside ? outside + column : nullptr;
      for (int64_t i = 0; i < d; i += 32) {
        if (row) __builtin_prefetch(row + d + i);  // of the next head
        _mm512_store_si512(out + i / 2, row ? _mm512_maskz_loadu_epi16(lanes(i), row + i) : __m512i{});
      }
    }
  }

  float inverse_norm(const Pair* x, float* norm) const {
    __m512 squares = {};
    for (int64_t i = 0; i < ds / 2; i += LANES) {
      const __m512bh both = (__m512bh)_mm512_loadu_si512(x + i);
      squares = _mm512_dpbf16_ps(squares, both, both);
    }
    *norm = __builtin_sqrtf(hsum((vf)squares));
    return 1.0f / (*norm > TINY ? *norm : TINY);
  }

  // out (ds / 2, ns) = in (n, ds / 2)^T
  void transpose(const Pair* in, Pair* out) const {
    for (int64_t t = 0; t < n; t += 16)
      for (int64_t i = 0; i < ds / 2; i += 16) transpose16(in + t * ds / 2 + i, ds / 2, out + i * ns + t, ns);
  }

  // out (ns / 2, ds): each number of an even row with the one below it.
  void interleave(const Pair* in, Pair* out) const {
    alignas(64) static const uint16_t order[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    for (int64_t t = 0; t < n; t += 2, in += ds, out += ds)
      for (int64_t i = 0; i < ds; i += 32) {
        const __m512i above = _mm512_load_si512(in + i / 2), below = _mm512_load_si512(in + ds / 2 + i / 2);
        for (int64_t h = 0; h < 2; ++h)
          _mm512_store_si512(
              out + i + h * 16, _mm512_maskz_permutex2var_epi16(~0u, above, _mm512_load_si512(order[h]), below));
      }
  }

 public:
  const int64_t n, ns, d, ds;
  std::vector<int64_t> rows;                  // (n,): where the tokens are in the grid, -1 outside
  float scale;                                // of the queries
  float *of_queries, *of_keys;                // (ns,) factors of the logits; of_keys of cosines alone
  Pair *q, *k, *v, *grad;                     // (ns, ds / 2): rows as they come
  Pair *q2, *k2, *v2, *grad2;                 // (ns / 2, ds): interleaved
  Pair *qt, *grad_t;                          // (ds / 2, ns): transposed

 private:
  const WindowGrid& grid_;
  const Bf16 *qkv_, *pad_;
  bool masked_ = false;
  std::vector<int64_t> group_, next_rows_, next_group_;  // (n,)
  Aligned<float> apart_, by_, norms_;         // (4, ns), what keys of a group add to each query; (2, ns)
  Aligned<Pair> pairs_;
};

template <>
void window_attention_range<Bf16>(
    const WindowGrid* grid, const Bf16* qkv, const Bf16* pad, Bf16* out, int64_t begin, int64_t end) {
  WindowPairs w(*grid, qkv, pad);
  const int64_t n = w.n, d = w.d, ds = w.ds;
  Aligned<float> logits(n * QUERIES), result(QUERIES * ds);
  Aligned<Pair> pairs((n + 1) / 2 * QUERIES);
  float *p = logits.data(), *o = result.data();
  Pair* p2 = pairs.data();
  alignas(64) float inverse[QUERIES];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % grid->heads;
    const int64_t window = item / grid->heads;
    if (item == begin || head == 0) w.enter(window, window + 1 >= (end + grid->heads - 1) / grid->heads);
    w.load_head(head, head + 1 == grid->heads ? 0 : -1);
    w.load_values();
    for (int64_t first = 0; first < n; first += QUERIES) {
      const int64_t count = n - first < QUERIES ? n - first : QUERIES;
      w.powers(head, first, count, p);
      for (int64_t c = 0; c < count; c += LANES) {
        vf sum = {};
        for (int64_t j = 0; j < n; j += 2) {
          const float* at = p + j * QUERIES + c;
          const vf low = coarse_exp(load(at)), high = j + 1 < n ? coarse_exp(load(at + QUERIES)) : vf{};
          sum += low + high;
          _mm512_store_si512(p2 + j / 2 * QUERIES + c, pairs_of(low, high));
        }
        store(inverse + c, 1.0f / sum);
      }
      pair_product<false>(p2, 1, QUERIES, w.v2, ds, o, ds, count, ds, (n + 1) / 2);
      for (int64_t r = 0; r < count; ++r) {
        if (w.rows[first + r] < 0) continue;
        for (int64_t i = 0; i < ds; i += LANES) store(o + r * ds + i, load(o + r * ds + i) * inverse[r]);
        w.store_row(o + r * ds, out + w.rows[first + r] * grid->channels() + head * d);
      }
    }
  }
}

template <>
void window_attention_backward_range<Bf16>(
    const WindowGrid* grid, const Bf16* qkv, const Bf16* pad, const Bf16* dout, Bf16* dqkv, const WindowSums* sums,
    int64_t first_head, int64_t last_head, int64_t begin, int64_t end) {
  WindowPairs w(*grid, qkv, pad);
  const int64_t n = w.n, ns = w.ns, d = w.d, ds = w.ds, width = grid->channels(), two = (n + 1) / 2;
  Aligned<float> floats(2 * n * QUERIES + 3 * n * ds);
  Aligned<Pair> pairs((2 * n + 2 * two) / 2 * QUERIES);
  float *p = floats.data(), *dp = p + n * QUERIES, *dq = dp + n * QUERIES, *dk = dq + n * ds, *dv = dk + n * ds;
  Pair *ds2 = pairs.data(), *pt = ds2 + two * QUERIES, *dst = pt + n * QUERIES / 2;
  for (int64_t window = begin; window < end; ++window) {
    w.enter(window, window + 1 == end);
    for (int64_t head = first_head; head < last_head; ++head) {
      w.load_head(head, head + 1 == last_head ? first_head : -1, dout);
      w.load_grad(head, dout);
      for (int64_t t = 0; t < n; ++t)  // written at the end of this head
        for (int64_t i = 0; i < 3 * d && w.rows[t] >= 0; i += 32)
          __builtin_prefetch(dqkv + w.rows[t] * 3 * width + i / d * width + head * d + i % d, 1);
      for (int64_t first = 0; first < n; first += QUERIES) {
        const int64_t count = n - first < QUERIES ? n - first : QUERIES, halved = (count + 1) / 2;
        w.powers(head, first, count, p);
        pair_product<false>(w.v, ds / 2, 1, w.grad_t + first, ns, dp, QUERIES, n, padded(count), ds / 2);
        for (int64_t c = 0; c < count; c += LANES) {
          vf sum = {}, mean = {};
          for (int64_t j = 0; j < n; ++j) {
            const vf e = coarse_exp(load(p + j * QUERIES + c));
            store(p + j * QUERIES + c, e);
            sum += e;
            mean += e * load(dp + j * QUERIES + c);
          }
          const vf inverse = 1.0f / sum, by = load(w.of_queries + first + c);
          mean *= inverse;
          float* dbias = sums->bias ? sums->bias + head * n * ns + first + c : nullptr;
          for (int64_t j = 0; j < n; j += 2) {
            vf change[2] = {};
            for (int64_t h = 0; h < 2 && j + h < n; ++h) {
              const int64_t at = (j + h) * QUERIES + c;
              const vf x = load(p + at) * inverse, dx = x * (load(dp + at) - mean);
              store(reinterpret_cast<Bf16*>(pt) + at, x);
              store(reinterpret_cast<Bf16*>(dst) + at, dx * by);
              if (dbias) store(dbias + (j + h) * ns, load(dbias + (j + h) * ns) + dx);
              change[h] = w.cosines() ? dx * w.of_keys[j + h] : dx;
            }
            _mm512_store_si512(ds2 + j / 2 * QUERIES + c, pairs_of(change[0], change[1]));
          }
        }
        const auto sum = first > 0 ? pair_product<true> : pair_product<false>;
        sum(pt, QUERIES / 2, 1, w.grad2 + first / 2 * ds, ds, dv, ds, n, ds, halved);
        sum(dst, QUERIES / 2, 1, w.q2 + first / 2 * ds, ds, dk, ds, n, ds, halved);
        pair_product<false>(ds2, 1, QUERIES, w.k2, ds, dq + first * ds, ds, count, ds, two);
      }
      const float along = w.finish(false, dq);
      if (sums->logit_scale) sums->logit_scale[head] += along;
      w.finish(true, dk);
      for (int64_t t = 0; t < n; ++t) {
        if (w.rows[t] >= 0) {
          Bf16* to = dqkv + w.rows[t] * 3 * width + head * d;
          w.store_row(dq + t * ds, to);
          w.store_row(dk + t * ds, to + width);
          w.store_row(dv + t * ds, to + 2 * width);
        } else if (sums->pad) {  // of its queries nobody sees the result
          accumulate_row(dk + t * ds, sums->pad + width + head * d, d);
          accumulate_row(dv + t * ds, sums->pad + 2 * width + head * d, d);
        }
      }
    }
  }
}

}  // namespace SGMIM_ISA
}  // namespace sgmim
