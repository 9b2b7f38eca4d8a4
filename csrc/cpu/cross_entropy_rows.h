// The inner loops of cross-entropy, row by row: for more than a few classes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/elementary_vec.h"
#include "cpu/losses.h"
#include "cpu/stream.h"
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
    S one = S(0);
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
    if (task_.labels != nullptr) return label_mass_of(task_, row) + spread_mass_of(task_, task_.total_weight);
    LaneSums<S> sums;
    for_each_tile([&](int64_t at, int count) {
      const S* mass = masses(row, at, count);
      Group<S> lanes(S(0));
      for (int i = 0; i < padded(count); i += kLanes)
        for (int p = 0; p < Group<S>::kParts; ++p) lanes.part[p] = lanes.part[p] + load(mass + i + p * Group<S>::kSize);
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

// 2 KiB ahead for reads and 4 KiB for writes: a third faster when measured, as memory here is written while it is read
// or just after.
TRAINOPT_FUNCTION void prefetch(const void* read, const void* written) {
  prefetch_behind<0>(read, kReadAhead);
  prefetch_behind<1>(written, 4096);
}

// The sums over one row whose elements are Stored, relative to `shift`, the largest logit so far.
template <class S, class Stored>
struct RowSums {
  using Registers = Group<Stored>;
  static constexpr int kSize = Registers::kSize, kParts = Registers::kParts;

  S largest = -kInfinity<S>;
  double shift = 0;
  LaneSums<Stored> exponentials;
  double mass = 0, mass_times_logit = 0;

  // `count` logits, a whole number of groups. Those behind the tile are prefetched: while a tile is summed, nothing
  // else is read.
  void add_logits(const Stored* x, int count) {
    raise(x, count);
    const Register<Stored> by(static_cast<S>(shift));
    Registers sums(S(0));
    for (int i = 0; i < count; i += kLanes) {
      for (size_t line = 0; line < kLanes * sizeof(Stored); line += 64)
        prefetch_behind<0>(x + i, kRowTile * sizeof(Stored) + line);
      for (int p = 0; p < kParts; ++p)
        sums.part[p] = sums.part[p] + exponential_of_negative(load(x + i + p * kSize) - by);
    }
    exponentials.add(sums);
  }

  // The same logits, each with this mass.
  void add_even_mass(const Stored* x, int count, double of_each) {
    const Register<Stored> by(static_cast<S>(shift));
    Registers sums(S(0));
    const int whole = count / kLanes * kLanes;
    for (int i = 0; i < whole; i += kLanes)
      for (int p = 0; p < kParts; ++p) sums.part[p] = sums.part[p] + (load(x + i + p * kSize) - by);
    LaneSums<Stored> below;
    below.add(sums);
    double sum = below.total();
    for (int i = whole; i < count; ++i) sum += static_cast<double>(from_stored(x[i])) - shift;
    mass += of_each * count;
    mass_times_logit += of_each * sum;
  }

  // The same logits, padded with anything finite, and their masses, padded with 0.
  void add_masses(const S* x, const S* mass_tile, int count) {
    const Vec<S> by(static_cast<S>(shift));
    Group<S> masses(S(0)), products(S(0));
    for (int i = 0; i < count; i += kLanes)
      for (int p = 0; p < Group<S>::kParts; ++p) {
        const int at = i + p * Group<S>::kSize;
        const Vec<S> m = load(mass_tile + at);
        masses.part[p] = masses.part[p] + m;
        products.part[p] = products.part[p] + m * (load(x + at) - by);
      }
    LaneSums<S> mass_sums, product_sums;
    mass_sums.add(masses);
    product_sums.add(products);
    mass += mass_sums.total();
    mass_times_logit += product_sums.total();
  }

 private:
  void raise(const Stored* x, int count) {
    Registers peaks(-kInfinity<S>);
    for (int i = 0; i < count; i += kLanes)
      for (int p = 0; p < kParts; ++p) peaks.part[p] = larger(load(x + i + p * kSize), peaks.part[p]);
    const S peak = trainopt::cpu::largest<S>(peaks);
    if (!(peak > largest)) return;
    exponentials.scale(__builtin_exp(static_cast<double>(largest) - static_cast<double>(peak)));
    mass_times_logit -= mass * (static_cast<double>(peak) - shift);
    largest = peak;
    shift = static_cast<double>(peak);
  }
};

template <class S, class Stored>
void finish_row(const CrossEntropyTask& task, int64_t row, const RowSums<S, Stored>& sums, double label_logit) {
  const double peak = static_cast<double>(sums.largest), log_sum = __builtin_log(sums.exponentials.total());
  task.lse.peak[row] = peak;
  task.lse.log_sum[row] = log_sum;
  if (is_ignored(task, row)) {
    task.loss[row] = 0;
    return;
  }
  double loss = has_mass(task) ? sums.mass * log_sum - sums.mass_times_logit : 0;
  if (task.labels != nullptr) loss += label_mass_of(task, row) * ((peak - label_logit) + log_sum);
  task.loss[row] = loss;
}

// The numbers that make a row's gradient.
template <class S>
struct RowGradient {
  double upstream, label_mass;
  S peak, probability_factor;

  RowGradient(const CrossEntropyTask& task, int64_t row, double total_mass) {
    const double inverse_temperature = 1 / task.temperature;
    upstream = task.scale[row] * inverse_temperature;
    label_mass = upstream * label_mass_of(task, row);
    peak = quiet(static_cast<S>(task.lse.peak[row]));
    probability_factor = static_cast<S>((upstream * total_mass + task.lse_scale[row] * inverse_temperature) *
                                        __builtin_exp(-task.lse.log_sum[row]));
    upstream = quiet(upstream), probability_factor = quiet(probability_factor);
  }

 private:
  // A NaN without a payload, which is what a Pair stores.
  template <class T>
  static T quiet(T x) {
    return x != x ? static_cast<T>(__builtin_nan("")) : x;
  }
};

// Rows as they lie in memory ------------------------------------------------------------------------------------------

// Logits of one dtype that are those of the softmax, and a mass that is the label's, or the same for all classes beside
// it: nothing but what is loaded and stored passes through memory.
template <class S, class Stored>
bool is_direct(const CrossEntropyTask& task) {
  return task.logits.dtype == kDTypeOf<Stored> && LogitMap<S>(task).is_identity &&
         (!has_mass(task) || (task.labels != nullptr && task.weight == nullptr));
}

// The elements beyond a row's last whole group, padded to a group.
template <class Stored>
struct RestOfRow {
  int64_t at;
  int count;
  Stored elements[kLanes];

  RestOfRow(const Stored* row, int64_t classes, float padding)
      : at(classes / kLanes * kLanes), count(static_cast<int>(classes - at)) {
    for (int i = count; i < kLanes; ++i) to_stored(padding, &elements[i]);
    __builtin_memcpy(elements, row + at, count * sizeof(Stored));
  }
};

template <class S, class Stored>
void direct_forward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  const double spread = spread_of(task);
  for (int64_t row = first_row; row < last_row; ++row) {
    const Stored* x = static_cast<const Stored*>(task.logits.data) + row * task.logits.stride;
    RowSums<S, Stored> sums;
    const auto add = [&](const Stored* tile, int padded_count, int count) {
      sums.add_logits(tile, padded_count);
      if (spread != 0) sums.add_even_mass(tile, count, spread);
    };
    const RestOfRow<Stored> rest(x, task.classes, -__builtin_inff());
    for (int64_t at = 0; at < rest.at; at += kRowTile) {
      const int count = static_cast<int>(rest.at - at < kRowTile ? rest.at - at : kRowTile);
      add(x + at, count, count);
    }
    if (rest.count != 0) add(rest.elements, kLanes, rest.count);
    const bool has_label = task.labels != nullptr && !is_ignored(task, row);
    finish_row(task, row, sums, has_label ? static_cast<double>(from_stored(x[task.labels[row]])) : 0);
  }
}

template <class S, class Stored>
void direct_backward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  constexpr int kSize = Register<Stored>::kSize;
  const double spread = spread_of(task), spread_mass = spread_mass_of(task, task.total_weight);
  for (int64_t row = first_row; row < last_row; ++row) {
    const Stored* x = static_cast<const Stored*>(task.logits.data) + row * task.logits.stride;
    Stored* out = static_cast<Stored*>(task.gradient.data) + row * task.gradient.stride;
    if (is_ignored(task, row)) {
      __builtin_memset(out, 0, task.classes * sizeof(Stored));
      continue;
    }
    const RowGradient<S> of_row(task, row, label_mass_of(task, row) + spread_mass);
    const S mass = spread == 0 ? S(0) : static_cast<S>(spread * of_row.upstream);  // though upstream may be infinite
    const auto derivative = [&](auto logit) {
      using T = decltype(logit);
      return SoftmaxCrossEntropy::derivative(logit - T(of_row.peak), T(of_row.probability_factor), T(mass));
    };
    const int64_t label = task.labels[row];
    // Before anything is written: `out` may be the logits' own memory.
    const S at_label = derivative(static_cast<S>(from_stored(x[label]))) - static_cast<S>(of_row.label_mass);
    const auto partial = [&](int64_t at, int64_t count) {
      Stored part[kSize] = {};
      __builtin_memcpy(part, x + at, count * sizeof(Stored));
      store(part, derivative(load(part)));
      __builtin_memcpy(out + at, part, count * sizeof(Stored));
    };
    int64_t i = task.streams ? std::min(elements_to_boundary<Stored>(out), task.classes) : 0;
    if (i != 0) partial(0, i);
    if (task.streams) {
      for (; i + kSize <= task.classes; i += kSize) {
        stream(out + i, derivative(load(x + i)));
        prefetch_behind<0>(x + i, kReadAhead);
      }
    } else {
      for (; i + kSize <= task.classes; i += kSize) {
        store(out + i, derivative(load(x + i)));
        prefetch(x + i, out + i);
      }
    }
    if (i < task.classes) partial(i, task.classes - i);
    to_stored(at_label, &out[label]);
  }
  if (task.streams) finish_streaming();
}

// Rows by way of tiles ------------------------------------------------------------------------------------------------

template <class S>
void tiled_forward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  CrossEntropyRows<S> rows(task);
  for (int64_t row = first_row; row < last_row; ++row) {
    RowSums<S, S> sums;
    rows.for_each_tile([&](int64_t at, int count) {
      const S* x = rows.logits(row, at, count, -kInfinity<S>);
      sums.add_logits(x, padded(count));
      if (!has_mass(task)) return;
      if (count != padded(count)) rows.pad_logits(count, S(0));
      sums.add_masses(x, rows.masses(row, at, count), padded(count));
    });
    const bool has_label = task.labels != nullptr && !is_ignored(task, row);
    finish_row(task, row, sums, has_label ? rows.logit(row, task.labels[row]) : 0);
  }
}

template <class S>
void tiled_backward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  constexpr int kSize = Vec<S>::kSize;
  CrossEntropyRows<S> rows(task);
  S buffer[kRowTile];
  const TensorView gradient{task.gradient.data, nullptr, task.gradient.dtype};
  const int64_t source_size = size_of(task.logits.dtype), target_size = size_of(gradient.dtype);
  const LogitMap<S> map(task);
  for (int64_t row = first_row; row < last_row; ++row) {
    const bool ignored = is_ignored(task, row);
    const RowGradient<S> of_row(task, row, ignored ? 0 : rows.total_mass(row));
    const Vec<S> peak(of_row.peak), probability_factor(of_row.probability_factor);
    const Vec<S> mass_scale(static_cast<S>(of_row.upstream));
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
        char* target = static_cast<char*>(gradient.data) + place * target_size;
        for (int i = 0; i < padded(count); i += kSize) {
          const Vec<S> tile = load(x + i);
          const Vec<S> masses = mass == nullptr ? Vec<S>(S(0)) : load(mass + i) * mass_scale;
          Vec<S> derivative = SoftmaxCrossEntropy::derivative(tile - peak, probability_factor, masses);
          if (map.cap != 0) derivative = derivative * map.derivative(tile);
          store(out + i, derivative);
          prefetch(source + i * source_size, target + i * target_size);
        }
        if (has_label) out[label] -= static_cast<S>(of_row.label_mass) * label_derivative;
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

// Calls use(Stored()) for the types that are computed on in S, until it returns true; whether it did.
template <class S, class Use>
TRAINOPT_FUNCTION bool for_any_stored(Use use) {
  if constexpr (sizeof(S) == sizeof(double)) {
    return use(double());
  } else {
    return use(float()) || use(BFloat16()) || use(Float16());
  }
}

// Either
// ----------------------------------------------------------------------------------------------------------------

template <class S>
void rows_forward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  const auto run = [&](auto stored) {
    using Stored = decltype(stored);
    if (!is_direct<S, Stored>(task)) return false;
    direct_forward<S, Stored>(task, first_row, last_row);
    return true;
  };
  if (!for_any_stored<S>(run)) tiled_forward<S>(task, first_row, last_row);
}

template <class S>
void rows_backward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  const auto run = [&](auto stored) {
    using Stored = decltype(stored);
    if (!is_direct<S, Stored>(task) || task.labels == nullptr || task.gradient.dtype != kDTypeOf<Stored>) return false;
    direct_backward<S, Stored>(task, first_row, last_row);
    return true;
  };
  if (!for_any_stored<S>(run)) tiled_backward<S>(task, first_row, last_row);
}

}  // namespace
}  // namespace trainopt::cpu
