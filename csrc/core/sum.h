// Sums that do not depend on how their terms are shared out: over threads, vectors or blocks of a GPU.
//
// Terms come in chunks of kSumChunk, each from the tensor's own element 0. A chunk is eight segments, one after the
// other, and a segment 32 lanes: element i is added to lane i % 32, and the lanes are combined pairwise, 16 apart, then
// 8, ... The chunks' sums are combined likewise. A warp of a GPU has a lane for each of its threads, and any vector
// register holds a few of them, so all engines keep to this order without a detour.
//
// Where a tensor is cut into shards its chunks begin elsewhere, and so the order is another one. In float64 arithmetic
// a sum is kept in two doubles, to twice the precision of one, and rounded to one at its end: shards move its bits in
// one of about 2^45 sums. In float32 arithmetic a term is a product of two floats, which a double holds exactly, and a
// lane adds the 64 terms of its segment in one double; only lanes and chunks are combined in two. The errors, some
// 2^-53, reach a scalar in float32 in one of about 2^28 sums. With two doubles for each term a step of LARS took 60.7
// ms, and takes 54.1 without (64M elements, two threads of an EPYC with AVX2).
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace trainopt {

constexpr int64_t kSumChunk = 16384;
constexpr int kSumSegments = 8;
constexpr int kSumLanes = 32;
constexpr int64_t kSumSegment = kSumChunk / kSumSegments;

TRAINOPT_FUNCTION int64_t sum_chunks(int64_t numel) { return numel / kSumChunk + (numel % kSumChunk != 0); }

// T is double, or a vector of doubles.
template <class T>
struct SumOf {
  T high, low;  // high + low, of which `low` is what was lost to rounding in `high`
};
using Sum = SumOf<double>;

// S: the arithmetic's type. By Knuth's two-sum what an addition loses is found exactly.
template <class S, class T>
TRAINOPT_FUNCTION void add_term(SumOf<T>& sum, T term) {
  const T high = sum.high + term;
  if constexpr (sizeof(S) == sizeof(double)) {
    const T added = high - sum.high;
    sum.low = sum.low + ((sum.high - (high - added)) + (term - added));
  }
  sum.high = high;
}

// The same bits for add(b, a).
TRAINOPT_FUNCTION Sum add(Sum a, Sum b) {
  const double high = a.high + b.high;
  const double added = high - a.high;
  const double low = (a.low + b.low) + ((a.high - (high - added)) + (b.high - added));
  const double both = high + low;
  if (!(both - both == 0)) return {high, 0};  // infinite or NaN: what was lost to rounding has no meaning
  return {both, low - (both - high)};
}

TRAINOPT_FUNCTION double value_of(Sum sum) {
  const double value = sum.high + sum.low;
  return value - value == 0 ? value : sum.high;
}

TRAINOPT_FUNCTION double add(double a, double b) { return a + b; }

// Combines the first `count` of so many lanes, a power of two, pairwise: the first has the result.
template <class T>
TRAINOPT_FUNCTION void combine_pairwise(T* lanes, int width, int count) {
  for (width /= 2; width > 0; width /= 2)
    for (int i = 0; i < width && i + width < count; ++i) lanes[i] = add(lanes[i], lanes[i + width]);
}
TRAINOPT_FUNCTION Sum combine_lanes(Sum (&lanes)[kSumLanes], int count) {
  combine_pairwise(lanes, kSumLanes, count);
  return lanes[0];
}

}  // namespace trainopt
