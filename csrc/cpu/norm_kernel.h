// The inner loops of norms and of scaling, once for each SIMD variant.
#pragma once

#include "core/math.h"
#include "core/norm.h"
#include "core/sum.h"
#include "cpu/tile.h"
#include "cpu/vec.h"

namespace trainopt::cpu {
namespace {

// Element i of a block of 256 is added to sum i % kLanes, in every variant: so the bits are the same.
constexpr int kLanes = 32;
constexpr int kSums = kLanes / Vec<double>::kSize;

TRAINOPT_FUNCTION Vec<double> load_wide(const double* from) { return load(from); }
TRAINOPT_FUNCTION Vec<double> load_wide(const float* from) {
#if defined(__AVX512F__)
  return (DoubleLanes)_mm512_maskz_cvtps_pd(-1, _mm256_loadu_ps(from));
#elif defined(__AVX2__)
  return (DoubleLanes)_mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  return DoubleLanes{static_cast<double>(from[0]), static_cast<double>(from[1])};
#endif
}

TRAINOPT_FUNCTION Vec<double> magnitude(Vec<double> x) {
  return x.lanes < Vec<double>(0.0).lanes ? (-x).lanes : x.lanes;
}

// sum + a * b, of numbers that come from floats: a double holds their product exactly, so that one rounding and two
// give the same bits.
TRAINOPT_FUNCTION Vec<double> add_exact_product(Vec<double> sum, Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (DoubleLanes)_mm512_fmadd_pd((__m512d)a.lanes, (__m512d)b.lanes, (__m512d)sum.lanes);
#elif defined(__FMA__)
  return (DoubleLanes)_mm256_fmadd_pd((__m256d)a.lanes, (__m256d)b.lanes, (__m256d)sum.lanes);
#else
  return sum + a * b;
#endif
}

template <Norm kNorm, class S>
TRAINOPT_FUNCTION Vec<double> added(Vec<double> sum, const S* from) {
  const Vec<double> x = load_wide(from);
  if constexpr (kNorm != Norm::kSquares) return sum + magnitude(x);
  if constexpr (sizeof(S) == sizeof(float)) return add_exact_product(sum, x, x);
  return sum + x * x;
}

// The kLanes sums in so many vectors, by name and not by index: the compiler keeps them in registers.
template <int kCount>
struct Sums {
  Sums<kCount - 1> rest;
  Vec<double> last;
  static constexpr int kAt = (kCount - 1) * Vec<double>::kSize;

  TRAINOPT_INLINE explicit Sums(const double* lanes) : rest(lanes), last(load(lanes + kAt)) {}
  template <Norm kNorm, class S>
  TRAINOPT_INLINE void add_lanes(const S* from) {
    rest.template add_lanes<kNorm>(from);
    last = added<kNorm>(last, from + kAt);
  }
  TRAINOPT_INLINE void add_products(const float* a, const float* b) {
    rest.add_products(a, b);
    last = add_exact_product(last, load_wide(a + kAt), load_wide(b + kAt));
  }
  TRAINOPT_INLINE void store_to(double* lanes) const {
    rest.store_to(lanes);
    store(lanes + kAt, last);
  }
};
template <>
struct Sums<0> {
  TRAINOPT_INLINE explicit Sums(const double*) {}
  TRAINOPT_INLINE void add_products(const float*, const float*) {}
  template <Norm kNorm, class S>
  TRAINOPT_INLINE void add_lanes(const S*) {}
  TRAINOPT_INLINE void store_to(double*) const {}
};

TRAINOPT_FUNCTION double sum_of_lanes(double (&lanes)[kLanes]) {
  combine_pairwise(lanes, kLanes, kLanes);
  return lanes[0];
}

template <Norm kNorm, class S>
double sum_of_chunk(const TensorView& view, int64_t begin, int64_t end) {
  S buffer[kBlock], padded[kLanes];
  double lanes[kLanes] = {};
  Sums<kSums> sums(lanes);
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    const S* tile = load_tile(view, at, count, buffer);
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) sums.template add_lanes<kNorm>(tile + i);
    if (i == count) continue;
    for (int k = 0; k < kLanes; ++k) padded[k] = i + k < count ? tile[i + k] : S(0);
    sums.template add_lanes<kNorm>(padded);
  }
  sums.store_to(lanes);
  return sum_of_lanes(lanes);
}

// Without the sign, the bits of numbers are in the order of their sizes, infinity above the rest and NaN above
// infinity: so the largest is found among whole numbers, as fast as they are read, and is NaN if any is.
template <class S, class Bits>
double largest_of_chunk(const TensorView& view, int64_t begin, int64_t end) {
  constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);
  S buffer[kBlock], result;
  Bits largest = 0;
  const int64_t step = is_run_of<S>(view) ? end - begin : kBlock;
  for (int64_t at = begin; at < end; at += step) {
    const int count = static_cast<int>(end - at < step ? end - at : step);
    const S* tile = load_tile(view, at, count, buffer);
    for (int i = 0; i < count; ++i) {
      Bits bits;
      __builtin_memcpy(&bits, tile + i, sizeof bits);
      bits &= ~kSign;
      largest = bits > largest ? bits : largest;
    }
  }
  __builtin_memcpy(&result, &largest, sizeof result);
  return result;
}

// For float64, whose squares a double may not hold.
double squares_of_chunk(const TensorView& view, int64_t begin, int64_t end) {
  const double plain = sum_of_chunk<Norm::kSquares, double>(view, begin, end);
  if (holds_squares(plain)) return plain;
  if (plain == 0 && largest_of_chunk<double, int64_t>(view, begin, end) == 0) return 0;  // quick: there may be many
  const double scale = square_scale(plain);
  double buffer[kBlock], lanes[kLanes] = {};
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    const double* tile = load_tile(view, at, count, buffer);
    for (int i = 0; i < count; ++i) lanes[i % kLanes] += (tile[i] * scale) * (tile[i] * scale);
  }
  return keep_scaled_squares(sum_of_lanes(lanes), scale);
}

double norm_of_chunk_kernel(Norm norm, const TensorView& view, int64_t begin, int64_t end) {
  const bool is_float64 = view.dtype == DType::kFloat64;
  double (*of_chunk)(const TensorView&, int64_t, int64_t) = nullptr;
  switch (norm) {
    case Norm::kSizes:
      of_chunk = is_float64 ? sum_of_chunk<Norm::kSizes, double> : sum_of_chunk<Norm::kSizes, float>;
      break;
    case Norm::kSquares: of_chunk = is_float64 ? squares_of_chunk : sum_of_chunk<Norm::kSquares, float>; break;
    case Norm::kLargest:
      of_chunk = is_float64 ? largest_of_chunk<double, int64_t> : largest_of_chunk<float, int32_t>;
      break;
  }
  return of_chunk(view, begin, end);
}

template <class S>
void scale_as(const TensorView& view, int64_t begin, int64_t end, const ClipFactors& factors) {
  constexpr int kSize = Vec<S>::kSize;
  const S first = static_cast<S>(factors.first), second = static_cast<S>(factors.second);
  S buffer[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    S* tile = load_tile(view, at, count, buffer);
    int i = 0;
    for (; i + kSize <= count; i += kSize) store(tile + i, load(tile + i) * Vec<S>(first) * Vec<S>(second));
    for (; i < count; ++i) tile[i] = tile[i] * first * second;
    store_tile(view, at, count, tile);
  }
}

template <class S>
void clamp_as(const TensorView& view, int64_t begin, int64_t end, double limit) {
  const S most = static_cast<S>(limit);
  S buffer[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    S* tile = load_tile(view, at, count, buffer);
    int beyond = 0;
    for (int i = 0; i < count; ++i) beyond += (tile[i] < -most) | (tile[i] > most);
    if (beyond == 0) continue;
    for (int i = 0; i < count; ++i) tile[i] = clamped(tile[i], most);
    store_tile(view, at, count, tile);
  }
}

void clamp_kernel(const TensorView& view, int64_t begin, int64_t end, double limit) {
  (view.dtype == DType::kFloat64 ? clamp_as<double> : clamp_as<float>)(view, begin, end, limit);
}

void scale_kernel(const TensorView& view, int64_t begin, int64_t end, const ClipFactors& factors) {
  (view.dtype == DType::kFloat64 ? scale_as<double> : scale_as<float>)(view, begin, end, factors);
}

}  // namespace
}  // namespace trainopt::cpu
