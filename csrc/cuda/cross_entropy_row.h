// The pieces of cross-entropy's kernels that do not depend on how the threads share the rows: how a thread
// reads and writes some classes of a row, what it sums over them, and what comes of a row's sums. cross_entropy_plain.h
// has faster ones for the plain case.
#pragma once

#include "cuda/access.h"
#include "cuda/cross_entropy.h"
#include "cuda/elementary.h"
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

// How many elements of a row come before the first at which all tensors that are read are aligned to 16 bytes. What is
// written does not count: a row's sums have the same bits with a gradient and without.
struct Head {
  int elements = 0, period = 1;
  bool exists = true;

  __device__ __forceinline__ void align(const Rows& rows, int64_t start) {
    const int shift = rows.dtype == DType::kFloat64 ? 3 : rows.dtype == DType::kFloat32 ? 2 : 1;  // of a size in bytes
    const int mine = static_cast<int>(sizeof(uint4)) >> shift;
    const uint64_t address = reinterpret_cast<uint64_t>(rows.data) + (static_cast<uint64_t>(start) << shift);
    const int wanted = static_cast<int>((0 - address) % sizeof(uint4)) >> shift;
    const int shorter = mine < period ? mine : period;
    if (((wanted ^ elements) & (shorter - 1)) != 0) exists = false;
    if (mine <= period) return;
    elements = wanted;
    period = mine;
  }
};

// The classes of a row that a thread has at one time ----------------------------------------------------------------

// Whether the element `at` of a row is aligned to so many bytes.
__device__ __forceinline__ bool is_aligned(const Rows& rows, int64_t at, uint64_t bytes) {
  return (reinterpret_cast<uint64_t>(rows.data) + static_cast<uint64_t>(at * size_of(rows.dtype))) % bytes == 0;
}

// Eight side by side, in 16-byte words; written one by one where what is written is not aligned as what is read.
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
    unpack_words(fetch(rows.data, rows.dtype, start + at, S()), rows.dtype, x);
  }
  template <class S>
  __device__ __forceinline__ void store(const Rows& rows, int64_t start, const S (&x)[kCount]) const {
    if (is_aligned(rows, start + at, sizeof(uint4))) return store_item(rows.data, rows.dtype, start + at, x);
    store_apart(rows.data, rows.dtype, start + at, 1, kCount, x);
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

// Logits and masses -------------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ S exp_of(S x) {
  return value_of(exponential(Formula<S>(x)));
}

// Numbers that the host has computed for the kernel.
template <class S>
struct Constants {
  LogitMap<S> map;
  double inverse_temperature;
  S spread, keep;
  bool has_mass;

  explicit Constants(const CrossEntropyBatch& batch)
      : map(batch),
        inverse_temperature(1 / batch.temperature),
        spread(static_cast<S>(spread_of(batch))),
        keep(static_cast<S>(1 - batch.smoothing)),
        has_mass(trainopt::has_mass(batch)) {}

  __device__ __forceinline__ S mapped(S x) const { return map.is_identity ? x : value_of(map(Formula<S>(x))); }
};

// Of the softmax; -infinity for those that the item does not have.
template <class S, class Item>
__device__ __forceinline__ void load_logits(const CrossEntropyTask& task, const Constants<S>& constants, int64_t start,
                                            const Item& item, S (&x)[Item::kCount]) {
  item.load(task.logits, start, -kInfinity<S>, x);
  if (constants.map.is_identity) return;
#pragma unroll
  for (int k = 0; k < Item::kCount; ++k) x[k] = item.has(k) ? constants.mapped(x[k]) : -kInfinity<S>;
}

template <class S>
__device__ __forceinline__ S weight_of(const CrossEntropyTask& task, int64_t c) {
  return task.weight == nullptr ? S(1) : static_cast<const S*>(task.weight)[c];
}

// The masses beside the label's, and zeros for classes that the item does not have. `start` is that of the
// probabilities.
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

// A row's target ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t label_at(const CrossEntropyTask& task, int64_t row) {
  return task.labels == nullptr ? 0 : task.labels[row];
}

template <class S>
struct RowTarget {
  int64_t label = -1;  // -1: none
  bool ignored = false, bad = false;
  S weight = S(0);  // of the label's class

  RowTarget() = default;
  __device__ __forceinline__ RowTarget(const CrossEntropyTask& task, int64_t index) {
    if (task.labels == nullptr) return;
    ignored = index == task.ignore_index;
    bad = !ignored && (index < 0 || index >= task.classes);  // tests break this: a bad target let through
    if (ignored || bad) return;
    label = index;
    weight = weight_of<S>(task, index);
  }

  // The softmax's logit there.
  __device__ __forceinline__ S logit(const CrossEntropyTask& task, const Constants<S>& constants, int64_t row) const {
    if (label < 0) return S(0);
    const int64_t place = start_of(task, task.logits, row) + label * task.logits.class_stride;
    return constants.mapped(load_one<S>(task.logits.data, task.logits.dtype, place));
  }
};

// Sums over a row ---------------------------------------------------------------------------------------------------

// Of e^(x - shift), of masses, and of masses times (x - shift). `shift` is the largest logit so far, or 0 before there
// is one. A is the accumulators' type.
template <class S, class A = S>
struct RowSums {
  S largest = -kInfinity<S>, shift = 0;
  A exponentials = 0, mass = 0, mass_times_logit = 0;

  __device__ __forceinline__ void raise(S peak) {
    if (!(largest < peak)) return;
    exponentials = exponentials * static_cast<A>(exp_of(largest - peak));
    mass_times_logit = mass_times_logit - mass * static_cast<A>(peak - shift);
    largest = shift = peak;
  }

  template <class Item>
  __device__ __forceinline__ void add(const CrossEntropyTask& task, const Constants<S>& constants, int64_t start,
                                      int64_t probabilities_start, const Item& item) {
    S x[Item::kCount], part[Item::kCount], peak = largest;
    load_logits(task, constants, start, item, x);
#pragma unroll
    for (int k = 0; k < Item::kCount; ++k) peak = peak < x[k] ? x[k] : peak;
    raise(peak);
#pragma unroll
    for (int k = 0; k < Item::kCount; ++k) part[k] = exp_of(x[k] - shift);
    exponentials += static_cast<A>(sum_of(part));
    if (!constants.has_mass) return;
    S masses[Item::kCount];
    load_masses(task, constants, probabilities_start, item, masses);
#pragma unroll
    for (int k = 0; k < Item::kCount; ++k) part[k] = item.has(k) ? masses[k] * (x[k] - shift) : S(0);
    mass += static_cast<A>(sum_of(masses));
    mass_times_logit += static_cast<A>(sum_of(part));
  }

  // Of an ignored row, which nobody reads.
  __device__ __forceinline__ void set_ignored() {
    largest = S(0);
    exponentials = A(1);
  }
};

// The sums of all lanes; each has the result.
template <class S>
__device__ __forceinline__ RowSums<S> combine_sums(RowSums<S> sums, bool has_mass) {
  const auto plus = [](S a, S b) { return a + b; };
  sums.raise(combine_warp(sums.largest, [](S a, S b) { return a < b ? b : a; }));
  sums.exponentials = combine_warp(sums.exponentials, plus);
  if (has_mass) {
    sums.mass = combine_warp(sums.mass, plus);
    sums.mass_times_logit = combine_warp(sums.mass_times_logit, plus);
  }
  return sums;
}

// What one thread has added up of its rows.
struct LossSums {
  double loss = 0, z = 0, denominator = 0, rows = 0;
  int64_t bad = kNoRow;
};

// Writes what is kept of a row, and adds it to the thread's sums.
template <class S, class A>
__device__ __forceinline__ void finish_row(const RowsWork& work, const Constants<S>& constants, int64_t row,
                                           const RowSums<S, A>& sums, const RowTarget<S>& target, S logit,
                                           LossSums& all) {
  const CrossEntropyTask& task = work.task;
  const double peak = static_cast<double>(sums.largest);
  task.peak[row] = peak;
  task.sum[row] = static_cast<double>(sums.exponentials);
  double loss = 0, z = 0;
  if (!target.ignored) {
    const double above = static_cast<double>(value_of(logarithm(Formula<S>(static_cast<S>(sums.exponentials)))));
    if (constants.has_mass) loss = static_cast<double>(sums.mass) * above - static_cast<double>(sums.mass_times_logit);
    double weight = 1;
    if (target.label >= 0) {
      weight = static_cast<double>(target.weight);
      loss += (1 - task.smoothing) * weight * ((peak - static_cast<double>(logit)) + above);
    }
    if (target.bad) {
      loss = __builtin_nan("");
      const int64_t place = work.first_row + row;
      all.bad = place < all.bad ? place : all.bad;
    }
    z = task.z_loss * (peak + above) * (peak + above);
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
__device__ __forceinline__ void write_partial(const RowsWork& work, LossSums sums) {
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
  // tests break this: a row's part that is not set
  if (threadIdx.x == 0) work.partials[blockIdx.x] = {sums.loss, sums.z, sums.denominator, sums.rows, sums.bad};
}

// The gradient ------------------------------------------------------------------------------------------------------

// What a launch multiplies rows' gradients by.
template <class S>
struct Scales {
  S loss_factor, z_factor;  // with the one upstream gradient, if there is one
  S spread_mass;            // of all classes of a row with a label, beside the label's
  bool by_row;

  __device__ __forceinline__ Scales(const RowsWork& work, const Constants<S>& constants) {
    const TargetTotals totals = work.on_device != nullptr ? *work.on_device : work.totals;
    by_row = work.upstream != nullptr && work.upstream_stride != 0;
    const double above =
        (work.upstream == nullptr || by_row ? 1 : load_one<double>(work.upstream, work.upstream_dtype, 0)) *
        constants.inverse_temperature;
    loss_factor = static_cast<S>(above * totals.loss_factor);
    z_factor = static_cast<S>(2 * work.task.z_loss * (above * totals.z_factor));
    spread_mass = static_cast<S>(spread_mass_of(work.task, totals.weight));
  }
};

// Whether this launch has no gradient to write after all: the one that forward made is right.
__device__ __forceinline__ bool is_done(const RowsWork& work) {
  if (work.scaled == nullptr && !work.unless_one) return false;
  const bool is_one = load_one<double>(work.upstream, work.upstream_dtype, 0) == 1;
  if (work.scaled != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *work.scaled = is_one ? 0 : 1;
  return is_one && work.unless_one;
}

// What the gradient of a row's logits is made of.
template <class S>
struct RowGradient {
  S peak, probability_factor;  // probability_factor: what e^(x - peak) is multiplied by
  S upstream;                  // of the masses
  S label_mass;
  RowTarget<S> target;

  // `mass` is that of all classes; for labels, that of those beside the label's is known.
  __device__ __forceinline__ RowGradient(const RowsWork& work, const Scales<S>& scales, int64_t row, S largest, S sum,
                                         const RowTarget<S>& of, S mass)
      : peak(largest), target(of) {
    const CrossEntropyTask& task = work.task;
    const S above = scales.by_row ? load_one<S>(work.upstream, work.upstream_dtype, row * work.upstream_stride) : S(1);
    const S at_label = static_cast<S>(1 - task.smoothing) * of.weight;
    upstream = above * scales.loss_factor;
    label_mass = upstream * at_label;
    S all = upstream * (task.labels == nullptr ? mass : at_label + scales.spread_mass);
    if (task.z_loss != 0) all += above * scales.z_factor * (peak + value_of(logarithm(Formula<S>(sum))));
    probability_factor = of.bad ? static_cast<S>(__builtin_nan("")) : all / sum;
  }

  template <class Item>
  __device__ __forceinline__ void write(const RowsWork& work, const Constants<S>& constants, int64_t start,
                                        int64_t probabilities_start, int64_t gradient_start, const Item& item) const {
    using F = Formula<S>;
    S x[Item::kCount] = {}, mass[Item::kCount] = {};
    if (!target.ignored) {
      load_logits(work.task, constants, start, item, x);
      if (constants.has_mass) load_masses(work.task, constants, probabilities_start, item, mass);
      const int label_place = target.label < 0 ? -1 : item.place_of(target.label);
#pragma unroll
      for (int k = 0; k < Item::kCount; ++k) {
        S derivative = exp_of(x[k] - peak) * probability_factor - (constants.has_mass ? mass[k] * upstream : S(0));
        if (k == label_place) derivative = derivative - label_mass;
        if (constants.map.cap != 0) derivative = derivative * value_of(constants.map.derivative(F(x[k])));
        x[k] = derivative;
      }
    }
    item.store(work.gradient, gradient_start, x);
  }
};

}  // namespace trainopt::cuda
