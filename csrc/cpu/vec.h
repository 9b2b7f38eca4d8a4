// A vector of float or double lanes with the operators that rules use. Only kernels_*.cpp include this, each compiled
// for one instruction set; everything has internal linkage (see core/macros.h for why).
//
// The compiler's vector types give + - * / and comparisons on every instruction set; no operation is contracted into a
// fused multiply-add, so every width gives the same bits, lane by lane.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/dtype.h"
#include "core/lanes.h"
#include "core/macros.h"

namespace trainopt::cpu {
namespace {

#if defined(__AVX512F__)
#define TRAINOPT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TRAINOPT_VECTOR_BYTES 32
#else
#define TRAINOPT_VECTOR_BYTES 16
#endif

typedef float FloatLanes __attribute__((vector_size(TRAINOPT_VECTOR_BYTES)));
typedef double DoubleLanes __attribute__((vector_size(TRAINOPT_VECTOR_BYTES)));

template <class S>
struct LanesOf;
template <>
struct LanesOf<float> {
  using type = FloatLanes;
};
template <>
struct LanesOf<double> {
  using type = DoubleLanes;
};

template <class S>
struct Vec {
  using Lanes = typename LanesOf<S>::type;
  static constexpr int kSize = TRAINOPT_VECTOR_BYTES / sizeof(S);
  Lanes lanes;

  Vec() = default;
  TRAINOPT_INLINE Vec(Lanes l) : lanes(l) {}
  TRAINOPT_INLINE explicit Vec(S s) : lanes(s - Lanes{}) {}  // s - 0 is s, -0 included
};

#define TRAINOPT_OPERATOR(op)                                \
  template <class S>                                         \
  TRAINOPT_FUNCTION Vec<S> operator op(Vec<S> a, Vec<S> b) { \
    return a.lanes op b.lanes;                               \
  }
TRAINOPT_OPERATOR(+)
TRAINOPT_OPERATOR(-)
TRAINOPT_OPERATOR(*)
TRAINOPT_OPERATOR(/)
#undef TRAINOPT_OPERATOR

template <class S>
TRAINOPT_FUNCTION Vec<S> operator-(Vec<S> a) {
  return -a.lanes;
}

TRAINOPT_FUNCTION FloatLanes root_of(FloatLanes x) {
#if defined(__AVX512F__)
  return (FloatLanes)_mm512_maskz_sqrt_ps(-1, (__m512)x);
#elif defined(__AVX2__)
  return (FloatLanes)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (FloatLanes)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (FloatLanes)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < Vec<float>::kSize; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

TRAINOPT_FUNCTION DoubleLanes root_of(DoubleLanes x) {
#if defined(__AVX512F__)
  return (DoubleLanes)_mm512_maskz_sqrt_pd(-1, (__m512d)x);
#elif defined(__AVX2__)
  return (DoubleLanes)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  return (DoubleLanes)_mm_sqrt_pd((__m128d)x);
#elif defined(__aarch64__)
  return (DoubleLanes)vsqrtq_f64((float64x2_t)x);
#else
  for (int i = 0; i < Vec<double>::kSize; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

template <class S>
TRAINOPT_FUNCTION Vec<S> square_root(Vec<S> x) {
  return root_of(x.lanes);
}

// The larger of two; NaN if either is.
template <class S>
TRAINOPT_FUNCTION Vec<S> maximum(Vec<S> a, Vec<S> b) {
  return ((b.lanes > a.lanes) | (b.lanes != b.lanes)) ? b.lanes : a.lanes;
}

// 1, -1 or 0 with the sign of x; 0 for NaN, as torch.sign gives for it times zero decay (the NaN is in x already).
template <class S>
TRAINOPT_FUNCTION Vec<S> sign_of(Vec<S> x) {
  const Vec<S> zero(S(0)), one(S(1)), minus_one(S(-1));
  return x.lanes > zero.lanes ? one.lanes : (x.lanes < zero.lanes ? minus_one.lanes : zero.lanes);
}

// Likewise, but NaN for NaN.
template <class S>
TRAINOPT_FUNCTION Vec<S> sign_or_nan(Vec<S> x) {
  return x.lanes != x.lanes ? x.lanes : sign_of(x).lanes;
}

// Whether every lane is from low to high; not if one is NaN.
TRAINOPT_FUNCTION bool all_in(Vec<float> x, float low, float high) {
  const auto inside = (x.lanes >= Vec<float>(low).lanes) & (x.lanes <= Vec<float>(high).lanes);
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)inside) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)inside) == 0xff;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)inside) == 0xf;
#else
  bool all = true;
  for (int i = 0; i < Vec<float>::kSize; ++i) all = all && inside[i] != 0;
  return all;
#endif
}

// `value` where a * b >= 0, as it is in exact arithmetic; else 0.
template <class S>
TRAINOPT_FUNCTION Vec<S> where_signs_agree(Vec<S> a, Vec<S> b, Vec<S> value) {
  const Vec<S> zero(S(0));
  const auto differ =
      ((a.lanes > zero.lanes) & (b.lanes < zero.lanes)) | ((a.lanes < zero.lanes) & (b.lanes > zero.lanes));
  return differ ? zero.lanes : value.lanes;
}

// `value` where a * b > 0, as it is in exact arithmetic; else 0.
template <class S>
TRAINOPT_FUNCTION Vec<S> where_same_sign(Vec<S> a, Vec<S> b, Vec<S> value) {
  const Vec<S> zero(S(0));
  const auto same =
      ((a.lanes > zero.lanes) & (b.lanes > zero.lanes)) | ((a.lanes < zero.lanes) & (b.lanes < zero.lanes));
  return same ? value.lanes : zero.lanes;
}

// x moved towards 0 by `threshold`, and to exactly 0 if it is nearer than that; NaN stays NaN.
template <class S>
TRAINOPT_FUNCTION Vec<S> soft_threshold(Vec<S> x, Vec<S> threshold) {
  const Vec<S> low = -threshold;
  const Vec<S> capped = x.lanes > threshold.lanes ? threshold.lanes : (x.lanes < low.lanes ? low.lanes : x.lanes);
  return x - capped;
}

// Loads and stores of one vector of elements, from and to each type that tensors are stored in.

template <class S>
TRAINOPT_FUNCTION Vec<S> load(const S* from) {
  Vec<S> v;
  __builtin_memcpy(&v.lanes, from, sizeof v.lanes);
  return v;
}

template <class S>
TRAINOPT_FUNCTION void store(S* to, Vec<S> v) {
  __builtin_memcpy(to, &v.lanes, sizeof v.lanes);
}

// Two vectors side by side. bfloat16 is worked on in these: from one register of 16-bit elements, those at even places
// are widened by a shift and those at odd places by a mask, which no shuffle is as cheap as; a rule does not mind the
// order.
struct Pair {
  static constexpr int kSize = 2 * Vec<float>::kSize;
  Vec<float> even, odd;

  Pair() = default;
  TRAINOPT_INLINE Pair(Vec<float> e, Vec<float> o) : even(e), odd(o) {}
  TRAINOPT_INLINE explicit Pair(float s) : even(s), odd(s) {}
};

#define TRAINOPT_OPERATOR(op) \
  TRAINOPT_FUNCTION Pair operator op(Pair a, Pair b) { return {a.even op b.even, a.odd op b.odd}; }
TRAINOPT_OPERATOR(+)
TRAINOPT_OPERATOR(-)
TRAINOPT_OPERATOR(*)
TRAINOPT_OPERATOR(/)
#undef TRAINOPT_OPERATOR

TRAINOPT_FUNCTION Pair square_root(Pair x) { return {square_root(x.even), square_root(x.odd)}; }
TRAINOPT_FUNCTION Pair maximum(Pair a, Pair b) { return {maximum(a.even, b.even), maximum(a.odd, b.odd)}; }
TRAINOPT_FUNCTION Pair operator-(Pair x) { return {-x.even, -x.odd}; }
TRAINOPT_FUNCTION Pair sign_of(Pair x) { return {sign_of(x.even), sign_of(x.odd)}; }
TRAINOPT_FUNCTION Pair sign_or_nan(Pair x) { return {sign_or_nan(x.even), sign_or_nan(x.odd)}; }
TRAINOPT_FUNCTION Pair where_signs_agree(Pair a, Pair b, Pair value) {
  return {where_signs_agree(a.even, b.even, value.even), where_signs_agree(a.odd, b.odd, value.odd)};
}
TRAINOPT_FUNCTION Pair where_same_sign(Pair a, Pair b, Pair value) {
  return {where_same_sign(a.even, b.even, value.even), where_same_sign(a.odd, b.odd, value.odd)};
}
TRAINOPT_FUNCTION Pair soft_threshold(Pair x, Pair threshold) {
  return {soft_threshold(x.even, threshold.even), soft_threshold(x.odd, threshold.odd)};
}

typedef uint32_t WordLanes __attribute__((vector_size(TRAINOPT_VECTOR_BYTES)));
typedef int32_t IntLanes __attribute__((vector_size(TRAINOPT_VECTOR_BYTES)));

// The bits of a vector of floats: for what is written once for numbers and for vectors of them (core/lanes.h).
struct Words {
  WordLanes lanes;

  Words() = default;
  TRAINOPT_INLINE Words(WordLanes l) : lanes(l) {}
  TRAINOPT_INLINE explicit Words(uint32_t word) : lanes(word + WordLanes{}) {}
  TRAINOPT_INLINE Words operator~() const { return ~lanes; }
  TRAINOPT_INLINE Words operator<<(int count) const { return lanes << count; }
  TRAINOPT_INLINE Words operator>>(int count) const { return lanes >> count; }
};
#define TRAINOPT_OPERATOR(op)                                                          \
  TRAINOPT_FUNCTION Words operator op(Words a, Words b) { return a.lanes op b.lanes; } \
  TRAINOPT_FUNCTION Words operator op(Words a, uint32_t b) { return a.lanes op b; }
TRAINOPT_OPERATOR(+)
TRAINOPT_OPERATOR(-)
TRAINOPT_OPERATOR(&)
TRAINOPT_OPERATOR(|)
#undef TRAINOPT_OPERATOR

// The larger of two; b where either is NaN.
TRAINOPT_FUNCTION Vec<float> larger(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (FloatLanes)_mm512_maskz_max_ps(-1, (__m512)a.lanes, (__m512)b.lanes);
#elif defined(__AVX2__)
  return (FloatLanes)_mm256_max_ps((__m256)a.lanes, (__m256)b.lanes);
#elif defined(__SSE2__)
  return (FloatLanes)_mm_max_ps((__m128)a.lanes, (__m128)b.lanes);
#else
  return a.lanes > b.lanes ? a.lanes : b.lanes;
#endif
}
TRAINOPT_FUNCTION Vec<double> larger(Vec<double> a, Vec<double> b) { return a.lanes > b.lanes ? a.lanes : b.lanes; }

// Overloads of the functions for numbers, which stay visible here.
using trainopt::bits_of;
using trainopt::float_like;
using trainopt::float_of;
using trainopt::held_within;
using trainopt::larger;
using trainopt::mask_where_nan;
using trainopt::smaller;
using trainopt::where_larger;
using trainopt::where_not_0;
TRAINOPT_FUNCTION Words bits_of(Vec<float> x) { return (WordLanes)x.lanes; }
TRAINOPT_FUNCTION Vec<float> float_of(Words bits) { return (FloatLanes)bits.lanes; }
TRAINOPT_FUNCTION Vec<float> float_like(Words, float x) { return Vec<float>(x); }
TRAINOPT_FUNCTION Words where_not_0(Words that, Words x) { return that.lanes != 0u ? x.lanes : WordLanes{}; }
TRAINOPT_FUNCTION Words where_larger(Vec<float> that, float limit, Words x) {
  return that.lanes > Vec<float>(limit).lanes ? x.lanes : WordLanes{};
}
TRAINOPT_FUNCTION Words larger(Words a, Words b) {
  return (WordLanes)((IntLanes)a.lanes > (IntLanes)b.lanes ? (IntLanes)a.lanes : (IntLanes)b.lanes);
}
TRAINOPT_FUNCTION Words smaller(Words a, Words b) { return a.lanes < b.lanes ? a.lanes : b.lanes; }
TRAINOPT_FUNCTION Words mask_where_nan(Words bits) {
  return (WordLanes)((IntLanes)(bits.lanes & 0x7fffffffu) > 0x7f800000);
}
TRAINOPT_FUNCTION Vec<float> held_within(Vec<float> x, float least, float largest) {
  const Vec<float> low(least), high(largest);
  const FloatLanes capped = x.lanes < high.lanes ? x.lanes : high.lanes;
  return capped > low.lanes ? capped : low.lanes;
}

TRAINOPT_FUNCTION Pair load(const BFloat16* from) {
  WordLanes words;
  __builtin_memcpy(&words, from, sizeof words);
  return {(FloatLanes)(words << 16), (FloatLanes)(words & 0xffff0000u)};
}

// Rounds as to_bfloat16 does for everything but a NaN with bits in its lower half, which could carry out of the
// exponent. No such NaN arises from values that were loaded from bfloat16 and from the operations of a rule.
TRAINOPT_FUNCTION WordLanes round_to_upper_half(Vec<float> v) {
  const WordLanes bits = (WordLanes)v.lanes;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

TRAINOPT_FUNCTION void store(BFloat16* to, Pair v) {
  const WordLanes words = (round_to_upper_half(v.even) >> 16) | (round_to_upper_half(v.odd) & 0xffff0000u);
  __builtin_memcpy(to, &words, sizeof words);
}

TRAINOPT_FUNCTION Vec<float> load(const Float16* from) {
#if defined(__AVX512F__)
  return (FloatLanes)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (FloatLanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec<float> v;
  for (int i = 0; i < Vec<float>::kSize; ++i) v.lanes[i] = to_float(from[i]);
  return v;
#endif
}

TRAINOPT_FUNCTION void store(Float16* to, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(-1, (__m512)v.lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)v.lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < Vec<float>::kSize; ++i) to[i] = to_float16(v.lanes[i]);
#endif
}

// The whole vectors of a run whose conversion the processor has an instruction for, which no compiler makes of a loop
// over numbers: tiles of float16 took four times as long. Returns how many elements that is.
template <class Stored, class S>
TRAINOPT_FUNCTION int load_vectors(const Stored*, int, S*) {
  return 0;
}
template <class S, class Stored>
TRAINOPT_FUNCTION int store_vectors(const S*, int, Stored*) {
  return 0;
}
#if defined(__F16C__)
TRAINOPT_FUNCTION int load_vectors(const Float16* from, int count, float* out) {
  int i = 0;
  for (; i + Vec<float>::kSize <= count; i += Vec<float>::kSize) store(out + i, load(from + i));
  return i;
}
TRAINOPT_FUNCTION int store_vectors(const float* from, int count, Float16* out) {
  int i = 0;
  for (; i + Vec<float>::kSize <= count; i += Vec<float>::kSize) store(out + i, load(from + i));
  return i;
}
#endif

// What elements of a stored type are worked on in.
template <class Stored>
struct RegisterOf {
  using type = Vec<float>;
};
template <>
struct RegisterOf<double> {
  using type = Vec<double>;
};
template <>
struct RegisterOf<BFloat16> {
  using type = Pair;
};
template <class Stored>
using Register = typename RegisterOf<Stored>::type;

}  // namespace
}  // namespace trainopt::cpu
