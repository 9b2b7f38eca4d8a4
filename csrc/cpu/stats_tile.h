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

// Eight squares at most are added in float first, a third of the work, which keeps seven digits of the norm.
constexpr int kVectors = kSumLanes / Vec<float>::kSize;
struct SquaresInFloat {
  Vec<float> sum[kVectors];

  TRAINOPT_INLINE SquaresInFloat() {
    for (Vec<float>& each : sum) each = Vec<float>(0.0f);
  }
  TRAINOPT_INLINE void add_square(int v, Vec<float> term) { sum[v] = sum[v] + term * term; }

  // Puts them into the sums of x, or of its difference from y. Where they would leave float's range, or what is lost
  // below it could matter, all is done again in double. Whether the block is known to be finite.
  TRAINOPT_INLINE bool finish(const float* x, const float* y, int count, double (&lanes)[kSumLanes]) const {
    using T = Vec<float>;
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
};

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

TRAINOPT_FUNCTION Vec<float> magnitude(Vec<float> x) { return float_of(bits_of(x) & 0x7fffffffu); }

// Keeps the parameter as it is before the update, and finds the largest magnitude of the gradient; adds up the squares
// of both. Whether the gradient is known to be finite.
TRAINOPT_FUNCTION bool look_at(const float* p, const float* g, int count, ChunkStats& stats) {
  SquaresInFloat param, gradient;
  float* const before = lanes_of<float>(stats.before);
  Vec<float> largest = load(lanes_of<float>(stats.largest));
  for (int i = 0; i < count; i += kSumLanes)
    for (int v = 0; v < kVectors; ++v) {
      const int at = i + v * Vec<float>::kSize;
      const Vec<float> x = load(p + at), y = load(g + at);
      store(before + at, x);
      param.add_square(v, x);
      gradient.add_square(v, y);
      largest = larger(magnitude(y), largest);
    }
  store(lanes_of<float>(stats.largest), largest);
  const float* none = nullptr;
  param.finish(p, none, count, stats.param);
  return gradient.finish(g, none, count, stats.gradient);
}

TRAINOPT_FUNCTION bool look_at(const double* p, const double* g, int count, ChunkStats& stats) {
  using T = Vec<double>;
  const double* none = nullptr;
  add_squares_in_double(p, none, count, stats.param);
  add_squares_in_double(g, none, count, stats.gradient);
  T largest = load(lanes_of<double>(stats.largest));
  for (int i = 0; i < count; i += T::kSize) {
    largest = larger(magnitude(load(g + i)), largest);
    store(lanes_of<double>(stats.before) + i, load(p + i));
  }
  store(lanes_of<double>(stats.largest), largest);
  return false;
}

TRAINOPT_FUNCTION void add_differences(const float* x, const float* y, int count, double (&lanes)[kSumLanes]) {
  SquaresInFloat of;
  for (int i = 0; i < count; i += kSumLanes)
    for (int v = 0; v < kVectors; ++v) {
      const int at = i + v * Vec<float>::kSize;
      of.add_square(v, load(x + at) - load(y + at));
    }
  of.finish(x, y, count, lanes);
}
TRAINOPT_FUNCTION void add_differences(const double* x, const double* y, int count, double (&lanes)[kSumLanes]) {
  add_squares_in_double(x, y, count, lanes);
}

template <class S>
[[gnu::noinline]] void note_before(const TensorTask& task, int64_t at, int count) {
  S buffer[2][kBlock], padded[2][kBlock];
  ChunkStats& stats = *task.stats;
  const S* p = whole_lanes(load_tile(task.param, at, count, buffer[0]), count, padded[0]);
  const S* g = whole_lanes(load_tile(task.gradient, at, count, buffer[1]), count, padded[1]);
  if (!look_at(p, g, count, stats))
    for (int i = 0; i < count; ++i) stats.nonfinite += !(g[i] - g[i] == 0);
}

template <class S>
[[gnu::noinline]] void note_after(const TensorTask& task, int64_t at, int count) {
  S buffer[kBlock], padded[kBlock];
  const S* p = whole_lanes(load_tile(task.param, at, count, buffer), count, padded);
  add_differences(p, lanes_of<S>(task.stats->before), count, task.stats->update);
}

}  // namespace
}  // namespace trainopt::cpu
