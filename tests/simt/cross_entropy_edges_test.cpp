// Cross-entropy's kernels on the SIMT machine where a problem is at an edge: more rows than there are workers for,
// labels that many blocks count, logits that a float hardly holds, targets that are ignored or no classes, no rows.
#include <limits>

#include "cross_entropy_run.h"

namespace trainopt {
namespace {

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

void test_cross_entropy_edges() {
  test_many_rows();
  test_counts();
  test_extremes();
  test_ignored();
  test_bad_targets();
  test_nothing();
}

}  // namespace trainopt
