// The pieces of cross-entropy's kernels that do not depend on how the threads share the rows: how a thread reads and
// writes some classes of a row, what it sums over them, and what comes of a row's sums.
#pragma once

#include "cuda/access.h"
#include "cuda/cross_entropy.h"
#include "cuda/reduce.h"
#include "losses/softmax_cross_entropy.h"

namespace trainopt::cuda {

template <class S>
constexpr S kInfinity = static_cast<S>(__builtin_inf());

// Where class 0 of a row lies.
__device__ __forceinline__ int64_t start_of(const CrossEntropyBatch& batch, const Rows& rows, int64_t row) {
  if (batch.inner == 1) return row * rows.stride;
  return row / batch.inner * rows.stride + row % batch.inner;
}

// The classes of a row that a thread has at one time
// -------------------------------------------------------------------

// Eight side by side, in 16-byte words.
struct Together {
  static constexpr int kCount = kItem;
  int64_t at;

  __device__ __forceinline__ int64_t class_of(int k) const { return at + k; }
  __device__ __forceinline__ bool has(int) const { return true; }
  __device__ __forceinline__ int place_of(int64_t c) const {
    return at <= c && c < at + kCount ? static_cast<int>(c - at) : -1;
  }
  template <class S>
  __device__ __forceinline__ void load(const Rows& rows, int64_t start, S, S (&x)[kCount]) const {
    widen_words(fetch(rows.data, rows.dtype, start + at, S()), rows.dtype, x);
  }
  template <class S>
  __device__ __forceinline__ void store(const Rows& rows, int64_t start, const S (&x)[kCount]) const {
    store_item(rows.data, rows.dtype, start + at, x);
  }
};

// Up to kMost, kStep apart.
template <int kMost, int kStep>
struct Apart {
  static constexpr int kCount = kMost;
  int64_t at;
  int count;

  __device__ __forceinline__ int64_t class_of(int k) const { return at + k * kStep; }
  __device__ __forceinline__ bool has(int k) const { return k < count; }
  __device__ __forceinline__ int place_of(int64_t c) const {
    const int64_t from = c - at;
    return 0 <= from && from < kCount * kStep && from % kStep == 0 ? static_cast<int>(from / kStep) : -1;
  }
  template <class S>
  __device__ __forceinline__ void load(const Rows& rows, int64_t start, S otherwise, S (&x)[kCount]) const {
    load_apart(rows.data, rows.dtype, start + at, kStep, count, otherwise, x);
  }
  template <class S>
  __device__ __forceinline__ void store(const Rows& rows, int64_t start, const S (&x)[kCount]) const {
    store_apart(rows.data, rows.dtype, start + at, kStep, count, x);
  }
};

// Up to eight that follow each other, wherever the rows' classes lie.
struct Strided {
  static constexpr int kCount = kItem;
  int64_t at;
  int count;

  __device__ __forceinline__ int64_t class_of(int k) const { return at + k; }
  __device__ __forceinline__ bool has(int k) const { return k < count; }
  __device__ __forceinline__ int place_of(int64_t c) const {
    return at <= c && c < at + count ? static_cast<int>(c - at) : -1;
  }
  template <class S>
  __device__ __forceinline__ void load(const Rows& rows, int64_t start, S otherwise, S (&x)[kCount]) const {
    load_apart(rows.data, rows.dtype, start + at * rows.class_stride, rows.class_stride, count, otherwise, x);
  }
  template <class S>
  __device__ __forceinline__ void store(const Rows& rows, int64_t start, const S (&x)[kCount]) const {
    store_apart(rows.data, rows.dtype, start + at * rows.class_stride, rows.class_stride, count, x);
  }
};

// Logits and masses
// ----------------------------------------------------------------------------------------------------

// Numbers that the host has computed for the kernel.
template <class S>
struct Constants {
  S cap, spread, keep;
  bool has_mass;
  double exact_spread;

  explicit Constants(const CrossEntropyBatch& batch)
      : cap(softcap_in<S>(batch.softcap)),
        spread(static_cast<S>(spread_of(batch))),
        keep(static_cast<S>(1 - batch.smoothing)),
        has_mass(trainopt::has_mass(batch)),
        exact_spread(spread_of(batch)) {}
};

// Capped; -infinity for those that the item does not have.
template <class S, class Item>
__device__ __forceinline__ void load_logits(const CrossEntropyTask& task, const Constants<S>& constants, int64_t start,
                                            const Item& item, S (&x)[Item::kCount]) {
  item.load(task.logits, start, -kInfinity<S>, x);
  if (constants.cap == 0) return;
#pragma unroll
  for (int k = 0; k < Item::kCount; ++k)
    x[k] = item.has(k) ? SoftmaxCrossEntropy::capped(x[k], constants.cap) : -kInfinity<S>;
}

template <class S>
__device__ __forceinline__ S load_logit(const CrossEntropyTask& task, const Constants<S>& constants, int64_t start,
                                        int64_t c) {
  const S x = load_one<S>(task.logits.data, task.logits.dtype, start + c * task.logits.class_stride);
  return constants.cap == 0 ? x : SoftmaxCrossEntropy::capped(x, constants.cap);
}

template <class S>
__device__ __forceinline__ S weight_of(const CrossEntropyTask& task, int64_t c) {
  return task.weight == nullptr ? S(1) : static_cast<const S*>(task.weight)[c];
}

// The masses beside the spike, and zeros for classes that the item does not have. `start` is that of the probabilities.
template <class S, class Item>
__device__ __forceinline__ void load_masses(const CrossEntropyTask& task, const Constants<S>& constants, int64_t start,
                                            const Item& item, S (&mass)[Item::kCount]) {
  if (task.labels == nullptr) item.load(task.probabilities, start, S(0), mass);
#pragma unroll
  for (int k = 0; k < Item::kCount; ++k) {
    mass[k] = task.labels == nullptr ? mass[k] * constants.keep + constants.spread : constants.spread;
    if (!item.has(k)) {
      mass[k] = S(0);
    } else if (task.weight != nullptr) {
      mass[k] = mass[k] * weight_of<S>(task, item.class_of(k));
    }
  }
}

// The sum of an item's numbers, in one order; they are lost.
template <int kCount, class S>
__device__ __forceinline__ S sum_of(S (&part)[kCount]) {
#pragma unroll
  for (int width = kCount / 2; width > 0; width /= 2)
#pragma unroll
    for (int k = 0; k < width; ++k) part[k] = part[k] + part[k + width];
  return part[0];
}

// Sums over a row
// ------------------------------------------------------------------------------------------------------

// Of e^(x - shift), of masses, and of masses times (x - shift). `shift` is the largest logit so far, or 0 before there
// is one. A is the accumulators' type.
template <class S, class A>
struct RowSums {
  S largest = -kInfinity<S>, shift = 0;
  A exponentials = 0, mass = 0, mass_times_logit = 0;

  __device__ __forceinline__ void raise(S peak) {
    if (!(largest < peak)) return;
    exponentials = exponentials * static_cast<A>(exponential(largest - peak));
    mass_times_logit = mass_times_logit - mass * static_cast<A>(peak - shift);
    largest = shift = peak;
  }

  template <class Item>
  __device__ __forceinline__ void add(const CrossEntropyTask& task, const Constants<S>& constants, int64_t start,
                                      int64_t probabilities_start, const Item& item) {
    S x[Item::kCount], part[Item::kCount], peak = largest;
    load_logits(task, constants, start, item, x);
#pragma unroll
    for (int k = 0; k < Item::kCount; ++k) peak = select_less(peak, x[k], x[k], peak);
    raise(peak);
#pragma unroll
    for (int k = 0; k < Item::kCount; ++k) part[k] = exponential(x[k] - shift);
    exponentials += static_cast<A>(sum_of(part));
    if (!constants.has_mass) return;
    S masses[Item::kCount];
    load_masses(task, constants, probabilities_start, item, masses);
#pragma unroll
    for (int k = 0; k < Item::kCount; ++k) part[k] = item.has(k) ? masses[k] * (x[k] - shift) : S(0);
    mass += static_cast<A>(sum_of(masses));
    mass_times_logit += static_cast<A>(sum_of(part));
  }
};

// The sums of all lanes; each has the result.
template <class S>
__device__ __forceinline__ RowSums<S, S> combine_sums(RowSums<S, S> sums, bool has_mass) {
  const auto plus = [](S a, S b) { return a + b; };
  sums.raise(combine_warp(sums.largest, [](S a, S b) { return select_less(a, b, b, a); }));
  sums.exponentials = combine_warp(sums.exponentials, plus);
  if (has_mass) {
    sums.mass = combine_warp(sums.mass, plus);
    sums.mass_times_logit = combine_warp(sums.mass_times_logit, plus);
  }
  return sums;
}

// What comes of a row
// --------------------------------------------------------------------------------------------------

// A row's label as the kernels use it.
struct Label {
  int64_t index;  // -1: none
  bool ignored, bad;
};

__device__ __forceinline__ Label label_of(const CrossEntropyTask& task, int64_t row) {
  if (task.labels == nullptr) return {-1, false, false};
  const int64_t index = task.labels[row];
  if (index == task.ignore_index) return {-1, true, false};
  if (index < 0 || index >= task.classes) return {-1, false, true};
  return {index, false, false};
}

// What one thread has added up of its rows.
struct LossSums {
  double loss = 0, z = 0, denominator = 0, rows = 0;
  int64_t bad = kNoRow;
};

// Writes what is kept of a row, and adds it to the thread's sums.
template <class S, class A>
__device__ __forceinline__ void finish_row(const ForwardWork& work, const Constants<S>& constants, int64_t row,
                                           const RowSums<S, A>& sums, LossSums& all) {
  const CrossEntropyTask& task = work.task;
  const double peak = static_cast<double>(sums.largest);
  const double log_sum = static_cast<double>(logarithm(static_cast<S>(sums.exponentials)));
  task.lse.peak[row] = peak;
  task.lse.log_sum[row] = log_sum;
  const Label label = label_of(task, row);
  double loss = 0, z = 0;
  if (!label.ignored) {
    if (constants.has_mass)
      loss = static_cast<double>(sums.mass) * log_sum - static_cast<double>(sums.mass_times_logit);
    double weight = 1;
    if (label.index >= 0) {
      weight = static_cast<double>(weight_of<S>(task, label.index));
      const double logit =
          static_cast<double>(load_logit(task, constants, start_of(task, task.logits, row), label.index));
      loss += (1 - task.smoothing) * weight * ((peak - logit) + log_sum);
    }
    if (label.bad) {
      loss = __builtin_nan("");
      const int64_t place = work.first_row + row;
      all.bad = place < all.bad ? place : all.bad;
    }
    z = task.z_loss * (peak + log_sum) * (peak + log_sum);
    all.denominator += weight;
    all.rows += 1;
  }
  all.loss += loss;
  all.z += z;
  if (work.loss.data != nullptr) store_one(work.loss.data, work.loss.dtype, row, loss + z);
  if (work.z.data != nullptr) store_one(work.z.data, work.z.dtype, row, z);
}

// The sums of a block's threads, as one partial.
template <int kWarps>
__device__ __forceinline__ void write_partial(const ForwardWork& work, LossSums sums) {
  const auto plus = [](double a, double b) { return a + b; };
  TRAINOPT_SHARED(double, losses, kWarps);
  TRAINOPT_SHARED(double, counts, kWarps);
  TRAINOPT_SHARED(double, z_losses, kWarps);
  TRAINOPT_SHARED(double, denominators, kWarps);
  TRAINOPT_SHARED(int64_t, first_bad, kWarps);
  sums.loss = combine_block<kWarps>(sums.loss, losses, plus);
  sums.rows = combine_block<kWarps>(sums.rows, counts, plus);
  if (work.task.z_loss != 0) sums.z = combine_block<kWarps>(sums.z, z_losses, plus);
  if (work.task.weight != nullptr)
    sums.denominator = combine_block<kWarps>(sums.denominator, denominators, plus);
  else
    sums.denominator = sums.rows;
  sums.bad = combine_block<kWarps>(sums.bad, first_bad, [](int64_t a, int64_t b) { return b < a ? b : a; });
  if (threadIdx.x == 0) work.partials[blockIdx.x] = {sums.loss, sums.z, sums.denominator, sums.rows, sums.bad};
}

// Backward
// -------------------------------------------------------------------------------------------------------------

// What the gradient of a row's logits is made of.
template <class S>
struct RowSlopes {
  S peak, log_sum;    // lse
  S upstream, share;  // of the masses, and of the probabilities
  S spike;
  int64_t label;  // -1: none
  bool ignored;

  // `mass` is that of all classes beside the spike; 0 for labels, whose masses have a sum that is known.
  __device__ __forceinline__ RowSlopes(const BackwardWork& work, const Constants<S>& constants,
                                       const TargetTotals& totals, int64_t row, double mass) {
    const CrossEntropyTask& task = work.task;
    const Label found = label_of(task, row);
    const double above =
        work.upstream == nullptr ? 1 : load_one<double>(work.upstream, work.upstream_dtype, row * work.upstream_stride);
    const double scale = above * totals.loss_factor, exact_log_sum = task.lse.log_sum[row];
    double at_label = 0, all = mass;
    if (task.labels != nullptr) {
      if (found.index >= 0) at_label = (1 - task.smoothing) * static_cast<double>(weight_of<S>(task, found.index));
      all = at_label + (constants.has_mass ? constants.exact_spread * totals.weight : 0);
    }
    const double of_lse = task.z_loss == 0 ? 0 : 2 * task.z_loss * task.lse.of(row) * (above * totals.z_factor);
    peak = static_cast<S>(task.lse.peak[row]);
    log_sum = static_cast<S>(exact_log_sum);
    upstream = static_cast<S>(scale);
    spike = static_cast<S>(scale * at_label);
    share = found.bad ? static_cast<S>(__builtin_nan(""))
                      : static_cast<S>((scale * all + of_lse) * SoftmaxCrossEntropy::rounding_of<S>(exact_log_sum));
    label = found.index;
    ignored = found.ignored;
  }

  template <class Item>
  __device__ __forceinline__ void write(const BackwardWork& work, const Constants<S>& constants, int64_t start,
                                        int64_t probabilities_start, int64_t gradient_start, const Item& item) const {
    S x[Item::kCount] = {}, mass[Item::kCount] = {};
    if (!ignored) {
      load_logits(work.task, constants, start, item, x);
      if (constants.has_mass) load_masses(work.task, constants, probabilities_start, item, mass);
      const int label_place = item.place_of(label);
#pragma unroll
      for (int k = 0; k < Item::kCount; ++k) {
        const S taken = constants.has_mass ? mass[k] * upstream : S(0);
        S slope = SoftmaxCrossEntropy::slope(x[k], peak, log_sum, share, taken);
        if (k == label_place) slope = slope - spike;
        if (constants.cap != 0) slope = slope * SoftmaxCrossEntropy::cap_slope(x[k], constants.cap);
        x[k] = slope;
      }
    }
    item.store(work.gradient, gradient_start, x);
  }
};

}  // namespace trainopt::cuda
