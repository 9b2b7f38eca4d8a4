// What a step finds out about a parameter, block by block, from memory that the update has just read or written and
// that is still in the nearest cache. In functions of their own: in the update's loop they would take its registers,
// and make every kernel twice.
#pragma once

#include "core/step_stats.h"
#include "core/sum.h"
#include "cpu/engine.h"
#include "cpu/norm_kernel.h"
#include "cpu/tile.h"
#include "cpu/vec.h"

namespace trainopt::cpu {
namespace {

// Adds the squares of a block's elements, or of their differences from y, to sums of which element i has lane
// i % kSumLanes, so that every SIMD variant gives the same bits. A chunk adds 512 terms to a lane, for which a double
// has the precision.
template <class S>
[[gnu::noinline]] void add_squares_in_double(const S* x, const S* y, int count, double (&lanes)[kSumLanes]) {
  using T = Vec<double>;
  for (int v = 0; v < kSumLanes; v += T::kSize) {
    T sum = load(lanes + v);
    for (int i = v; i < count; i += kSumLanes) {
      const T term = y == nullptr ? load_wide(x + i) : load_wide(x + i) - load_wide(y + i);
      sum = sum + term * term;
    }
    store(lanes + v, sum);
  }
}

TRAINOPT_FUNCTION bool add_squares(const double* x, const double* y, int count, double (&lanes)[kSumLanes]) {
  add_squares_in_double(x, y, count, lanes);
  return true;
}

// Eight squares at most are added in float first, a third of the work, which keeps seven digits of the norm. Where the
// sums would leave float's range, or what is lost below it could matter, all is done in double. Whether the block is
// known to be finite.
TRAINOPT_FUNCTION bool add_squares(const float* x, const float* y, int count, double (&lanes)[kSumLanes]) {
  using T = Vec<float>;
  constexpr int kVectors = kSumLanes / T::kSize;
  T sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = T(0.0f);
  for (int i = 0; i < count; i += kSumLanes)
    for (int v = 0; v < kVectors; ++v) {
      const int at = i + v * T::kSize;
      const T term = y == nullptr ? load(x + at) : load(x + at) - load(y + at);
      sum[v] = sum[v] + term * term;
    }
  T largest = sum[0], any = sum[0];  // the latter is NaN where one is
  for (int v = 1; v < kVectors; ++v) {
    largest = sum[v].lanes > largest.lanes ? sum[v].lanes : largest.lanes;
    any = any + sum[v];
  }
  if (!all_in(largest, 0.0f, 1e36f) || all_in(largest, 0.0f, 1e-25f) || !all_in(any, 0.0f, 1e38f)) {
    add_squares_in_double(x, y, count, lanes);
    return false;
  }
  float of[kSumLanes];
  for (int v = 0; v < kVectors; ++v) store(of + v * T::kSize, sum[v]);
  for (int i = 0; i < kSumLanes; i += Vec<double>::kSize) store(lanes + i, load(lanes + i) + load_wide(of + i));
  return true;
}

// A tile with zeros after its end, up to whole lanes: they add nothing.
template <class S>
TRAINOPT_FUNCTION const S* whole_lanes(const S* tile, int count, S (&padded)[kBlock]) {
  if (count % kSumLanes == 0) return tile;
  for (int i = 0; i < kBlock; ++i) padded[i] = i < count ? tile[i] : S(0);
  return padded;
}

template <class S, size_t kBytes>
TRAINOPT_FUNCTION S* lanes_of(unsigned char (&bytes)[kBytes]) {
  return reinterpret_cast<S*>(bytes);
}

template <class S>
[[gnu::noinline]] void note_before(const TensorTask& task, int64_t at, int count) {
  using T = Vec<S>;
  S buffer[2][kBlock], padded[2][kBlock];
  ChunkStats& stats = *task.stats;
  const S* p = whole_lanes(load_tile(task.param, at, count, buffer[0]), count, padded[0]);
  const S* g = whole_lanes(load_tile(task.gradient, at, count, buffer[1]), count, padded[1]);
  const S* none = nullptr;
  add_squares(p, none, count, stats.param);
  const bool is_finite = add_squares(g, none, count, stats.gradient) && sizeof(S) == sizeof(float);
  T largest = load(lanes_of<S>(stats.largest));
  for (int i = 0; i < count; i += kSumLanes)
    for (int v = i; v < i + kSumLanes; v += T::kSize) {
      const T x = load(g + v), negated = -x, size = x.lanes > negated.lanes ? x.lanes : negated.lanes;
      largest = size.lanes > largest.lanes ? size.lanes : largest.lanes;
      store(lanes_of<S>(stats.before) + v, load(p + v));
    }
  store(lanes_of<S>(stats.largest), largest);
  if (!is_finite)
    for (int i = 0; i < count; ++i) stats.nonfinite += !(g[i] - g[i] == 0);
}

template <class S>
[[gnu::noinline]] void note_after(const TensorTask& task, int64_t at, int count) {
  S buffer[kBlock], padded[kBlock];
  const S* p = whole_lanes(load_tile(task.param, at, count, buffer), count, padded);
  add_squares(p, lanes_of<S>(task.stats->before), count, task.stats->update);
}

}  // namespace
}  // namespace trainopt::cpu
