// A vector of float or double lanes with the operators that rules use. Only kernels_*.cpp include this, each compiled for
// one instruction set; everything has internal linkage (see core/macros.h for why).
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

#define TRAINOPT_OPERATOR(op) \
  template <class S>          \
  TRAINOPT_FUNCTION Vec<S> operator op(Vec<S> a, Vec<S> b) { return a.lanes op b.lanes; }
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

// x moved towards 0 by `threshold`, and to exactly 0 if it is nearer than that; NaN stays NaN.
template <class S>
TRAINOPT_FUNCTION Vec<S> soft_threshold(Vec<S> x, Vec<S> threshold) {
  const Vec<S> low = -threshold;
  const Vec<S> capped = x.lanes > threshold.lanes ? threshold.lanes : (x.lanes < low.lanes ? low.lanes : x.lanes);
  return x - capped;
}

}  // namespace
}  // namespace trainopt::cpu
