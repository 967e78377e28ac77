// N vectors, side by side. An operation applies to all of them before the next one follows: the instructions of one
// vector wait for each other, and a processor looks ahead too little to overlap whole vectors by itself.
//
// Included once per instruction set, after norm_row.h.
namespace sgmim {
namespace SGMIM_ISA {

template <int N>
struct Vectors {
  vf v[N];

  template <class F>
  static SGMIM_INLINE_LAMBDA inline Vectors each(const F& f) {
    Vectors result;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) result.v[i] = f(i);
    return result;
  }
};

#define SGMIM_VECTORS_OPERATOR(op)                                                        \
  template <int N>                                                                        \
  SGMIM_INLINE Vectors<N> operator op(const Vectors<N>& a, const Vectors<N>& b) {         \
    return Vectors<N>::each([&](int i) SGMIM_INLINE_LAMBDA { return a.v[i] op b.v[i]; }); \
  }                                                                                       \
  template <int N>                                                                        \
  SGMIM_INLINE Vectors<N> operator op(const Vectors<N>& a, float b) {                     \
    return Vectors<N>::each([&](int i) SGMIM_INLINE_LAMBDA { return a.v[i] op b; });      \
  }                                                                                       \
  template <int N>                                                                        \
  SGMIM_INLINE Vectors<N> operator op(float a, const Vectors<N>& b) {                     \
    return Vectors<N>::each([&](int i) SGMIM_INLINE_LAMBDA { return a op b.v[i]; });      \
  }
SGMIM_VECTORS_OPERATOR(+)
SGMIM_VECTORS_OPERATOR(-)
SGMIM_VECTORS_OPERATOR(*)
SGMIM_VECTORS_OPERATOR(/)
#undef SGMIM_VECTORS_OPERATOR

// Loads and stores of N consecutive vectors, each of n <= LANES elements (fewer only for N = 1).
template <class V, class T>
SGMIM_INLINE V load_vectors(const T* from, int64_t n) {
  return V::each([&](int i) SGMIM_INLINE_LAMBDA { return load_part(from + i * LANES, n); });
}

template <int N, class T>
SGMIM_INLINE void store_vectors(T* to, const Vectors<N>& from, int64_t n) {
  for (int i = 0; i < N; ++i) store_part(to + i * LANES, from.v[i], n);
}

}  // namespace SGMIM_ISA
}  // namespace sgmim
