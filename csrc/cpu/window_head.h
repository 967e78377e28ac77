// Parts of window_attention for one window and one head: the grid rows of its tokens, packed copies of its operands,
// its logits, and the writing of its results and gradients.
//
// Included once per instruction set, after vec.h and small_gemm.h.
namespace sgmim {
namespace SGMIM_ISA {

constexpr float TINY = 1e-12f;    // lower bound of a norm, the eps of torch.nn.functional.normalize
constexpr float APART = -100.0f;  // mask value for tokens that only the cyclic shift has made neighbours, as in timm

SGMIM_INLINE int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// Calls f(Number<3>, first) for every three vectors of columns, and f(Number<1 or 2>, first) for the remainder.
template <class F>
SGMIM_INLINE void by_three_vectors(int64_t columns, const F& f) {
  int64_t first = 0;
  for (; columns - first > 2 * LANES; first += 3 * LANES) f(Number<3>{}, first);
  if (columns - first > LANES)
    f(Number<2>{}, first);
  else if (columns > first)
    f(Number<1>{}, first);
}

// Epilogue of the logits' gemm, which computes them transposed, (keys, queries): logit = sum * scales + bias + mask, in
// base 2 (times log2(e), so that the softmax can use exp2). Stores the logits and updates each query's maximum.
struct LogitsEpilogue {
  float* p;                                          // (keys, QUERIES): the logits
  float* row_max;                                    // (QUERIES,): the largest logit of each query
  const float *query_scale, *key_scale;              // factors of the queries' and of the keys' logits; null: 1
  const float* bias;                                 // (keys, bias_row), times log2(e), or null
  int64_t bias_row;
  const float* mask;                                 // (4, ns): mask of each query for the keys of a group, or null
  const int64_t* group;                              // group of each key, see WindowGrid::locate
  int64_t ns;

  template <int ROWS, int VECTORS>
  __attribute__((always_inline)) void operator()(int64_t j, int64_t c, vf (&x)[ROWS][VECTORS]) const {
    for (int v = 0; v < VECTORS; ++v) {
      const vf scale = query_scale ? load(query_scale + c + v * LANES) * LOG2E : set1(LOG2E);
      for (int r = 0; r < ROWS; ++r) x[r][v] *= scale;
    }
    if (key_scale)
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) x[r][v] *= key_scale[j + r];
    if (bias)
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) x[r][v] += load(bias + (j + r) * bias_row + c + v * LANES);
    if (mask)
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) x[r][v] += load(mask + group[j + r] * ns + c + v * LANES);
    for (int v = 0; v < VECTORS; ++v) {
      vf max = load(row_max + c + v * LANES);
      for (int r = 0; r < ROWS; ++r) {
        store(p + (j + r) * QUERIES + c + v * LANES, x[r][v]);
        max = vmax(max, x[r][v]);
      }
      store(row_max + c + v * LANES, max);
    }
  }
};

struct Exact {
  SGMIM_INLINE vf of(vf x) { return exp2(x); }
};

// Softmax of V vectors of queries, which are columns of (n, QUERIES). Replaces the logits p by their exponentials, and
// computes 1 / row_sum and the mean of dp weighted by the softmax. Exponential::of(x) is 2^x.
template <class Exponential, int V>
SGMIM_INLINE void softmax_and_delta(
    float* p, const float* dp, const float* row_max, int64_t n, vf (&inverse_sum)[V], vf (&delta)[V]) {
  vf max[V], sum[V] = {};
  for (int v = 0; v < V; ++v) {
    max[v] = load(row_max + v * LANES);
    delta[v] = vf{};
  }
  for (int64_t j = 0; j < n; ++j)
    for (int v = 0; v < V; ++v) {
      const int64_t at = j * QUERIES + v * LANES;
      const vf e = Exponential::of(load(p + at) - max[v]);
      store(p + at, e);
      sum[v] += e;
      delta[v] += e * load(dp + at);
    }
  for (int v = 0; v < V; ++v) {
    inverse_sum[v] = 1.0f / sum[v];
    delta[v] *= inverse_sum[v];
  }
}

// Scatters the results of `count` queries, (count, ds), multiplied by 1 / row_sum if given, to their rows of the grid.
template <class T>
SGMIM_INLINE void write_results(
    const float* results, const float* inverse_sum, const int64_t* rows, int64_t count, int64_t ds, int64_t d,
    int64_t width, T* out) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < d && rows[r] >= 0; i += LANES)
      store_part(
          out + rows[r] * width + i, load(results + r * ds + i) * (inverse_sum ? inverse_sum[r] : 1.0f), part(i, d));
}

// C (rows, columns) (+)= A . B for row-major A; B and C have a row stride of `columns`. Not inlined, so that callers
// can choose between ADD and overwriting through a function pointer.
template <bool ADD, class U>
void gemm_of_head(const U* a, int64_t a_stride, const U* b, int64_t columns, float* c, int64_t rows, int64_t depth) {
  gemm<ADD>(a, a_stride, 1, b, columns, c, columns, rows, columns, depth);
}

// Adds the first `count` elements of x to `sums`.
SGMIM_INLINE void add_in_double(vf x, int64_t count, double* sums) {
  float of[LANES];
  store(of, x);
  if (count == LANES)  // a constant trip count, which the compiler vectorizes
    for (int64_t l = 0; l < LANES; ++l) sums[l] += of[l];
  else
    for (int64_t l = 0; l < count; ++l) sums[l] += of[l];
}

// Scatters the gradients of a head's queries, keys and values, (n, ds) each, to the grid, and adds them to the sums of
// the qkv bias and of the padding row. As in `column_sums`, 16 rows at a time are summed in float, then in double.
template <class T>
void write_gradients(
    const float* dq, const float* dk, const float* dv, const std::vector<int64_t>& rows, int64_t d, int64_t ds,
    int64_t column, int64_t width, T* dqkv, const WindowSums& sums) {
  const int64_t n = rows.size();
  for (int64_t first = 0; first < n; first += 16) {
    const int64_t last = n < first + 16 ? n : first + 16;
    for (int64_t i = 0; i < d; i += LANES) {
      const int64_t count = part(i, d);
      vf of_q = {}, of_k = {}, of_v = {};
      for (int64_t t = first; t < last; ++t) {
        const vf q = load(dq + t * ds + i), k = load(dk + t * ds + i), v = load(dv + t * ds + i);
        of_q += q;
        of_k += k;
        of_v += v;
        if (rows[t] >= 0) {
          T* to = dqkv + rows[t] * 3 * width + column + i;
          store_part(to, q, count);
          store_part(to + width, k, count);
          store_part(to + 2 * width, v, count);
        } else if (sums.pad) {  // no gradient for its query: the result of a padding token is discarded
          float* to = sums.pad + width + column + i;
          store_part(to, load_part(to, count) + k, count);
          store_part(to + width, load_part(to + width, count) + v, count);
        }
      }
      if (!sums.qkv) continue;
      double* to = sums.qkv + column + i;
      add_in_double(of_q, count, to);
      add_in_double(of_k, count, to + width);
      add_in_double(of_v, count, to + 2 * width);
    }
  }
}

// Iterates over windows and heads. Holds the grid row of each token of the current window and its shift mask, and
// prefetches the rows of the next head.
template <class T>
class WindowTokens {
 public:
  WindowTokens(const WindowGrid& grid, const T* qkv, const T* pad)
      : n(grid.tokens()), ns(grid.padded_tokens), d(grid.head_width), rows(n), grid_(grid), qkv_(qkv), pad_(pad),
        group_(n), next_rows_(n), next_group_(n), mask_(4 * ns) {}

  // Calls work(task, head) for every window and head of the tasks [begin, end).
  template <class F>
  void for_each(const WindowTasks& tasks, int64_t begin, int64_t end, const F& work) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = tasks.first_head(task), last = tasks.last_head(task);
      for (int64_t window = tasks.first_window(task); window < tasks.last_window(task); ++window) {
        masked_ = grid_.locate(window, rows.data(), group_.data());
        for (int64_t g = 0; g < 4 && masked_; ++g)
          for (int64_t t = 0; t < n; ++t) mask_.data()[g * ns + t] = group_[t] == g ? 0.0f : APART * LOG2E;
        for (int64_t head = first; head < last; ++head) {
          head_ = head;
          next_ = rows.data();
          next_head_ = head + 1;
          if (next_head_ == last) {
            const bool more = window + 1 < tasks.last_window(task);
            const int64_t of = more ? task : task + 1;
            next_ = of < end ? next_rows_.data() : nullptr;
            if (next_) grid_.locate(more ? window + 1 : tasks.first_window(of), next_rows_.data(), next_group_.data());
            if (next_) next_head_ = tasks.first_head(of);
          }
          work(task, head);
        }
      }
    }
  }

  // Prefetches the cache lines of dqkv to which the gradients of the tokens [first, first + count) will be written.
  void prefetch_gradients(const T* dqkv, int64_t head, int64_t first, int64_t count) const {
    for (int64_t t = first; t < first + count; ++t)
      for (int64_t part = 0; part < 3 && rows[t] >= 0; ++part)
        for (int64_t i = 0; i < d; i += 64 / sizeof(T))
          __builtin_prefetch(dqkv + (rows[t] * 3 + part) * grid_.channels() + head * d + i, 1);
  }

  const int64_t n, ns, d;     // tokens of a window, n padded to whole vectors, width of a head
  std::vector<int64_t> rows;  // (n,): row of each token in the grid, -1 for a token of the padding

 protected:
  // Returns a pointer to the token's row of `source` at `column`; to that of `outside` if the token is padding, or null
  // if there is no such row either, which means zeros.
  const T* row(const T* source, int64_t t, int64_t width, int64_t column, const T* outside) const {
    return rows[t] >= 0 ? source + rows[t] * width + column : outside ? outside + column : nullptr;
  }

  // Prefetches the next head's part of a token whose current part was loaded from `from`. These lines are pages apart,
  // a pattern that hardware prefetchers do not predict. They go into L2; only for the adjacent head of the same window,
  // and where a window has at most QUERIES tokens and leaves room, they go into L1.
  SGMIM_INLINE_LAMBDA void prefetch_next(
      const T* source, const T* from, int64_t t, int64_t width, int64_t column) const {
    if (n <= QUERIES && next_ == rows.data()) {
      for (int64_t i = 0; i < d && from; i += 64 / sizeof(T)) __builtin_prefetch(from + d + i);
    } else if (next_ && next_[t] >= 0) {
      const T* next = source + next_[t] * width + column + (next_head_ - head_) * d;
      for (int64_t i = 0; i < d; i += 64 / sizeof(T)) __builtin_prefetch(next + i, 0, 2);
    }
  }

  LogitsEpilogue logits_epilogue(
      int64_t head, int64_t first, float* p, float* row_max, const float* query_scale, const float* key_scale) const {
    std::fill_n(row_max, QUERIES, -__builtin_inff());
    const float* bias = grid_.bias ? grid_.bias + grid_.bias_at(head, first, 0) : nullptr;
    const float* mask = masked_ ? mask_.data() + first : nullptr;
    return {p, row_max, query_scale, key_scale, bias, grid_.bias_row(first), mask, group_.data(), ns};
  }

  const WindowGrid& grid_;
  const T *qkv_, *pad_;

 private:
  bool masked_ = false;
  std::vector<int64_t> group_, next_rows_, next_group_;  // (n,)
  const int64_t* next_ = nullptr;                        // grid rows that the next head reads, or null
  int64_t head_ = 0, next_head_ = 0;
  Aligned<float> mask_;                                  // (4, ns): mask of each query for the keys of a group
};

// Float copies of the operands of one window and head, with rows padded with zeros to whole vectors.
template <class T>
class WindowHead : public WindowTokens<T> {
 public:
  using WindowTokens<T>::n, WindowTokens<T>::ns, WindowTokens<T>::d;

  WindowHead(const WindowGrid& grid, const T* qkv, const T* pad)
      : WindowTokens<T>(grid, qkv, pad), ds(padded(d)), norms_(2 * n), floats_(4 * n * ds + 2 * d * ns) {
    q = floats_.data();
    k = q + n * ds;
    v = k + n * ds;
    grad = v + n * ds;
    qt = grad + n * ds;
    grad_t = qt + d * ns;
  }

  // Loads queries, keys and values of a head, scales the queries and, with a logit scale, normalizes queries and keys.
  void load_head(int64_t head) {
    const int64_t width = grid_.channels();
    scale = grid_.logit_scale ? grid_.logit_scale[head] : 1.0f / __builtin_sqrtf(d);
    load_rows(qkv_, 3 * width, head * d, pad_, q);
    load_rows(qkv_, 3 * width, width + head * d, pad_, k);
    load_rows(qkv_, 3 * width, 2 * width + head * d, pad_, v);
    if (grid_.logit_scale) {
      normalize(q, scale, norms_.data());
      normalize(k, 1.0f, norms_.data() + n);
    } else {
      for (int64_t i = 0; i < n * ds; i += LANES) store(q + i, load(q + i) * scale);
    }
    transpose(q, qt);
  }

  // Loads the gradient of the result, 0 for padding tokens.
  void load_grad(int64_t head, const T* dout) {
    load_rows(dout, grid_.channels(), head * d, static_cast<const T*>(nullptr), grad);
    transpose(grad, grad_t);
  }

  // Computes the logits of the queries [first, first + count), (n, QUERIES), in base 2, and the row_max of each query.
  void logits(int64_t head, int64_t first, int64_t count, float* p, float* row_max) const {
    const LogitsEpilogue epilogue = this->logits_epilogue(head, first, p, row_max, nullptr, nullptr);
    gemm_with(k, ds, 1, qt + first, ns, n, padded(count), d, epilogue);
  }

  // Backward of `normalize`, in place: g is the gradient of x = factor * input / |input| and becomes that of the input.
  // Without a logit scale g is only multiplied by `factor`. Returns the sum of g . x over the tokens, which for the
  // queries is the gradient of the logarithm of the logit scale.
  float normalize_backward(const float* x, const float* norms, float factor, float* g, int64_t count) const {
    float total = 0;
    for (int64_t t = 0; t < count; ++t, x += ds, g += ds) {
      float along = 0, inverse = 1.0f;
      if (grid_.logit_scale) {
        vf dot = {};
        for (int64_t i = 0; i < ds; i += LANES) dot += load(x + i) * load(g + i);
        total += along = hsum(dot);
        inverse = 1.0f / (norms[t] > TINY ? norms[t] : TINY);
        if (!(norms[t] > TINY)) along = 0;
      }
      for (int64_t i = 0; i < ds; i += LANES)
        store(g + i, (load(g + i) * factor - load(x + i) * (along / factor)) * inverse);
    }
    return total;
  }

  const float* norms(bool of_keys) const { return norms_.data() + of_keys * n; }

 private:
  using WindowTokens<T>::grid_, WindowTokens<T>::qkv_, WindowTokens<T>::pad_;

  // Gathers columns [column, column + d) of the tokens' rows of `source`, (*, width); padding tokens read `outside`.
  void load_rows(const T* source, int64_t width, int64_t column, const T* outside, float* out) const {
    for (int64_t t = 0; t < n; ++t, out += ds) {
      const T* from = this->row(source, t, width, column, outside);
      this->prefetch_next(source, from, t, width, column);
      for (int64_t i = 0; i < ds; i += LANES) store(out + i, from ? load_part(from + i, part(i, d)) : vf{});
    }
  }

  void normalize(float* x, float factor, float* norms) const {
    for (int64_t t = 0; t < n; ++t, x += ds) {
      vf squares = {};
      for (int64_t i = 0; i < ds; i += LANES) squares += load(x + i) * load(x + i);
      norms[t] = __builtin_sqrtf(hsum(squares));
      const float multiplier = factor / (norms[t] > TINY ? norms[t] : TINY);
      for (int64_t i = 0; i < ds; i += LANES) store(x + i, load(x + i) * multiplier);
    }
  }

  // out (d, ns) = source (n, ds)^T
  void transpose(const float* source, float* out) const {
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) {
      const float* from = source + t * ds;
      int64_t i = 0;
      for (; i + 4 <= d; i += 4) transpose4(from + i, ds, out + i * ns + t, ns);
      for (; i < d; ++i)
        for (int64_t r = 0; r < 4; ++r) out[i * ns + t + r] = from[r * ds + i];
    }
    for (; t < n; ++t)
      for (int64_t i = 0; i < d; ++i) out[i * ns + t] = source[t * ds + i];
  }

 public:
  const int64_t ds;                    // d padded to whole vectors
  float scale;                         // of the queries
  float *q, *k, *v, *grad;             // (n, ds)
  float *qt, *grad_t;                  // (d, ns): transposed

 private:
  std::vector<float> norms_;           // (2, n): norms of queries and keys
  Aligned<float> floats_;              // storage of the matrices
};

}  // namespace SGMIM_ISA
}  // namespace sgmim
