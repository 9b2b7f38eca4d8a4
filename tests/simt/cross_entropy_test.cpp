// Cross-entropy's kernels on the SIMT machine: against formulas in double, forward and backward at once against one
// after the other.
#include "cross_entropy_run.h"

namespace trainopt {
namespace {

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

}  // namespace

void test_cross_entropy(bool all) {
  test_grid(all ? 1 : 5);
  test_lower_gradients();
}

void test_large_rows() { test_large(); }

}  // namespace trainopt
