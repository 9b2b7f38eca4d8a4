// Cross-entropy's kernels on the SIMT machine: against formulas in double, forward and backward at once against one
// after the other.
#include "cross_entropy_test.h"

#include <limits>

#include "../cpp/cross_entropy_judge.h"
#include "cuda/cross_entropy.h"
#include "simt.h"

namespace trainopt {
namespace {

using cuda::LossReduction;

const double kNan = std::nan("");

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

void check_no_faults(const std::string& what) {
  const std::vector<simt::Fault> faults = simt::take_faults();
  check(faults.empty(), what + ": " + (faults.empty() ? "" : faults[0].text));
}

bool same_numbers(const std::vector<double>& a, const std::vector<double>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](double p, double q) { return same_value(p, q); });
}

void test_problem(CrossEntropyProblem& problem, const Options& options) {
  const Case& c = problem.c;
  const int reduction = static_cast<int>(options.reduction);
  const std::string what = problem.describe() + ", reduction " + std::to_string(reduction) + ", chunk " +
                           std::to_string(options.chunk) + ", shift " + std::to_string(options.shift);
  const DType of_sums = problem.dtype == DType::kFloat64 ? problem.dtype : DType::kFloat32;
  const bool by_row = options.reduction == LossReduction::kNone, mean = options.reduction == LossReduction::kMean;
  const size_t count = static_cast<size_t>(by_row ? problem.rows : 1);
  const Stored upstream(problem.dtype, numbers(count, 10, as_it_is));

  // What is to come out, in double.
  std::vector<CrossEntropyProblem::Row> exact;
  double sum = 0, z_sum = 0, size = 0, denominator = 0, rows = 0;
  for (int64_t row = 0; row < problem.rows; ++row) {
    exact.push_back(problem.exact(row));
    if (problem.is_ignored(row)) continue;
    sum += exact.back().loss;
    z_sum += c.z * exact.back().lse * exact.back().lse;
    size += 4 + 8 * exact.back().all_mass + std::fabs(exact.back().lse * exact.back().all_mass);
    rows += 1;
    denominator += c.probabilities || !c.weighted ? 1 : problem.weight[problem.labels[row]];
  }
  const bool is_zero = options.empty_is_zero && rows == 0;
  if (!mean || is_zero) denominator = rows = 1;

  simt::set_order(simt::Order::kDescending);
  Run other(problem, options), run(problem, options);
  other.forward();
  other.backward(upstream, false);
  simt::set_order(simt::Order::kAscending);
  run.forward();
  run.backward(upstream, false);
  check_no_faults(what);
  check(run.bad.found == 0, what + ": a target is called bad");
  check(same_numbers(run.peak, other.peak) && same_numbers(run.sum, other.sum) && run.loss == other.loss &&
            run.gradient == other.gradient && (c.z == 0 || run.z == other.z),
        what + ": other bits in another order");

  bool right = true;
  if (by_row) {
    for (int64_t row = 0; row < problem.rows; ++row) {
      const double z = problem.is_ignored(row) ? 0 : c.z * exact[row].lse * exact[row].lse;
      const double allowed = 4 + 8 * exact[row].all_mass + z;
      right = right &&
              is_near(run.loss[row], exact[row].loss + z, allowed, of_sums == problem.dtype ? of_sums : problem.dtype);
      right = right && (c.z == 0 || is_near(run.z[row], z, allowed, problem.dtype));
    }
  } else {
    const double whole = sum / denominator + z_sum / rows;
    const bool fits = problem.dtype != DType::kFloat16 || whole < 65504;
    right = is_near(run.loss[0], fits ? whole : HUGE_VAL, size / denominator + z_sum / rows, problem.dtype) &&
            (c.z == 0 || is_near(run.z[0], z_sum / rows, z_sum / rows, problem.dtype));
  }
  for (int64_t row = 0; row < problem.rows; ++row)
    right = right && is_near(run.lse(row), problem.is_ignored(row) ? 0 : exact[row].lse, 2, of_sums);
  check(right, what + ": loss");

  right = true;
  const double rest = options.defer ? run.rest : 1;
  for (int64_t row = 0; row < problem.rows; ++row) {
    const bool ignored = problem.is_ignored(row);
    const double above = upstream[by_row ? row : 0], of_lse = c.z == 0 || ignored ? 0 : 2 * c.z * above / rows;
    for (int64_t k = 0; k < c.classes; ++k) {
      const double slope = problem.slope(exact[row], ignored, k, above / denominator, of_lse * exact[row].lse);
      const double allowed = std::fabs(above / denominator) * (exact[row].all_mass + exact[row].mass[k]) +
                             std::fabs(of_lse * exact[row].lse) + 1e-3;
      right = right && is_near(run.gradient[problem.place(row, k)] * rest, slope, allowed, problem.dtype);
    }
  }
  check(right, what + ": gradient");

  // Both at once, with less memory for it than the rows take.
  Run whole(problem, options);
  whole.forward(&upstream);
  check(whole.loss == run.loss && (c.z == 0 || whole.z == run.z) && whole.gradient == run.gradient &&
            same_numbers(whole.peak, run.peak) && same_numbers(whole.sum, run.sum),
        what + ": other bits forward and backward at once");
  if (!by_row) {
    whole.backward(Stored(problem.dtype, {1.0}), false, true);
    check(whole.gradient == run.gradient && whole.scaled == 0, what + ": a gradient that was to be left alone");
    whole.backward(upstream, false, true);
    check(whole.gradient == run.gradient && whole.scaled == 1, what + ": a gradient that was to be made again");
  }

  run.backward(upstream, true);
  check(problem.x == run.gradient, what + ": over the logits");
  check_no_faults(what);
}

// Sizes on either side of every bound between the ways to share a row, and of warps, items and blocks; one problem of
// `every`.
void test_grid(int every) {
  int turn = 0;
  for (const int64_t classes : {1, 2, 7, 31, 32, 33, 40, 255, 257, 1024, 1025, 2049}) {
    for (const int64_t inner : {1, 5}) {
      for (const DType dtype : kDTypes) {
        for (const bool probabilities : {false, true}) {
          for (int option = 0; option < 4; ++option, ++turn) {
            if (turn % every != 0 || (classes > 300 && (turn / 2 + turn / 8) % 3 != 0)) continue;
            const int64_t outer = classes <= 32 || inner > 1 ? 27 : classes > 1000 ? 3 : 11;
            const Case c{classes,
                         outer,
                         inner,
                         probabilities,
                         option % 2 == 1,
                         option < 2 ? 0.0 : 0.2,
                         option == 3 ? 3.0 : 0.0,
                         option == 1 ? 0.5 : 0.0,
                         option == 2   ? 1.5
                         : option == 3 ? 2.0
                                       : 1.0};
            Options options;
            options.reduction = static_cast<LossReduction>(turn / 3 % 3);
            // Aligned, aligned alike though not to 16 bytes, and not alike.
            const int64_t shift = turn % 3;
            options.shift = turn % 5 == 0 ? (shift + 1) % 3 : shift;
            options.chunk = turn % 4 == 1 && inner == 1 ? 7 : 0;
            options.defer = turn % 7 == 0 && options.reduction == LossReduction::kMean;
            CrossEntropyProblem problem(c, dtype, shift);
            test_problem(problem, options);
          }
        }
      }
    }
  }
}

// Vocabularies that a large block takes.
void test_large() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    CrossEntropyProblem problem({50257, 2, 1, false, false, 0.1, 0, 0}, dtype);
    test_problem(problem, {});
  }
  CrossEntropyProblem soft({20011, 2, 1, true, true, 0.1, 5, 0.1}, DType::kFloat32, 1);
  test_problem(soft, {});
}

// The logits' gradient in 16 bits, as the products of a linear layer take it.
void test_lower_gradients() {
  for (const int64_t classes : {100, 1500, 5000}) {
    for (const DType lower : {DType::kBFloat16, DType::kFloat16}) {
      for (const int64_t shift : {0, 1, 4}) {
        CrossEntropyProblem problem({classes, 4, 1, false, false, 0.1, 0, 0}, DType::kFloat32, shift);
        Options options;
        options.shift = shift;
        Run exact(problem, options), run(problem, options, lower);
        const Stored one(DType::kFloat32, {1.0});
        exact.forward(&one);
        run.forward(&one);
        const std::string what = problem.describe() + ", gradient as " + format_of(lower).name;
        bool right = is_near(run.loss[0], exact.loss[0], 10, DType::kFloat32);
        for (size_t i = 0; i < problem.count(); ++i)
          right = right && is_near(run.gradient[i], exact.gradient[i], 1, lower);
        check(right, what);
        check_no_faults(what);
      }
    }
  }
}

// More rows than the most blocks take at once, so that a thread, a warp and a block have three, one after the other:
// the first and the last block of each.
void test_many_rows() {
  const auto check_rows = [](int64_t classes, int64_t at_once, bool probabilities) {
    const int64_t rows = 2 * cuda::kMostBlocks * at_once + 1;
    CrossEntropyProblem problem({classes, rows, 1, probabilities, false, 0, 0, 0}, DType::kFloat32);
    Options options;
    options.reduction = LossReduction::kSum;
    Run run(problem, options);
    const cuda::CrossEntropyTask task = run.task(0, rows);
    const auto blocks = static_cast<unsigned>(cuda::rows_blocks(task));
    simt::set_blocks({0, blocks - 1});
    run.launch_rows();
    run.backward(Stored(DType::kFloat32, {1.0}), false);
    simt::set_blocks({});
    const std::string what = problem.describe() + ", three to a worker";
    check(blocks == (rows + 3 * at_once - 1) / (3 * at_once), what + ": blocks");
    bool right = true;
    const int64_t of_last = (blocks - 1) * 3 * at_once;
    for (const int64_t first : {int64_t{0}, of_last}) {
      double sum = 0;
      const int64_t last = std::min(first + 3 * at_once, rows);
      for (int64_t row = first; row < last; ++row) {
        const CrossEntropyProblem::Row exact = problem.exact(row);
        sum += exact.loss;
        right = right && is_near(run.lse(row), problem.is_ignored(row) ? 0 : exact.lse, 2, DType::kFloat32);
        for (int64_t k = 0; k < classes; ++k)
          right = right &&
                  is_near(run.gradient[problem.place(row, k)], problem.slope(exact, problem.is_ignored(row), k, 1, 0),
                          1 + exact.all_mass, DType::kFloat32);
      }
      const cuda::LossPartial& partial = run.partials[static_cast<size_t>(first == 0 ? 0 : blocks - 1)];
      right = right && std::fabs(partial.loss - sum) <= 1e-6 * sum && partial.bad == cuda::kNoRow;
    }
    check(right, what);
    check_no_faults(what);
  };
  check_rows(2, 128, false);
  check_rows(33, 8, false);
  check_rows(1025, 1, false);
  check_rows(1025, 1, true);
}

// Labels that many blocks count.
void test_counts() {
  for (const int64_t rows : {0, 1, 16384, 16385, 100003, 5000011}) {
    for (const bool weighted : {false, true}) {
      if (weighted && rows > 200000) continue;
      const float weight[3] = {0.5f, 2.0f, 0.25f};
      std::vector<int64_t> labels(static_cast<size_t>(rows));
      double denominator = 0, counted = 0;
      for (int64_t row = 0; row < rows; ++row) {
        labels[row] = row % 7 == 0 ? -7 : row % 3;
        if (row % 7 == 0) continue;
        counted += 1;
        denominator += weighted ? static_cast<double>(weight[row % 3]) : 1;
      }
      cuda::CountWork work{};
      work.mean = true;
      work.task.classes = 3;
      work.task.labels = labels.data();
      work.task.ignore_index = -7;
      work.task.rows = rows;
      work.task.weight = weighted ? weight : nullptr;
      std::vector<cuda::CountPartial> partials(static_cast<size_t>(cuda::count_blocks(rows)), {kNan, kNan, kNan});
      cuda::TargetTotals totals{kNan, kNan, kNan, kNan};
      work.partials = partials.data();
      work.out = &totals;
      cuda::count_targets(work, nullptr);
      const std::string what = std::to_string(rows) + " labels counted";
      check(totals.loss_factor == 1 / denominator && totals.z_factor == 1 / counted, what);
      check(totals.weight == (weighted ? 2.75 : 3) && totals.rest == 1, what + ": weight");
      work.defer = true;
      cuda::count_targets(work, nullptr);
      check(totals.loss_factor == 1 && same_value(totals.z_factor, denominator / counted) &&
                totals.rest == (counted == 0 ? 0 : 1 / denominator),
            what + ", deferred");
      check_no_faults(what);
    }
  }
}

// Logits that a float hardly holds, and what is no number: as torch's log_softmax in float64.
void test_extremes() {
  for (const int64_t classes : {5, 100, 1500}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      Case c{classes, 6, 1, false, false, 0, 0, 0};
      CrossEntropyProblem problem(c, dtype);
      std::vector<double> values(problem.count());
      for (size_t i = 0; i < values.size(); ++i) values[i] = problem.x[i];
      const auto row = [&](int64_t r) { return values.begin() + r * classes; };
      const double infinity = HUGE_VAL;
      for (int64_t k = 0; k < classes; ++k) {
        row(0)[k] += dtype == DType::kFloat64 ? 1e17 : 10000;  // huge: there, ties and multiples of 16
        row(1)[k] = k == 1 ? infinity : row(1)[k];             // NaN
        row(2)[k] = k == 2 ? row(2)[k] : -infinity;            // one class has it all
        row(3)[k] = -infinity;                                 // an ignored row of nothing
        row(4)[k] = k == classes - 1 ? kNan : row(4)[k];
        row(5)[k] = k == 0 ? -infinity : row(5)[k];  // a class that cannot be
      }
      problem.x = Stored(dtype, values);
      problem.labels = {0, 0, 2, CrossEntropyProblem::kIgnored, 1, 3};
      Options options;
      options.reduction = LossReduction::kNone;
      Run run(problem, options);
      run.forward();
      run.backward(Stored(dtype, std::vector<double>(6, 1.0)), false);
      const std::string what = problem.describe() + ", extremes";
      const CrossEntropyProblem::Row huge = problem.exact(0), last = problem.exact(5);
      check(is_near(run.loss[0], huge.loss, 10, dtype), what + ": huge logits");
      check(std::isnan(run.loss[1]) && std::isnan(run.loss[4]), what + ": what is no number");
      check(run.loss[2] == 0, what + ": the only class");
      check(run.loss[3] == 0, what + ": an ignored row");
      check(is_near(run.loss[5], last.lse - last.logit[3], 10, dtype), what + ": no such class");
      bool right = true;
      for (int64_t k = 0; k < classes; ++k) {
        const auto at = [&](int64_t r) { return run.gradient[problem.place(r, k)]; };
        right = right && is_near(at(0), problem.slope(huge, false, k, 1, 0), 1, dtype);
        right = right && std::isnan(at(1)) && std::isnan(at(4)) && at(2) == 0 && at(3) == 0;
        right = right && is_near(at(5), problem.slope(last, false, k, 1, 0), 1, dtype);
      }
      check(right, what + ": gradient");
      check_no_faults(what);
    }
  }
}

// Rows that are ignored, one and all; an ignored class that is one of the classes.
void test_ignored() {
  for (const int64_t classes : {4, 60}) {
    for (const bool zero : {false, true}) {
      for (const bool defer : {false, true}) {
        CrossEntropyProblem problem({classes, 9, 1, false, true, 0.1, 0, 0.5}, DType::kFloat32);
        for (int64_t& label : problem.labels) label = CrossEntropyProblem::kIgnored;
        Options options;
        options.empty_is_zero = zero;
        options.defer = defer;
        Run run(problem, options);
        run.forward();
        run.backward(Stored(DType::kFloat32, {2.0}), false);
        const std::string what = problem.describe() + ", all ignored";
        check(zero ? run.loss[0] == 0 && run.z[0] == 0 : std::isnan(run.loss[0]) && std::isnan(run.z[0]), what);
        bool right = true;
        for (size_t i = 0; i < problem.count(); ++i) right = right && run.gradient[i] == 0;
        check(right && (!defer || run.rest == 0), what + ": gradient");
        check_no_faults(what);
      }
    }
  }
}

// Targets that are no classes: nothing is read for them, the row is NaN, and the first one is told of.
void test_bad_targets() {
  for (const int64_t inner : {1, 4}) {
    for (const int64_t classes : {3, 50, 1100}) {
      for (const int64_t bad : {classes, int64_t{-1}, std::numeric_limits<int64_t>::min(), int64_t{1} << 40}) {
        for (const int64_t chunk : {0, 4}) {
          if (chunk != 0 && inner != 1) continue;
          CrossEntropyProblem problem({classes, 12 / inner, inner, false, true, 0.1, 0, 0}, DType::kFloat32);
          problem.labels[7] = bad;
          problem.labels[10] = classes + 5;
          Options options;
          options.reduction = LossReduction::kNone;
          options.chunk = chunk;
          Run run(problem, options);
          run.forward();
          run.backward(Stored(DType::kFloat32, std::vector<double>(12, 1.0)), false);
          const std::string what = problem.describe() + ", target " + std::to_string(bad);
          check(run.bad.found == 1 && run.bad.value == bad && run.bad.classes == classes && run.bad.ndim == 2 &&
                    run.bad.position[0] == 7 / inner && run.bad.position[1] == 7 % inner,
                what + ": not told of");
          bool right = true;
          for (int64_t row = 0; row < 12; ++row) {
            const bool is_bad = row == 7 || row == 10;
            right = right && std::isnan(run.loss[row]) == is_bad;
            for (int64_t k = 0; k < classes; ++k)
              right = right && std::isnan(run.gradient[problem.place(row, k)]) == is_bad;
          }
          check(right, what + ": which rows are NaN");
          check_no_faults(what);
        }
      }
    }
  }
}

void test_nothing() {
  for (const LossReduction reduction : {LossReduction::kNone, LossReduction::kMean, LossReduction::kSum}) {
    CrossEntropyProblem problem({5, 0, 1, false, false, 0, 0, 0}, DType::kFloat32);
    Options options;
    options.reduction = reduction;
    Run run(problem, options);
    run.forward();
    run.backward(Stored(DType::kFloat32, {1.0}), false);
    if (reduction == LossReduction::kMean) check(std::isnan(run.loss[0]), "the mean of no rows");
    if (reduction == LossReduction::kSum) check(run.loss[0] == 0, "the sum of no rows");
    check_no_faults("no rows");
  }
}

}  // namespace

void test_cross_entropy(bool all) {
  test_grid(all ? 1 : 5);
  test_lower_gradients();
  test_many_rows();
  test_counts();
  test_extremes();
  test_ignored();
  test_bad_targets();
  test_nothing();
}

void test_large_rows() { test_large(); }

}  // namespace trainopt
