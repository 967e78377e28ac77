// GELU and its derivative for a vector. Included once per instruction set, after vec.h.
//
// With cdf and pdf of the normal distribution, GELU(x) = x cdf(x), and its derivative is cdf(x) + x pdf(x). For y = |x|
// let tail = cdf(-y) = e^(-y^2/2) R(y). R is a polynomial in 1 / (y + k) over 0 <= y <= 12.5, made for this file by a
// weighted least-squares fit of its relative error. Then GELU(x) = max(x, 0) - y tail. The derivative is tail - y pdf
// for x < 0 and 1 - (tail - y pdf) for x > 0. This has no cancellation in the tail, and needs one exponential.
namespace sgmim {
namespace SGMIM_ISA {

struct Gelu {
  vf value, derivative;
};

// The relative error of the tail before rounding is 1.5e-8 for float32 and 3e-4, a tenth of an ulp, for bfloat16.
template <class T>
SGMIM_INLINE Gelu gelu_at(vf x) {
  constexpr bool coarse = sizeof(T) == 2;
  const vf y = vmin(set1(12.5f), vabs(x));  // beyond, the tail is below 1e-35; in this order NaN stays NaN
  const vf power = y * y * -0.7213475204f;  // e^(-y^2/2) = 2^power
  const vf shifted = power + 12582912.0f;   // 1.5 * 2^23: the low mantissa bits are the rounded power
  const vf r = power - (shifted - 12582912.0f);
  vf e, ratio;
  if (coarse) {
    e = coarse_exp2(r);
    const vf s = rough_inverse(y + 2.0f);
    ratio = set1(-2.0119242668f) * s + 1.9618414640f;
    ratio = ratio * s + 0.7182267904f;
    ratio = ratio * s + 0.4016831517f;
    ratio *= s;
  } else {
    e = set1(0.0001534580224f) * r + 0.001339993090f;
    e = e * r + 0.009618489072f;
    e = e * r + 0.05550328642f;
    e = e * r + 0.2402264625f;
    e = e * r + 0.6931471825f;
    e = e * r + 1.0f;
    // A division, whose latency memory accesses hide. An approximate reciprocal would not do: t amplifies the error of
    // s too much near x = 0.
    const vf s = 1.0f / (y + 4.75f), t = (y - 4.75f) * s;
    ratio = set1(-0.001306835445575f) * t + 0.000225932846661f;
    ratio = ratio * t + 0.0115433027967811f;
    ratio = ratio * t + -0.0506286732852459f;
    ratio = ratio * t + 0.13810686767101f;
    ratio = ratio * t + -0.284183830022812f;
    ratio = ratio * t + 0.472064435482025f;
    ratio = ratio * t + -0.653589367866516f;
    ratio = ratio * t + 0.766416311264038f;
    ratio *= s;
  }
  e = (vf)((vi)e + ((vi)shifted << 23));
  Gelu result;
  result.value = vmax(set1(0.0f), x) - y * (e * ratio);
  const vf outer = e * (ratio - 0.3989422804f * y);
  result.derivative = x > 0.0f ? 1.0f - outer : outer;
  return result;
}

}  // namespace SGMIM_ISA
}  // namespace sgmim
