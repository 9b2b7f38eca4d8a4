// A problem of cross-entropy on the SIMT machine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../cpp/cross_entropy_judge.h"
#include "cuda/cross_entropy.h"
#include "kernel_tests.h"

namespace trainopt {

using cuda::LossReduction;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Options {
  LossReduction reduction = LossReduction::kMean;
  bool empty_is_zero = false;
  int64_t chunk = 0;  // rows that one launch has; 0: all of them
  bool defer = false;
  int64_t shift = 0;  // elements before the gradient's first
};

// One problem on the device: its memory is poisoned, as fresh memory of a device may be.
class Run {
 public:
  Stored loss, z, gradient;
  std::vector<double> peak, sum;
  std::vector<cuda::LossPartial> partials;
  cuda::BadTarget bad{};
  double rest = 1;
  int64_t scaled = -1;

  Run(CrossEntropyProblem& problem, const Options& options) : Run(problem, options, problem.dtype) {}
  Run(CrossEntropyProblem& problem, const Options& options, DType gradient_dtype)
      : loss(problem.dtype, fresh(options.reduction == LossReduction::kNone ? problem.rows : 1)),
        z(problem.dtype, fresh(options.reduction == LossReduction::kNone ? problem.rows : 1)),
        gradient(gradient_dtype, fresh(static_cast<int64_t>(problem.count())), options.shift),
        peak(fresh(problem.rows)),
        sum(fresh(problem.rows)),
        problem_(problem),
        options_(options),
        weight_(problem.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32, problem.weight) {}

  double lse(int64_t row) const { return peak[row] + std::log(sum[row]); }

  // The rows by chunks, with the gradient for an upstream gradient, or without.
  void launch_rows(const Stored* upstream = nullptr) {
    const bool by_row = options_.reduction == LossReduction::kNone, has_z = problem_.c.z != 0;
    const int64_t chunk = options_.chunk == 0 ? problem_.rows : options_.chunk;
    for (int64_t first = 0; first < problem_.rows; first += chunk)
      partials.resize(partials.size() + cuda::rows_blocks(task(first, std::min(chunk, problem_.rows - first))));
    for (cuda::LossPartial& partial : partials) std::memset(static_cast<void*>(&partial), 0xff, sizeof partial);
    cuda::LossPartial* next = partials.data();
    cuda::TargetTotals totals{kNan, kNan, kNan, kNan};
    for (int64_t first = 0; first < problem_.rows; first += chunk) {
      cuda::RowsWork work{};
      work.task = task(first, std::min(chunk, problem_.rows - first));
      work.forward = true;
      if (by_row) work.loss = view_at(loss, first);
      if (by_row && has_z) work.z = view_at(z, first);
      work.partials = next;
      work.first_row = first;
      if (upstream != nullptr) ask_gradient(work, *upstream, gradient, first, &totals);
      next += cuda::rows_blocks(work.task);
      cuda::cross_entropy_rows(work, nullptr);
    }
  }

  void forward(const Stored* upstream = nullptr) {
    launch_rows(upstream);
    cuda::FinishWork work{};
    work.partials = partials.data();
    work.count = static_cast<int64_t>(partials.size());
    work.reduction = options_.reduction;
    work.empty_is_zero = options_.empty_is_zero;
    work.loss = view_at(loss, 0);
    if (problem_.c.z != 0) work.z = view_at(z, 0);
    work.labels = problem_.c.probabilities ? nullptr : problem_.labels.data();
    work.classes = problem_.c.classes;
    work.ndim = 2;
    work.sizes[0] = problem_.c.outer;
    work.sizes[1] = problem_.c.inner;
    work.bad = &bad;
    cuda::cross_entropy_finish(work, nullptr);
  }

  // Over the logits, if `in_place`.
  void backward(const Stored& upstream, bool in_place, bool unless_one = false) {
    cuda::RowsWork work{};
    work.task = task(0, problem_.rows);
    cuda::TargetTotals totals{kNan, kNan, kNan, kNan};
    ask_gradient(work, upstream, in_place ? problem_.x : gradient, 0, &totals);
    work.unless_one = unless_one;
    work.scaled = unless_one ? &scaled : nullptr;
    cuda::cross_entropy_rows(work, nullptr);
  }

  cuda::CrossEntropyTask task(int64_t first, int64_t rows) {
    cuda::CrossEntropyTask task{};
    problem_.describe_to(task);
    const auto skip = [&](Rows& of) {
      if (of.data != nullptr)
        of.data = static_cast<char*>(of.data) + first / problem_.c.inner * of.stride * size_of(of.dtype);
    };
    skip(task.logits);
    skip(task.probabilities);
    if (task.labels != nullptr) task.labels += first;
    task.rows = rows;
    task.is_float64 = problem_.dtype == DType::kFloat64;
    task.weight = problem_.c.weighted ? weight_.data() : nullptr;
    task.z_loss = problem_.c.z;
    task.peak = peak.data() + first;
    task.sum = sum.data() + first;
    return task;
  }

 private:
  CrossEntropyProblem& problem_;
  Options options_;
  Stored weight_;

  void ask_gradient(cuda::RowsWork& work, const Stored& upstream, Stored& to, int64_t first,
                    cuda::TargetTotals* totals) {
    const bool by_row = options_.reduction == LossReduction::kNone;
    work.gradient = problem_.rows_in(to);
    work.gradient.data = static_cast<char*>(work.gradient.data) +
                         first / problem_.c.inner * work.gradient.stride * size_of(work.gradient.dtype);
    work.upstream =
        static_cast<char*>(const_cast<Stored&>(upstream).data()) + (by_row ? first : 0) * size_of(upstream.dtype());
    work.upstream_dtype = upstream.dtype();
    work.upstream_stride = by_row;
    work.totals = {1, 1, problem_.total_weight, 1};
    if (options_.reduction != LossReduction::kMean && !problem_.c.weighted) return;
    std::vector<cuda::CountPartial> counts(static_cast<size_t>(cuda::count_blocks(problem_.rows)), {kNan, kNan, kNan});
    cuda::count_targets(
        {task(0, problem_.rows), options_.reduction == LossReduction::kMean, options_.defer, counts.data(), totals},
        nullptr);
    work.on_device = totals;
    rest = totals->rest;
  }

  static std::vector<double> fresh(int64_t count) { return std::vector<double>(static_cast<size_t>(count), kNan); }
  static TensorView view_at(Stored& s, int64_t at) {
    return {static_cast<char*>(s.data()) + at * size_of(s.dtype()), nullptr, s.dtype()};
  }
};

}  // namespace trainopt
