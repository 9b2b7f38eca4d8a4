// The inner loops of pointwise losses. Included by loss_kernels.h.
#pragma once

#include "cpu/elementary_vec.h"
#include "cpu/engine.h"
#include "cpu/losses.h"
#include "cpu/stream.h"
#include "cpu/tile.h"

namespace trainopt::cpu {
namespace {

// What a loss reads of up to 256 elements.
template <class S>
struct PointwiseTile {
  const S *input, *target, *weight, *positive;  // the last two null where there are none

  static PointwiseTile load(const PointwiseTask& task, int64_t at, int count, S (*buffers)[kBlock]) {
    const auto optional = [&](const TensorView& view, S* buffer) {
      return view.data == nullptr ? nullptr : load_tile(view, at, count, buffer);
    };
    return {load_tile(task.input, at, count, buffers[0]), load_tile(task.target, at, count, buffers[1]),
            optional(task.weight, buffers[2]), optional(task.positive, buffers[3])};
  }

  // The elements from `first` on, `count` < kLanes of them, and zeros.
  PointwiseTile padded(int first, int count, S (*buffers)[kLanes]) const {
    const auto pad = [&](const S* from, S* buffer) -> const S* {
      if (from == nullptr) return nullptr;
      for (int i = 0; i < kLanes; ++i) buffer[i] = i < count ? from[first + i] : S(0);
      return buffer;
    };
    return {pad(input, buffers[0]), pad(target, buffers[1]), pad(weight, buffers[2]), pad(positive, buffers[3])};
  }

  Vec<S> x(int i) const { return trainopt::cpu::load(input + i); }
  Vec<S> t(int i) const { return trainopt::cpu::load(target + i); }
  Vec<S> positives(int i) const { return positive == nullptr ? Vec<S>(S(1)) : trainopt::cpu::load(positive + i); }
  Vec<S> weighted(Vec<S> value, int i) const {
    return weight == nullptr ? value : value * trainopt::cpu::load(weight + i);
  }
};

template <class Loss, class S>
double pointwise_forward(const PointwiseTask& task, int64_t begin, int64_t end) {
  constexpr int kSize = Vec<S>::kSize;
  const Vec<S> k(static_cast<S>(task.parameter));
  const bool keep = task.value.data != nullptr;
  S buffers[4][kBlock], value_buffer[kBlock], rest[4][kLanes], rest_values[kLanes];
  LaneSums<S> sums;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    const auto tile = PointwiseTile<S>::load(task, at, count, buffers);
    S* values = keep && is_run_of<S>(task.value) ? static_cast<S*>(task.value.data) + at : value_buffer;
    Group<S> lanes(S(0));
    const auto value_at = [&](const PointwiseTile<S>& from, int i) {
      return from.weighted(Loss::value(from.x(i), from.t(i), from.positives(i), k), i);
    };
    int i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int p = 0; p < Group<S>::kParts; ++p) {
        const Vec<S> value = value_at(tile, i + p * kSize);
        lanes.part[p] = lanes.part[p] + value;
        if (keep) store(values + i + p * kSize, value);
      }
    if (i < count) {
      const auto last = tile.padded(i, count - i, rest);
      for (int p = 0; p < kLanes; p += kSize) store(rest_values + p, value_at(last, p));
      for (int j = count - i; j < kLanes; ++j) rest_values[j] = S(0);
      for (int p = 0; p < Group<S>::kParts; ++p)
        lanes.part[p] = lanes.part[p] + trainopt::cpu::load(rest_values + p * kSize);
      if (keep) __builtin_memcpy(values + i, rest_values, (count - i) * sizeof(S));
    }
    sums.add(lanes);
    if (keep) store_tile(task.value, at, count, values);
  }
  return sums.total();
}

template <class Loss, class S>
void pointwise_backward(const PointwiseTask& task, int64_t begin, int64_t end) {
  constexpr int kSize = Vec<S>::kSize;
  const Vec<S> k(static_cast<S>(task.parameter)), scale(static_cast<S>(task.scale));
  const bool by_element = task.upstream.data != nullptr;
  const bool is_large = task.numel * static_cast<int64_t>(sizeof(S)) >= kStreamFrom;
  S buffers[4][kBlock], upstream_buffer[kBlock], gradient_buffer[kBlock];
  S rest[4][kLanes], rest_upstream[kLanes] = {}, rest_gradient[kLanes];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    const auto tile = PointwiseTile<S>::load(task, at, count, buffers);
    const S* upstream = by_element ? load_tile(task.upstream, at, count, upstream_buffer) : nullptr;
    const auto write = [&](const TensorView& gradient, const auto& slope_of) {
      if (gradient.data == nullptr) return;
      const bool streams = is_large && is_run_of<S>(gradient);
      S* out = is_run_of<S>(gradient) ? static_cast<S*>(gradient.data) + at : gradient_buffer;
      const auto gradient_at = [&](const PointwiseTile<S>& from, const S* above, int i) {
        const Vec<S> slope = from.weighted(slope_of(from.x(i), from.t(i), from.positives(i), k), i);
        return slope * (above == nullptr ? scale : trainopt::cpu::load(above + i));
      };
      int i = 0;
      if (streams && elements_to_boundary(out) == 0) {
        for (; i + kSize <= count; i += kSize) stream(out + i, gradient_at(tile, upstream, i));
      } else {
        for (; i + kSize <= count; i += kSize) store(out + i, gradient_at(tile, upstream, i));
      }
      if (i < count) {
        const auto last = tile.padded(i, count - i, rest);
        if (by_element) __builtin_memcpy(rest_upstream, upstream + i, (count - i) * sizeof(S));
        store(rest_gradient, gradient_at(last, by_element ? rest_upstream : nullptr, 0));
        __builtin_memcpy(out + i, rest_gradient, (count - i) * sizeof(S));
      }
      store_tile(gradient, at, count, out);
    };
    write(task.input_gradient, [](auto... of) { return Loss::slope(of...); });
    write(task.target_gradient, [](auto... of) { return Loss::target_slope(of...); });
  }
  if (is_large) finish_streaming();
}

}  // namespace
}  // namespace trainopt::cpu
