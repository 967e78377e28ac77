// GELU and its derivative. Included once per instruction set, after vectors.h.
//
// With cdf and pdf of the normal distribution, GELU(x) = x cdf(x), and its derivative is cdf(x) + x pdf(x). For y = |x|
// let tail = cdf(-y) = e^(-y^2/2) R(y). R is a polynomial in 1 / (y + k) over 0 <= y <= 12.5, made for this file by a
// weighted least-squares fit of its relative error. Then GELU(x) = max(x, 0) - y tail. The derivative is tail - y pdf
// for x < 0 and 1 - (tail - y pdf) for x > 0. This has no cancellation in the tail, and needs one exponential.
namespace sgmim {
namespace SGMIM_ISA {

template <int N>
struct Gelu {
  Vectors<N> value, derivative;
};

// The relative error of the tail before rounding is 1.5e-8 for float32 and 3e-4, a tenth of an ulp, for bfloat16.
template <class T, int N>
SGMIM_INLINE Gelu<N> gelu_at(const Vectors<N>& x) {
  using V = Vectors<N>;
  constexpr bool coarse = sizeof(T) == 2;
  // Beyond 12.5, the tail is below 1e-35. In this order of vmin's arguments NaN stays NaN.
  const V y = V::each([&](int i) SGMIM_INLINE_LAMBDA { return vmin(set1(12.5f), vabs(x.v[i])); });
  const V power = y * y * -0.7213475204f;  // e^(-y^2/2) = 2^power
  const V shifted = power + 12582912.0f;   // 1.5 * 2^23: the low mantissa bits are the rounded power
  const V r = power - (shifted - 12582912.0f);
  V e, ratio;
  if (coarse) {
    e = V::each([&](int i) SGMIM_INLINE_LAMBDA { return coarse_exp2(r.v[i]); });
    const V far = y + 2.0f, s = V::each([&](int i) SGMIM_INLINE_LAMBDA { return rough_inverse(far.v[i]); });
    ratio = -2.0119242668f * s + 1.9618414640f;
    ratio = ratio * s + 0.7182267904f;
    ratio = ratio * s + 0.4016831517f;
    ratio = ratio * s;
  } else {
    e = 0.0001534580224f * r + 0.001339993090f;
    e = e * r + 0.009618489072f;
    e = e * r + 0.05550328642f;
    e = e * r + 0.2402264625f;
    e = e * r + 0.6931471825f;
    e = e * r + 1.0f;
    // A division, whose latency memory accesses hide. An approximate reciprocal would not do: t amplifies the error of
    // s too much near x = 0.
    const V s = 1.0f / (y + 4.75f), t = (y - 4.75f) * s;
    ratio = -0.001306835445575f * t + 0.000225932846661f;
    ratio = ratio * t + 0.0115433027967811f;
    ratio = ratio * t + -0.0506286732852459f;
    ratio = ratio * t + 0.13810686767101f;
    ratio = ratio * t + -0.284183830022812f;
    ratio = ratio * t + 0.472064435482025f;
    ratio = ratio * t + -0.653589367866516f;
    ratio = ratio * t + 0.766416311264038f;
    ratio = ratio * s;
  }
  e = V::each([&](int i) SGMIM_INLINE_LAMBDA { return (vf)((vi)e.v[i] + ((vi)shifted.v[i] << 23)); });
  const V positive = V::each([&](int i) SGMIM_INLINE_LAMBDA { return vmax(set1(0.0f), x.v[i]); });
  const V outer = e * (ratio - 0.3989422804f * y);
  return {
      positive - y * (e * ratio),
      V::each([&](int i) SGMIM_INLINE_LAMBDA { return x.v[i] > 0.0f ? 1.0f - outer.v[i] : outer.v[i]; })};
}

}  // namespace SGMIM_ISA
}  // namespace sgmim
