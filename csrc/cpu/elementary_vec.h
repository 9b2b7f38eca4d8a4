// What core/elementary.h needs of a vector.
#pragma once

#include <type_traits>

#include "core/elementary.h"
#include "cpu/vec.h"

namespace trainopt::cpu {
namespace {

template <class S>
TRAINOPT_FUNCTION Vec<S> select_less(Vec<S> a, Vec<S> b, Vec<S> if_so, Vec<S> if_not) {
  return a.lanes < b.lanes ? if_so.lanes : if_not.lanes;
}

TRAINOPT_FUNCTION Vec<float> at_least(Vec<float> x, Vec<float> low) { return larger(low, x); }

// One number at a time, by the C library.
TRAINOPT_FUNCTION Vec<float> multiply_add_by_lane(Vec<float> a, Vec<float> b, Vec<float> c) {
  for (int i = 0; i < Vec<float>::kSize; ++i) a.lanes[i] = __builtin_fmaf(a.lanes[i], b.lanes[i], c.lanes[i]);
  return a;
}

#if defined(__SSE2__) && !defined(__AVX2__)
// For processors that have no such instruction, where the C library's takes a hundred times as long as a product and a
// sum. The product is exact in double. The sum there is rounded, and then once more: that is as good as rounding once,
// unless the first rounding ends half way between two floats. There, and where floats have fewer digits, the C library
// answers; both are rare.
TRAINOPT_FUNCTION Vec<float> multiply_add_in_double(Vec<float> a, Vec<float> b, Vec<float> c) {
  const auto upper = [](Vec<float> v) { return _mm_cvtps_pd(_mm_movehl_ps((__m128)v.lanes, (__m128)v.lanes)); };
  const auto lower = [](Vec<float> v) { return _mm_cvtps_pd((__m128)v.lanes); };
  const __m128d low_sum = lower(a) * lower(b) + lower(c), high_sum = upper(a) * upper(b) + upper(c);
  const __m128 sum = _mm_movelh_ps(_mm_cvtpd_ps(low_sum), _mm_cvtpd_ps(high_sum));
  const WordLanes words = (WordLanes)_mm_shuffle_ps((__m128)low_sum, (__m128)high_sum, _MM_SHUFFLE(2, 0, 2, 0));
  const auto is_half_way = (words & 0x1fffffffu) == 0x10000000u;
  const auto is_subnormal = (((WordLanes)sum & 0x7f800000u) == 0) & ((FloatLanes)sum != 0);
  if (__builtin_expect(_mm_movemask_ps((__m128)(is_half_way | is_subnormal)) != 0, 0))
    return multiply_add_by_lane(a, b, c);
  return (FloatLanes)sum;
}
#endif

// a * b + c, rounded once.
TRAINOPT_FUNCTION Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (FloatLanes)_mm512_fmadd_ps((__m512)a.lanes, (__m512)b.lanes, (__m512)c.lanes);
#elif defined(__FMA__)
  return (FloatLanes)_mm256_fmadd_ps((__m256)a.lanes, (__m256)b.lanes, (__m256)c.lanes);
#elif defined(__aarch64__)
  return (FloatLanes)vfmaq_f32((float32x4_t)c.lanes, (float32x4_t)a.lanes, (float32x4_t)b.lanes);
#elif defined(__SSE2__)
  return multiply_add_in_double(a, b, c);
#else
  return multiply_add_by_lane(a, b, c);
#endif
}

TRAINOPT_FUNCTION Vec<float> power_of_two(Vec<float> n_shifted) {
  return (FloatLanes)(((WordLanes)n_shifted.lanes << 23) + 0x3f800000u);
}

typedef int32_t IntegerLanes __attribute__((vector_size(TRAINOPT_VECTOR_BYTES)));

TRAINOPT_FUNCTION Vec<float> split_power_of_two(Vec<float> x, Vec<float>* e) {
  const WordLanes bits = (WordLanes)x.lanes - 0x3f3504f3u;
  e->lanes = __builtin_convertvector((IntegerLanes)bits >> 23, FloatLanes);
  return (FloatLanes)((bits & 0x007fffffu) + 0x3f3504f3u);
}

using trainopt::exponential;
using trainopt::exponential_of_negative;
using trainopt::hyperbolic_tangent;
using trainopt::log_one_minus;
using trainopt::log_one_plus;
using trainopt::logarithm;

// Double is the C library's, lane by lane.
#define TRAINOPT_BY_LANE(name)                                                            \
  TRAINOPT_FUNCTION Vec<double> name(Vec<double> x) {                                     \
    for (int i = 0; i < Vec<double>::kSize; ++i) x.lanes[i] = trainopt::name(x.lanes[i]); \
    return x;                                                                             \
  }
TRAINOPT_BY_LANE(exponential)
TRAINOPT_BY_LANE(exponential_of_negative)
TRAINOPT_BY_LANE(logarithm)
TRAINOPT_BY_LANE(log_one_plus)
TRAINOPT_BY_LANE(log_one_minus)
TRAINOPT_BY_LANE(hyperbolic_tangent)
#undef TRAINOPT_BY_LANE

// The same for two vectors side by side.
TRAINOPT_FUNCTION Pair select_less(Pair a, Pair b, Pair if_so, Pair if_not) {
  return {select_less(a.even, b.even, if_so.even, if_not.even), select_less(a.odd, b.odd, if_so.odd, if_not.odd)};
}
TRAINOPT_FUNCTION Pair multiply_add(Pair a, Pair b, Pair c) {
  return {multiply_add(a.even, b.even, c.even), multiply_add(a.odd, b.odd, c.odd)};
}
TRAINOPT_FUNCTION Pair power_of_two(Pair n) { return {power_of_two(n.even), power_of_two(n.odd)}; }
TRAINOPT_FUNCTION Pair at_least(Pair x, Pair low) { return {at_least(x.even, low.even), at_least(x.odd, low.odd)}; }
TRAINOPT_FUNCTION Pair larger(Pair a, Pair b) { return {larger(a.even, b.even), larger(a.odd, b.odd)}; }

// As many elements as make the same number of lanes on every instruction set, so that sums over lanes have one order.
constexpr int kLanes = 32;

// A group of kLanes elements of a stored type, in registers.
template <class Stored>
struct Group {
  using Part = Register<Stored>;
  static constexpr int kSize = Part::kSize, kParts = kLanes / kSize;
  Part part[kParts];

  template <class S>
  TRAINOPT_INLINE explicit Group(S value) {
    for (Part& p : part) p = Part(value);
  }
  // Which element of the group the i-th number of the registers is.
  static constexpr int element(int i) { return i; }
};
// The even elements of a Pair come first.
template <>
constexpr int Group<BFloat16>::element(int i) {
  const int in_pair = i % kSize, half = kSize / 2;
  return i - in_pair + in_pair % half * 2 + in_pair / half;
}

template <class Stored>
using ArithmeticOf = std::conditional_t<sizeof(Stored) == sizeof(double), double, float>;

// Sums in double, one for each lane.
template <class Stored>
struct LaneSums {
  double lane[kLanes] = {};  // in the order of the registers

  TRAINOPT_INLINE void add(const Group<Stored>& group) {
    ArithmeticOf<Stored> values[kLanes];
    __builtin_memcpy(values, group.part, sizeof values);
    for (int i = 0; i < kLanes; ++i) lane[i] += static_cast<double>(values[i]);
  }
  TRAINOPT_INLINE void scale(double factor) {
    for (double& value : lane) value *= factor;
  }
  TRAINOPT_INLINE double total() const {
    double tree[kLanes];
    for (int i = 0; i < kLanes; ++i) tree[Group<Stored>::element(i)] = lane[i];
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) tree[i] += tree[i + width];
    return tree[0];
  }
};

// The largest of all; 0 and not -0, in whichever order they come.
template <class S, class Stored>
TRAINOPT_FUNCTION S largest(const Group<Stored>& group) {
  S values[kLanes];
  __builtin_memcpy(values, group.part, sizeof values);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) values[i] = values[i] > values[i + width] ? values[i] : values[i + width];
  return values[0] + S(0);
}

}  // namespace
}  // namespace trainopt::cpu
