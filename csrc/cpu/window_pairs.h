// window_attention in bfloat16 with AVX512-BF16. VDPBF16PS adds the dot product of two pairs of bfloat16 to each float,
// so operands are stored as pairs along the summed dimension: rows as loaded where a gemm sums over channels,
// `interleaved` (two rows at a time) where it sums over tokens, or `transposed` pair by pair. Probabilities and the
// gradient of the logits are rounded to bfloat16 for the gemms that read them, as in plain PyTorch. The logits, their
// softmax and all sums are float32.
//
// As in window_head.h the logits are stored transposed, (keys, queries), QUERIES at a time. The gemms multiply queries
// and keys as loaded; the scale and the inverse norms are applied to the logits. Unit vectors are thus never rounded.
//
// Included once, after vec.h, small_gemm.h and window_head.h, for the instruction set that defines SGMIM_HAS_BF16.
namespace sgmim {
namespace SGMIM_ISA {

// 2^power with the accuracy of `coarse_exp2`, for any power.
SGMIM_INLINE vf coarse_exp(vf power) {
  const __m512 whole = _mm512_maskz_roundscale_ps(0xffff, (__m512)power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)coarse_exp2(power - (vf)whole), whole);
}

struct Coarse {
  SGMIM_INLINE vf of(vf x) { return coarse_exp(x); }
};

// Rounds two rows to bfloat16 and interleaves them: lane i holds the pair (low[i], high[i]).
SGMIM_INLINE __m512i pairs_of(vf low, vf high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_maskz_permutexvar_epi16(~0u, _mm512_load_si512(order), both);
}

// Copies of the operands of one window and head as pairs, padded with zeros: ds is a multiple of 32, ns of 16.
class WindowPairs : public WindowTokens<Bf16> {
 public:
  WindowPairs(const WindowGrid& grid, const Bf16* qkv, const Bf16* pad)
      : WindowTokens(grid, qkv, pad), ds((d + 31) / 32 * 32), scales_(2 * ns), norms_(2 * ns),
        pairs_(10 * ns * ds / 2) {
    Pair** const matrices[] = {&q, &k, &v, &grad, &q2, &k2, &v2, &grad2, &qt, &grad_t};
    for (int i = 0; i < 10; ++i) *matrices[i] = pairs_.data() + i * ns * ds / 2;
    query_scale = scales_.data();
    key_scale = query_scale + ns;
  }

  // Loads queries, keys and values of a head, and computes the scales of the logits.
  void load_head(int64_t head) {
    const int64_t width = grid_.channels();
    scale = cosines() ? grid_.logit_scale[head] : 1.0f / __builtin_sqrtf(d);
    load_rows(qkv_, 3 * width, head * d, pad_, q);
    load_rows(qkv_, 3 * width, width + head * d, pad_, k);
    load_rows(qkv_, 3 * width, 2 * width + head * d, pad_, v);
    for (int64_t t = 0; t < n; ++t) {
      query_scale[t] = cosines() ? scale * inverse_norm(q + t * ds / 2, norms_.data() + t) : scale;
      if (cosines()) key_scale[t] = inverse_norm(k + t * ds / 2, norms_.data() + ns + t);
    }
    transpose(q, qt);
  }

  // Loads the gradient of the result, 0 for padding tokens, and interleaves the operands of the backward's gemms.
  void load_grad(int64_t head, const Bf16* dout) {
    load_rows(dout, grid_.channels(), head * d, static_cast<const Bf16*>(nullptr), grad);
    transpose(grad, grad_t);
    interleave(grad, grad2);
    interleave(q, q2);
    interleave(k, k2);
  }

  void load_values() { interleave(v, v2); }

  // Computes the logits of the queries [first, first + count), (n, QUERIES), in base 2, and the row_max of each query.
  void logits(int64_t head, int64_t first, int64_t count, float* p, float* row_max) const {
    const LogitsEpilogue epilogue =
        logits_epilogue(head, first, p, row_max, query_scale + first, cosines() ? key_scale : nullptr);
    gemm_with(k, ds / 2, 1, qt + first, ns, n, padded(count), ds / 2, epilogue);
  }

  // Converts g (n, ds), the gradient of the scaled (with cosines: and normalized) queries or keys x, to the gradient of
  // the inputs, in place. Returns the sum of gradient . x, which for the queries is the gradient of the logarithm of
  // the logit scale.
  float scale_backward(bool keys, float* g) {
    const Pair* x = keys ? k : q;
    const float factor = keys ? 1.0f : scale, *scales = keys ? key_scale : query_scale;
    const float* norm = norms_.data() + keys * ns;
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
      float along = hsum(dot) * scales[t];
      total += along;
      if (!(norm[t] > TINY)) along = 0;
      for (int64_t i = 0; i < ds; i += LANES)
        store(g + i, (load(g + i) - load(row + i) * (scales[t] * along / (factor * factor))) * scales[t]);
    }
    return total;
  }

  bool cosines() const { return grid_.logit_scale != nullptr; }

 private:
  void load_rows(const Bf16* source, int64_t width, int64_t column, const Bf16* outside, Pair* out) const {
    for (int64_t t = 0; t < n; ++t, out += ds / 2) {
      const Bf16* from = row(source, t, width, column, outside);
      prefetch_next(source, from, t, width, column);
      for (int64_t i = 0; i < d; i += 32) {
        const __mmask32 lanes = d - i >= 32 ? ~0u : (1u << (d - i)) - 1;
        _mm512_store_si512(out + i / 2, from ? _mm512_maskz_loadu_epi16(lanes, from + i) : __m512i{});
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
      for (int64_t i = 0; i < ds / 2; i += 16) {
        __m512i r[16];
        for (int64_t m = 0; m < 16; ++m) r[m] = _mm512_loadu_si512(in + (t + m) * ds / 2 + i);
        transpose16(r);
        for (int64_t m = 0; m < 16; ++m) _mm512_storeu_si512(out + (i + m) * ns + t, r[m]);
      }
  }

  // out (ns / 2, ds): pairs of an even row's element and the one below it.
  void interleave(const Pair* in, Pair* out) const {
    alignas(64) static const uint16_t order[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
         11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58,
         27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    for (int64_t t = 0; t < n; t += 2, in += ds, out += ds)
      for (int64_t i = 0; i < ds; i += 32) {
        const __m512i above = _mm512_load_si512(in + i / 2), below = _mm512_load_si512(in + ds / 2 + i / 2);
        for (int64_t h = 0; h < 2; ++h)
          _mm512_store_si512(
              out + i + h * 16, _mm512_maskz_permutex2var_epi16(~0u, above, _mm512_load_si512(order[h]), below));
      }
  }

 public:
  const int64_t ds;
  float scale;                                // of the queries
  float *query_scale, *key_scale;             // (ns,): scales of the logits; key_scale only with a logit scale
  Pair *q, *k, *v, *grad;                     // (ns, ds / 2): rows as loaded
  Pair *q2, *k2, *v2, *grad2;                 // (ns / 2, ds): interleaved
  Pair *qt, *grad_t;                          // (ds / 2, ns): transposed

 private:
  Aligned<float> scales_, norms_;             // (2, ns): of queries and keys
  Aligned<Pair> pairs_;
};

template <>
void window_attention_tasks<Bf16>(
    const WindowGrid* grid, const Bf16* qkv, const Bf16* pad, Bf16* out, const WindowTasks* tasks, int64_t begin,
    int64_t end) {
  WindowPairs w(*grid, qkv, pad);
  const int64_t n = w.n, d = w.d, ds = w.ds;
  Aligned<float> floats(n * QUERIES + QUERIES * ds);
  Aligned<Pair> pairs((n + 1) / 2 * QUERIES);
  float *p = floats.data(), *o = p + n * QUERIES;
  Pair* p2 = pairs.data();
  alignas(64) float row_max[QUERIES], inverse_sum[QUERIES];
  w.for_each(*tasks, begin, end, [&](int64_t, int64_t head) SGMIM_INLINE_LAMBDA {
    w.load_head(head);
    w.load_values();
    for (int64_t first = 0; first < n; first += QUERIES) {
      const int64_t count = n - first < QUERIES ? n - first : QUERIES;
      w.logits(head, first, count, p, row_max);
      by_three_vectors(count, [&](auto vectors, int64_t c) SGMIM_INLINE_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        vf max[V], sum[V] = {};
        for (int v = 0; v < V; ++v) max[v] = load(row_max + c + v * LANES);
        for (int64_t j = 0; j < n; j += 2)
          for (int v = 0; v < V; ++v) {
            const float* at = p + j * QUERIES + c + v * LANES;
            const vf low = coarse_exp(load(at) - max[v]);
            const vf high = j + 1 < n ? coarse_exp(load(at + QUERIES) - max[v]) : vf{};
            sum[v] += low + high;
            _mm512_store_si512(p2 + j / 2 * QUERIES + c + v * LANES, pairs_of(low, high));
          }
        for (int v = 0; v < V; ++v) store(inverse_sum + c + v * LANES, 1.0f / sum[v]);
      });
      gemm<false>(p2, 1, QUERIES, w.v2, ds, o, ds, count, ds, (n + 1) / 2);
      write_results(o, inverse_sum, w.rows.data() + first, count, ds, d, grid->channels(), out + head * d);
    }
  });
}

template <>
void window_attention_backward_tasks<Bf16>(
    const WindowGrid* grid, const Bf16* qkv, const Bf16* pad, const Bf16* dout, Bf16* dqkv, Bf16*,
    const WindowSums* sums, const WindowTasks* tasks, int64_t begin, int64_t end) {
  WindowPairs w(*grid, qkv, pad);
  const int64_t n = w.n, ns = w.ns, d = w.d, ds = w.ds, width = grid->channels(), two = (n + 1) / 2;
  Aligned<float> floats(2 * n * QUERIES + 3 * n * ds);
  Aligned<Pair> pairs((2 * n + 2 * two) / 2 * QUERIES);
  float *p = floats.data(), *dp = p + n * QUERIES, *dq = dp + n * QUERIES, *dk = dq + n * ds, *dv = dk + n * ds;
  Pair *ds2 = pairs.data(), *pt = ds2 + two * QUERIES, *dst = pt + n * QUERIES / 2;
  alignas(64) float row_max[QUERIES];
  w.for_each(*tasks, begin, end, [&](int64_t task, int64_t head) SGMIM_INLINE_LAMBDA {
    const WindowSums& mine = sums[tasks->block(task)];
    w.load_head(head);
    w.load_grad(head, dout);
    for (int64_t first = 0; first < n; first += QUERIES) {
      const int64_t count = n - first < QUERIES ? n - first : QUERIES, halved = (count + 1) / 2;
      const int64_t row = grid->bias_row(first);
      w.prefetch_gradients(dqkv, head, first, count);
      w.logits(head, first, count, p, row_max);
      gemm<false>(w.v, ds / 2, 1, w.grad_t + first, ns, dp, QUERIES, n, padded(count), ds / 2);
      by_three_vectors(count, [&](auto vectors, int64_t c) SGMIM_INLINE_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        vf delta[V], inverse_sum[V], query_scale[V];
        softmax_and_delta<Coarse>(p + c, dp + c, row_max + c, n, inverse_sum, delta);
        for (int v = 0; v < V; ++v) query_scale[v] = load(w.query_scale + first + c + v * LANES);
        float* dbias = mine.bias ? mine.bias + grid->bias_at(head, first, 0) + c : nullptr;
        for (int64_t j = 0; j < n; j += 2)
          for (int v = 0; v < V; ++v) {
            vf change[2] = {};
            for (int64_t h = 0; h < 2 && j + h < n; ++h) {
              const int64_t at = (j + h) * QUERIES + c + v * LANES;
              const vf x = load(p + at) * inverse_sum[v], dx = x * (load(dp + at) - delta[v]);
              store(reinterpret_cast<Bf16*>(pt) + at, x);
              store(reinterpret_cast<Bf16*>(dst) + at, dx * query_scale[v]);
              if (dbias) {
                float* to = dbias + (j + h) * row + v * LANES;
                store(to, load(to) + dx);
              }
              change[h] = w.cosines() ? dx * w.key_scale[j + h] : dx;
            }
            _mm512_store_si512(ds2 + j / 2 * QUERIES + c + v * LANES, pairs_of(change[0], change[1]));
          }
      });
      const auto sum = first > 0 ? &gemm_of_head<true, Pair> : &gemm_of_head<false, Pair>;
      sum(pt, QUERIES / 2, w.grad2 + first / 2 * ds, ds, dv, n, halved);
      sum(dst, QUERIES / 2, w.q2 + first / 2 * ds, ds, dk, n, halved);
      gemm<false>(ds2, 1, QUERIES, w.k2, ds, dq + first * ds, ds, count, ds, two);
    }
    const float along = w.scale_backward(false, dq);
    if (mine.logit_scale) mine.logit_scale[head] += along;
    w.scale_backward(true, dk);
    write_gradients(dq, dk, dv, w.rows, d, ds, head * d, width, dqkv, mine);
  });
}

}  // namespace SGMIM_ISA
}  // namespace sgmim
