// The inner loops of cross-entropy, row by row: for more than a few classes.
#pragma once

#include "cpu/elementary_vec.h"
#include "cpu/losses.h"
#include "cpu/tile.h"
#include "losses/softmax_cross_entropy.h"

namespace trainopt::cpu {
namespace {

// A row is read once, in tiles that stay in the first-level cache.
constexpr int kRowTile = 1024;
constexpr int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

template <class S>
constexpr S kInfinity = static_cast<S>(__builtin_inf());

template <class S>
TRAINOPT_FUNCTION S* load_row_tile(const Rows& rows, int64_t row, int64_t at, int count, S* buffer) {
  return load_tile(TensorView{rows.data, nullptr, rows.dtype}, row * rows.stride + at, count, buffer);
}

// The mass at the label, or 0 where there is none: an ignored label need be no class.
TRAINOPT_FUNCTION double label_mass_of(const CrossEntropyTask& task, int64_t row) {
  if (task.labels == nullptr || is_ignored(task, row)) return 0;
  return (1 - task.smoothing) * (task.weight == nullptr ? 1 : task.weight[task.labels[row]]);
}

// One call's rows, in tiles: what forward and backward read in the same way.
template <class S>
class CrossEntropyRows {
 public:
  explicit CrossEntropyRows(const CrossEntropyTask& task) : task_(task), map_(task), spread_(spread_of(task)) {}

  // Up to kRowTile logits of the softmax, and `padding` up to a whole number of lanes.
  const S* logits(int64_t row, int64_t at, int count, S padding) {
    S* tile = load_row_tile(task_.logits, row, at, count, logits_buffer_);
    const int end = padded(count);
    if (end == count && map_.is_identity) return tile;
    if (tile != logits_buffer_) __builtin_memcpy(logits_buffer_, tile, count * sizeof(S));
    pad_logits(count, padding);
    if (map_.is_identity) return logits_buffer_;
    for (int i = 0; i < end; i += Vec<S>::kSize) store(logits_buffer_ + i, map_(load(logits_buffer_ + i)));
    pad_logits(count, padding);
    return logits_buffer_;
  }

  // Gives the tile that `logits` just returned another padding.
  void pad_logits(int count, S padding) {
    for (int i = count; i < padded(count); ++i) logits_buffer_[i] = padding;
  }

  double logit(int64_t row, int64_t at) {
    S one;
    return map_(*load_row_tile(task_.logits, row, at, 1, &one));
  }

  // The masses of a tile beside the label's, and zeros.
  const S* masses(int64_t row, int64_t at, int count) {
    const S spread = static_cast<S>(spread_);
    if (task_.labels == nullptr) {
      const S* target = load_row_tile(task_.probabilities, row, at, count, mass_buffer_);
      const S keep = static_cast<S>(1 - task_.smoothing);
      for (int i = 0; i < count; ++i) mass_buffer_[i] = target[i] * keep + spread;
    } else {
      for (int i = 0; i < count; ++i) mass_buffer_[i] = spread;
    }
    if (task_.weight != nullptr)
      for (int i = 0; i < count; ++i) mass_buffer_[i] *= static_cast<S>(task_.weight[at + i]);
    for (int i = count; i < padded(count); ++i) mass_buffer_[i] = S(0);
    return mass_buffer_;
  }

  // A: all of a row's mass.
  double total_mass(int64_t row) {
    if (task_.labels != nullptr) return label_mass_of(task_, row) + spread_ * task_.total_weight;
    LaneSums sums;
    for_each_tile([&](int64_t at, int count) {
      const S* mass = masses(row, at, count);
      Lanes<S> lanes(S(0));
      for (int i = 0; i < padded(count); i += kLanes)
        for (int p = 0; p < Lanes<S>::kParts; ++p) lanes.part[p] = lanes.part[p] + load(mass + i + p * Vec<S>::kSize);
      sums.add(lanes);
    });
    return sums.total();
  }

  template <class Use>
  TRAINOPT_INLINE void for_each_tile(Use use) const {
    for (int64_t at = 0; at < task_.classes; at += kRowTile)
      use(at, static_cast<int>(task_.classes - at < kRowTile ? task_.classes - at : kRowTile));
  }

 private:
  const CrossEntropyTask& task_;
  const LogitMap<S> map_;
  const double spread_;
  S logits_buffer_[kRowTile], mass_buffer_[kRowTile];
};

// The sums over one row, relative to `shift`, the largest logit so far.
template <class S>
struct RowSums {
  S largest = -kInfinity<S>;
  double shift = 0;
  LaneSums exponentials;
  double mass = 0, mass_times_logit = 0;

  // Logits padded with -infinity.
  void add_logits(const S* x, int count) {
    constexpr int kSize = Vec<S>::kSize, kParts = Lanes<S>::kParts;
    Lanes<S> peaks(-kInfinity<S>);
    for (int i = 0; i < count; i += kLanes)
      for (int p = 0; p < kParts; ++p) peaks.part[p] = larger(load(x + i + p * kSize), peaks.part[p]);
    const S peak = trainopt::cpu::largest(peaks);
    if (peak > largest) {
      exponentials.scale(__builtin_exp(static_cast<double>(largest) - static_cast<double>(peak)));
      mass_times_logit -= mass * (static_cast<double>(peak) - shift);
      largest = peak;
      shift = static_cast<double>(peak);
    }
    const Vec<S> by(static_cast<S>(shift));
    Lanes<S> lanes(S(0));
    for (int i = 0; i < count; i += kLanes)
      for (int p = 0; p < kParts; ++p) lanes.part[p] = lanes.part[p] + exponential(load(x + i + p * kSize) - by);
    exponentials.add(lanes);
  }

  // The same logits, padded with anything finite, and their masses, padded with 0.
  void add_masses(const S* x, const S* mass_tile, int count) {
    constexpr int kSize = Vec<S>::kSize, kParts = Lanes<S>::kParts;
    const Vec<S> by(static_cast<S>(shift));
    Lanes<S> masses(S(0)), products(S(0));
    for (int i = 0; i < count; i += kLanes)
      for (int p = 0; p < kParts; ++p) {
        const Vec<S> m = load(mass_tile + i + p * kSize);
        masses.part[p] = masses.part[p] + m;
        products.part[p] = products.part[p] + m * (load(x + i + p * kSize) - by);
      }
    LaneSums mass_sums, product_sums;
    mass_sums.add(masses);
    product_sums.add(products);
    mass += mass_sums.total();
    mass_times_logit += product_sums.total();
  }
};

template <class S>
void wide_forward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  CrossEntropyRows<S> rows(task);
  for (int64_t row = first_row; row < last_row; ++row) {
    RowSums<S> sums;
    rows.for_each_tile([&](int64_t at, int count) {
      const S* x = rows.logits(row, at, count, -kInfinity<S>);
      sums.add_logits(x, padded(count));
      if (!has_mass(task)) return;
      if (count != padded(count)) rows.pad_logits(count, S(0));
      sums.add_masses(x, rows.masses(row, at, count), padded(count));
    });
    const double peak = static_cast<double>(sums.largest), log_sum = __builtin_log(sums.exponentials.total());
    task.lse.peak[row] = peak;
    task.lse.log_sum[row] = log_sum;
    if (is_ignored(task, row)) {
      task.loss[row] = 0;
      continue;
    }
    double loss = has_mass(task) ? sums.mass * log_sum - sums.mass_times_logit : 0;
    if (task.labels != nullptr)
      loss += label_mass_of(task, row) * ((peak - rows.logit(row, task.labels[row])) + log_sum);
    task.loss[row] = loss;
  }
}

// Prefetches 2 KiB ahead for reads and 4 KiB for writes: a third faster when measured, as memory here is written while
// it is read or just after.
TRAINOPT_FUNCTION void prefetch(const char* read, const char* written) {
  __builtin_prefetch(read + 2048, 0);
  __builtin_prefetch(written + 4096, 1);
}

template <class S>
void wide_backward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  constexpr int kSize = Vec<S>::kSize;
  CrossEntropyRows<S> rows(task);
  S buffer[kRowTile];
  const TensorView gradient{task.gradient.data, nullptr, task.gradient.dtype};
  const int64_t source_size = size_of(task.logits.dtype), target_size = size_of(gradient.dtype);
  const LogitMap<S> map(task);
  const double inverse_temperature = 1 / task.temperature;
  for (int64_t row = first_row; row < last_row; ++row) {
    const bool ignored = is_ignored(task, row);
    const double upstream = task.scale[row] * inverse_temperature, log_sum = task.lse.log_sum[row];
    const double label_mass = upstream * label_mass_of(task, row);
    const Vec<S> peak(static_cast<S>(task.lse.peak[row])), log_sums(static_cast<S>(log_sum));
    const Vec<S> probability_factor(
        ignored ? S(0)
                : static_cast<S>((upstream * rows.total_mass(row) + task.lse_scale[row] * inverse_temperature) *
                                 SoftmaxCrossEntropy::rounding_of<S>(log_sum)));
    const Vec<S> mass_scale(static_cast<S>(upstream));
    rows.for_each_tile([&](int64_t at, int count) {
      const int64_t place = row * task.gradient.stride + at;
      const bool whole = count == padded(count);
      S* out = whole && is_run_of<S>(gradient) ? static_cast<S*>(gradient.data) + place : buffer;
      if (ignored) {
        for (int i = 0; i < count; ++i) out[i] = S(0);
      } else {
        const S* x = rows.logits(row, at, count, S(0));
        const S* mass = has_mass(task) ? rows.masses(row, at, count) : nullptr;
        const bool has_label = task.labels != nullptr && task.labels[row] >= at && task.labels[row] < at + count;
        const int label = has_label ? static_cast<int>(task.labels[row] - at) : 0;
        S label_derivative = S(1);
        if (has_label && map.cap != 0) label_derivative = map.derivative(x[label]);
        const char* source = static_cast<const char*>(task.logits.data) + (row * task.logits.stride + at) * source_size;
        const char* target = static_cast<const char*>(gradient.data) + place * target_size;
        for (int i = 0; i < padded(count); i += kSize) {
          const Vec<S> tile = load(x + i);
          const Vec<S> masses = mass == nullptr ? Vec<S>(S(0)) : load(mass + i) * mass_scale;
          Vec<S> derivative = SoftmaxCrossEntropy::derivative(tile, peak, log_sums, probability_factor, masses);
          if (map.cap != 0) derivative = derivative * map.derivative(tile);
          store(out + i, derivative);
          prefetch(source + i * source_size, target + i * target_size);
        }
        if (has_label) out[label] -= static_cast<S>(label_mass) * label_derivative;
      }
      if (out != buffer) return;
      if (is_run_of<S>(gradient)) {
        __builtin_memcpy(static_cast<S*>(gradient.data) + place, buffer, count * sizeof(S));
      } else {
        store_tile(gradient, place, count, buffer);
      }
    });
  }
}

}  // namespace
}  // namespace trainopt::cpu
