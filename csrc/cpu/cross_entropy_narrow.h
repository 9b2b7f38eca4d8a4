// The inner loops of cross-entropy for few classes: a lane is a row, and a group of rows is worked on class by class.
#pragma once

#include "cpu/cross_entropy_wide.h"

namespace trainopt::cpu {
namespace {

constexpr int kFewClasses = 64;

template <class S>
class NarrowGroup {
 public:
  explicit NarrowGroup(const CrossEntropyTask& task)
      : task_(task), classes_(static_cast<int>(task.classes)), spread_(spread_of(task)) {}

  void set_rows(int64_t first, int64_t last) {
    first_ = first;
    count_ = static_cast<int>(last - first);
  }
  int count() const { return count_; }

  // Brings in the group's logits and, where they have one, masses.
  void load_columns() {
    transpose_in(task_.logits, logits_);
    if (task_.softcap != 0)
      for (int i = 0; i < classes_ * kLanes; i += Vec<S>::kSize)
        store(logits_ + i, SoftmaxCrossEntropy::capped(load(logits_ + i), Vec<S>(static_cast<S>(task_.softcap))));
    if (task_.labels != nullptr) return;
    transpose_in(task_.probabilities, masses_);
    const Vec<S> keep(static_cast<S>(1 - task_.smoothing)), spread(static_cast<S>(spread_));
    for (int c = 0; c < classes_; ++c) {
      const Vec<S> weight(static_cast<S>(weight_of(c)));
      for (int i = c * kLanes; i < (c + 1) * kLanes; i += Vec<S>::kSize)
        store(masses_ + i, (load(masses_ + i) * keep + spread) * weight);
    }
  }

  // The logits of class c in rows [lane, lane + vector), and their masses beside the spike.
  Vec<S> logit(int c, int lane) const { return load(logits_ + c * kLanes + lane); }
  Vec<S> mass(int c, int lane) const {
    if (task_.labels == nullptr) return load(masses_ + c * kLanes + lane);
    return Vec<S>(static_cast<S>(spread_ * weight_of(c)));
  }
  S& at(int64_t c, int row) { return logits_[c * kLanes + row]; }

  // Takes what now stands in place of the logits to the rows of `to`.
  void transpose_out(const Rows& to) {
    for (int row = 0; row < count_; ++row) {
      const int64_t place = (first_ + row) * to.stride;
      for (int c = 0; c < classes_; ++c) block_[row * classes_ + c] = at(c, row);
      put(to, place, block_ + row * classes_);
    }
  }

 private:
  const CrossEntropyTask& task_;
  const int classes_;
  const double spread_;
  int64_t first_ = 0;
  int count_ = 0;
  S block_[kFewClasses * kLanes], logits_[kFewClasses * kLanes], masses_[kFewClasses * kLanes];

  double weight_of(int c) const { return task_.weight == nullptr ? 1 : task_.weight[c]; }

  void transpose_in(const Rows& from, S* columns) {
    for (int row = 0; row < count_; ++row) {
      const S* values = load_row_tile(from, first_ + row, 0, classes_, block_);
      for (int c = 0; c < classes_; ++c) columns[c * kLanes + row] = values[c];
    }
    for (int row = count_; row < kLanes; ++row)
      for (int c = 0; c < classes_; ++c) columns[c * kLanes + row] = S(0);
  }

  void put(const Rows& to, int64_t place, const S* values) {
    const TensorView view{to.data, nullptr, to.dtype};
    if (is_run_of<S>(view)) {
      __builtin_memcpy(static_cast<S*>(to.data) + place, values, classes_ * sizeof(S));
    } else {
      store_tile(view, place, classes_, values);
    }
  }
};

template <class S>
void narrow_forward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  constexpr int kSize = Vec<S>::kSize;
  const int classes = static_cast<int>(task.classes);
  NarrowGroup<S> group(task);
  S largest[kLanes], log_sum[kLanes], mass[kLanes] = {}, mass_times_logit[kLanes] = {};
  for (int64_t first = first_row; first < last_row; first += kLanes) {
    group.set_rows(first, first + kLanes < last_row ? first + kLanes : last_row);
    group.load_columns();
    for (int lane = 0; lane < kLanes; lane += kSize) {
      Vec<S> peak(-kInfinity<S>), sum(S(0));
      for (int c = 0; c < classes; ++c) peak = larger(group.logit(c, lane), peak);
      for (int c = 0; c < classes; ++c) sum = sum + exponential(group.logit(c, lane) - peak);
      store(largest + lane, peak);
      store(log_sum + lane, logarithm(sum));
      if (!has_mass(task)) continue;
      Vec<S> masses(S(0)), products(S(0));
      for (int c = 0; c < classes; ++c) {
        const Vec<S> m = group.mass(c, lane);
        masses = masses + m;
        products = products + m * (group.logit(c, lane) - peak);
      }
      store(mass + lane, masses);
      store(mass_times_logit + lane, products);
    }
    for (int row = 0; row < group.count(); ++row) {
      const double peak = static_cast<double>(largest[row]), above = static_cast<double>(log_sum[row]);
      task.lse[first + row] = peak + above;
      double loss = static_cast<double>(mass[row]) * above - static_cast<double>(mass_times_logit[row]);
      if (is_ignored(task, first + row)) {
        loss = 0;
      } else if (task.labels != nullptr) {
        const double logit = static_cast<double>(group.at(task.labels[first + row], row));
        loss += spike_of(task, first + row) * (peak - logit + above);
      }
      task.loss[first + row] = loss;
    }
  }
}

template <class S>
void narrow_backward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  constexpr int kSize = Vec<S>::kSize;
  const int classes = static_cast<int>(task.classes);
  NarrowGroup<S> group(task);
  const Vec<S> cap(static_cast<S>(task.softcap));
  S high[kLanes] = {}, low[kLanes] = {}, upstream[kLanes] = {}, lse_scale[kLanes] = {}, spike[kLanes] = {},
    label_slope[kLanes];
  for (int64_t first = first_row; first < last_row; first += kLanes) {
    group.set_rows(first, first + kLanes < last_row ? first + kLanes : last_row);
    group.load_columns();
    for (int row = 0; row < group.count(); ++row) {
      const double lse = task.lse[first + row];
      high[row] = static_cast<S>(lse);
      low[row] = static_cast<S>(lse - static_cast<double>(high[row]));
      upstream[row] = static_cast<S>(task.scale[first + row]);
      lse_scale[row] = static_cast<S>(task.lse_scale[first + row]);
      if (task.labels == nullptr || is_ignored(task, first + row)) continue;
      spike[row] = static_cast<S>(task.scale[first + row] * spike_of(task, first + row));
      label_slope[row] = task.softcap == 0 ? S(1)
                                           : SoftmaxCrossEntropy::cap_slope(group.at(task.labels[first + row], row),
                                                                            static_cast<S>(task.softcap));
    }
    for (int lane = 0; lane < kLanes; lane += kSize) {
      const Vec<S> scale = load(upstream + lane);
      Vec<S> share = load(lse_scale + lane) + load(spike + lane);
      if (has_mass(task)) {
        Vec<S> masses(S(0));
        for (int c = 0; c < classes; ++c) masses = masses + group.mass(c, lane);
        share = share + masses * scale;
      }
      for (int c = 0; c < classes; ++c) {
        const Vec<S> x = group.logit(c, lane), mass = has_mass(task) ? group.mass(c, lane) * scale : Vec<S>(S(0));
        Vec<S> slope = SoftmaxCrossEntropy::slope(x, load(high + lane), load(low + lane), share, mass);
        if (task.softcap != 0) slope = slope * SoftmaxCrossEntropy::cap_slope(x, cap);
        store(&group.at(c, lane), slope);
      }
    }
    for (int row = 0; row < group.count(); ++row) {
      if (is_ignored(task, first + row)) {
        for (int c = 0; c < classes; ++c) group.at(c, row) = S(0);
      } else if (task.labels != nullptr) {
        group.at(task.labels[first + row], row) -= spike[row] * label_slope[row];
      }
    }
    group.transpose_out(task.gradient);
  }
}

}  // namespace
}  // namespace trainopt::cpu
