// What core/elementary.h needs of a vector.
#pragma once

#include "core/elementary.h"
#include "cpu/vec.h"

namespace trainopt::cpu {
namespace {

template <class S>
TRAINOPT_FUNCTION Vec<S> select_less(Vec<S> a, Vec<S> b, Vec<S> if_so, Vec<S> if_not) {
  return a.lanes < b.lanes ? if_so.lanes : if_not.lanes;
}

TRAINOPT_FUNCTION Vec<float> power_of_two(Vec<float> n) {
  return (FloatLanes)(((WordLanes)(n + Vec<float>(12582912.0f)).lanes << 23) + 0x3f800000u);
}

typedef int32_t IntegerLanes __attribute__((vector_size(TRAINOPT_VECTOR_BYTES)));

TRAINOPT_FUNCTION Vec<float> split_power_of_two(Vec<float> x, Vec<float>* e) {
  const WordLanes bits = (WordLanes)x.lanes - 0x3f3504f3u;
  e->lanes = __builtin_convertvector((IntegerLanes)bits >> 23, FloatLanes);
  return (FloatLanes)((bits & 0x007fffffu) + 0x3f3504f3u);
}

using trainopt::exponential;
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
TRAINOPT_BY_LANE(logarithm)
TRAINOPT_BY_LANE(log_one_plus)
TRAINOPT_BY_LANE(log_one_minus)
TRAINOPT_BY_LANE(hyperbolic_tangent)
#undef TRAINOPT_BY_LANE

// The larger of two; b where either is NaN.
template <class S>
TRAINOPT_FUNCTION Vec<S> larger(Vec<S> a, Vec<S> b) {
  return a.lanes > b.lanes ? a.lanes : b.lanes;
}

// As many elements as make the same number of lanes on every instruction set, so that sums over lanes have one order.
constexpr int kLanes = 32;

template <class S>
struct Lanes {
  static constexpr int kParts = kLanes / Vec<S>::kSize;
  Vec<S> part[kParts];

  TRAINOPT_INLINE explicit Lanes(S value) {
    for (Vec<S>& p : part) p = Vec<S>(value);
  }
};

// Sums in double, one for each lane.
struct LaneSums {
  double lane[kLanes] = {};

  template <class S>
  TRAINOPT_INLINE void add(const Lanes<S>& lanes) {
    S values[kLanes];
    __builtin_memcpy(values, lanes.part, sizeof values);
    for (int i = 0; i < kLanes; ++i) lane[i] += static_cast<double>(values[i]);
  }
  TRAINOPT_INLINE void scale(double factor) {
    for (double& value : lane) value *= factor;
  }
  TRAINOPT_INLINE double total() const {
    double tree[kLanes];
    __builtin_memcpy(tree, lane, sizeof tree);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) tree[i] += tree[i + width];
    return tree[0];
  }
};

template <class S>
TRAINOPT_FUNCTION S largest(const Lanes<S>& lanes) {
  S values[kLanes];
  __builtin_memcpy(values, lanes.part, sizeof values);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) values[i] = values[i] > values[i + width] ? values[i] : values[i + width];
  return values[0];
}

}  // namespace
}  // namespace trainopt::cpu
