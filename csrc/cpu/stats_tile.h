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

// Sums of squares, element i in lane i % kSumLanes, so that every SIMD variant gives the same bits. A chunk adds 512
// terms to a lane, for which a double has the precision.
class LaneSquares {
 public:
  explicit LaneSquares(double (&lanes)[kSumLanes]) : lanes_(lanes) {
    for (int v = 0; v < kVectors; ++v) sum_[v] = load(lanes + v * kSize);
  }
  ~LaneSquares() {
    for (int v = 0; v < kVectors; ++v) store(lanes_ + v * kSize, sum_[v]);
  }
  // Of kSumLanes elements beside each other; of their differences.
  template <class S>
  TRAINOPT_INLINE void add(const S* x) {
    for (int v = 0; v < kVectors; ++v) add_square(v, load_wide(x + v * kSize));
  }
  template <class S>
  TRAINOPT_INLINE void add(const S* x, const S* y) {
    for (int v = 0; v < kVectors; ++v) add_square(v, load_wide(x + v * kSize) - load_wide(y + v * kSize));
  }

 private:
  static constexpr int kSize = Vec<double>::kSize, kVectors = kSumLanes / kSize;
  double (&lanes_)[kSumLanes];
  Vec<double> sum_[kVectors];

  TRAINOPT_INLINE void add_square(int v, Vec<double> x) { sum_[v] = sum_[v] + x * x; }
};

// A tile with zeros after its end, up to whole lanes: they add nothing.
template <class S>
TRAINOPT_FUNCTION const S* whole_lanes(const S* tile, int count, S (&padded)[kBlock]) {
  if (count % kSumLanes == 0) return tile;
  for (int i = 0; i < kBlock; ++i) padded[i] = i < count ? tile[i] : S(0);
  return padded;
}

template <class S>
TRAINOPT_FUNCTION S* before_of(ChunkStats& stats) {
  static_assert(sizeof stats.before == kBlock * sizeof(double));
  return reinterpret_cast<S*>(stats.before);
}

template <class S>
[[gnu::noinline]] void note_before(const TensorTask& task, int64_t at, int count) {
  using T = Vec<S>;
  S buffer[2][kBlock], padded[2][kBlock];
  ChunkStats& stats = *task.stats;
  const S* p = whole_lanes(load_tile(task.param, at, count, buffer[0]), count, padded[0]);
  const S* g = whole_lanes(load_tile(task.gradient, at, count, buffer[1]), count, padded[1]);
  LaneSquares params(stats.param), gradients(stats.gradient);
  T largest(S(0));
  auto nonfinite = largest.lanes != largest.lanes;  // none
  for (int i = 0; i < count; i += kSumLanes) {
    params.add(p + i);
    gradients.add(g + i);
    for (int v = i; v < i + kSumLanes; v += T::kSize) {
      const T x = load(g + v), negated = -x, zero = x - x;
      largest.lanes = x.lanes > largest.lanes ? x.lanes : largest.lanes;
      largest.lanes = negated.lanes > largest.lanes ? negated.lanes : largest.lanes;
      nonfinite -= zero.lanes != zero.lanes;
      store(before_of<S>(stats) + v, load(p + v));
    }
  }
  for (int i = 0; i < T::kSize; ++i) {
    if (largest.lanes[i] > stats.largest) stats.largest = largest.lanes[i];
    stats.nonfinite += nonfinite[i];
  }
}

template <class S>
[[gnu::noinline]] void note_after(const TensorTask& task, int64_t at, int count) {
  S buffer[kBlock], padded[kBlock];
  const S* p = whole_lanes(load_tile(task.param, at, count, buffer), count, padded);
  LaneSquares updates(task.stats->update);
  for (int i = 0; i < count; i += kSumLanes) updates.add(p + i, before_of<S>(*task.stats) + i);
}

}  // namespace
}  // namespace trainopt::cpu
