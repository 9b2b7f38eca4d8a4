// The losses by themselves, without torch: elementary functions against the C library's in double, and every loss,
// dtype, order in memory, option and SIMD variant against formulas in double that are written here anew. Meant to run
// under AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`): every array ends where its last element
// does.
#include "cpu/losses.h"

#include <functional>
#include <limits>

#include "checks.h"
#include "core/elementary.h"
#include "cpu/elementary_vec.h"
#include "cross_entropy_judge.h"
#include "pointwise_judge.h"
#include "variants.h"

namespace trainopt {
namespace {

// Elementary functions ------------------------------------------------------------------------------------------------

void test_elementary(const char* name, float (*ours)(float), double (*exact)(double), float low, float high,
                     double allowed) {
  RandomNumbers source{42};
  double worst = 0;
  for (int i = 0; i < 200000; ++i) {
    const float x = low + (high - low) * static_cast<float>(static_cast<double>(source.next() >> 11) * 0x1p-53);
    const double truth = exact(static_cast<double>(x));
    worst = std::max(worst, std::fabs(static_cast<double>(ours(x)) - truth) / spacing(truth, DType::kFloat32));
  }
  check(worst <= allowed, std::string(name) + " is " + std::to_string(worst) + " ulp off");
}

void test_elementary() {
  test_elementary("exponential", exponential<float>, std::exp, -86.5f, 88.7f, 1.6);
  test_elementary("logarithm", logarithm<float>, std::log, 1e-30f, 3, 1.0);
  test_elementary("logarithm near 1", logarithm<float>, std::log, 0.9f, 1.1f, 1.0);
  test_elementary("log_one_plus", log_one_plus<float>, std::log1p, 0, 1, 1.5);
  test_elementary("log_one_minus", log_one_minus<float>, [](double x) { return std::log1p(-x); }, 0, 0.999f, 1.5);
  test_elementary("hyperbolic_tangent", hyperbolic_tangent<float>, std::tanh, -4, 4, 1.6);
  test_elementary("exponential_of_negative", exponential_of_negative<float>, std::exp, -86.5f, 0, 1.0);
  test_elementary("exponential_of_negative near 0", exponential_of_negative<float>, std::exp, -1, 0, 1.0);
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (const float x : {-87.7f, -88.0f, -1e30f, -infinity})
    check(exponential_of_negative(x) == 0, "exponential_of_negative of what is very small");
  check(exponential_of_negative(0.0f) == 1 && exponential_of_negative(-0.0f) == 1, "exponential_of_negative of 0");
  // Of any payload: a NaN must not become a number when its bits are moved.
  for (const uint32_t bits : {0x7fc00000u, 0xffc00001u, 0x7fffffffu})
    check(std::isnan(exponential_of_negative(float_of(bits))), "exponential_of_negative of NaN");
  check(exponential(-infinity) == 0 && exponential(-200.0f) == 0, "exponential of what is very small");
  check(exponential(infinity) == infinity && exponential(89.0f) == infinity, "exponential of what is very large");
  check(std::isnan(exponential(nan)) && std::isnan(logarithm(nan)) && std::isnan(hyperbolic_tangent(nan)), "NaN");
  check(logarithm(0.0f) == -infinity && std::isnan(logarithm(-1.0f)), "logarithm of what has none");
  check(logarithm(infinity) == infinity && logarithm(1.0f) == 0, "logarithm of infinity and 1");
  check(std::fabs(logarithm(1e-40f) - static_cast<float>(std::log(1e-40))) < 1e-4f, "logarithm of a subnormal");
  check(log_one_minus(1.0f) == -infinity, "log(1 - 1)");
}

// The vectors' a * b + c is the C library's where rounding twice would be seen: half way between two floats, next to
// it, and where floats have fewer digits.
void test_multiply_add() {
  using Vector = cpu::Vec<float>;
  RandomNumbers source{3};
  const auto any_bits = [&] { return static_cast<uint32_t>(source.next() >> 32); };
  bool right = true;
  for (int i = 0; i < 300000; ++i) {
    Vector a, b, c;
    for (int k = 0; k < Vector::kSize; ++k) {
      a.lanes[k] = float_of(any_bits());
      b.lanes[k] = float_of(any_bits());
      c.lanes[k] = float_of(any_bits());
      if (i % 3 == 0) continue;
      // A product that ends just at, above or below half a unit of c.
      a.lanes[k] = float_of((any_bits() & 0x007fffffu) | 0x3f800000u);
      b.lanes[k] = 1 + static_cast<float>(static_cast<int>(any_bits() % 3) - 1) * 0x1p-23f;
      c.lanes[k] = a.lanes[k] * (i % 3 == 1 ? 0x1p24f : -0x1p25f);
      if (i % 2 == 0) std::swap(a.lanes[k], c.lanes[k]), b.lanes[k] *= 0x1p-49f;
      if (i % 5 == 0) a.lanes[k] *= 0x1p-100f, c.lanes[k] *= 0x1p-120f, b.lanes[k] *= 0x1p-20f;
    }
    const Vector found = cpu::multiply_add(a, b, c);
    for (int k = 0; k < Vector::kSize; ++k) {
      const float truth = std::fma(a.lanes[k], b.lanes[k], c.lanes[k]);
      right = right && (std::isnan(truth) ? std::isnan(found.lanes[k]) : bits_of(found.lanes[k]) == bits_of(truth));
    }
  }
  check(right, "multiply_add of vectors is not the C library's");
}

// Pointwise losses ----------------------------------------------------------------------------------------------------

void test_pointwise(const Formula& formula, DType dtype, size_t count, bool weighted) {
  const std::string what = std::string(formula.name) + ", " + format_of(dtype).name + ", " + std::to_string(count);
  const bool is_float64 = dtype == DType::kFloat64;
  const double k = 0.75;
  Stored x(dtype, numbers(count, 1, formula.input)), t(dtype, numbers(count, 2, formula.target));
  Stored weight(dtype, numbers(count, 3, as_it_is)), positive(dtype, numbers(count, 4, into_unit));
  Stored upstream(dtype, numbers(count, 5, as_it_is));
  const cpu::PointwiseLoss& loss = *cpu::find_pointwise_loss(formula.name);
  const auto view = [](Stored& s) { return TensorView{s.data(), nullptr, s.dtype()}; };
  std::vector<Stored> first;
  double first_sum = 0;
  for (const cpu::Variant variant : variants()) {
    cpu::set_variant(variant);
    Stored value(dtype, std::vector<double>(count)), by_input = value, by_target = value;
    PointwiseTask task{};
    task.numel = static_cast<int64_t>(count);
    task.input = view(x);
    task.target = view(t);
    if (weighted) {
      task.weight = view(weight);
      task.positive = view(positive);
      task.upstream = view(upstream);
    }
    task.parameter = k;
    task.value = view(value);
    task.scale = 1.5;
    task.input_gradient = view(by_input);
    task.target_gradient = view(by_target);
    // In two parts, as two threads would.
    const int64_t middle = task.numel / 512 * 256;
    const double sum = cpu::pointwise_forward(loss, is_float64, task, 0, middle) +
                       cpu::pointwise_forward(loss, is_float64, task, middle, task.numel);
    cpu::pointwise_backward(loss, is_float64, task, 0, task.numel);
    if (first.empty()) {
      first = {value, by_input, by_target};
      first_sum = sum;
      bool right = true;
      double exact_sum = 0, size = 1;
      for (size_t i = 0; i < count; ++i) {
        const double w = weighted ? weight[i] : 1, p = weighted ? positive[i] : 1, g = weighted ? upstream[i] : 1.5;
        const double exact = w * formula.value(x[i], t[i], p, k);
        const double scale = size_of_terms(formula, x[i], t[i], w, exact);
        exact_sum += exact;
        size += scale;
        right = right && is_near(value[i], exact, scale, dtype);
        right =
            right && is_near(by_input[i], w * g * formula.slope(x[i], t[i], p, k), scale * (1 + std::fabs(g)), dtype);
        right = right && is_near(by_target[i], w * g * formula.target_slope(x[i], t[i], p, k),
                                 scale * (1 + std::fabs(g)), dtype);
      }
      check(right, what);
      check(std::fabs(sum - exact_sum) <= (is_float64 ? 1e-15 : 2e-7) * size, what + ", sum");
    } else {
      check(value == first[0] && by_input == first[1] && by_target == first[2] && sum == first_sum,
            what + ": " + cpu::name_of(variant) + " gives other bits");
    }
  }
}

// Cross-entropy -------------------------------------------------------------------------------------------------------

void test_cross_entropy(const Case& c, DType dtype, double offset = 0) {
  CrossEntropyProblem problem(c, dtype);
  const std::string what = problem.describe() + ", logits about " + std::to_string(offset);
  const bool is_float64 = dtype == DType::kFloat64;
  const int64_t rows = problem.rows;
  // As many digits for large logits as for small ones: those of a row are alike, or far apart.
  if (offset != 0) problem.x = Stored(dtype, numbers(problem.count(), 7, [&](double v) { return v + offset; }));
  const std::vector<double> scale = numbers(static_cast<size_t>(rows), 10, as_it_is);
  const std::vector<double> lse_scale = numbers(static_cast<size_t>(rows), 11, [&](double v) { return c.z * v; });

  std::vector<Stored> first;
  std::vector<double> first_loss;
  for (const cpu::Variant variant : variants()) {
    cpu::set_variant(variant);
    StoredLse lse(rows);
    std::vector<double> loss(rows);
    Stored gradient(dtype, std::vector<double>(problem.count()));
    cpu::CrossEntropyTask task{};
    problem.describe_to(task);
    task.weight = c.weighted ? problem.weight.data() : nullptr;
    task.total_weight = problem.total_weight;
    task.lse = lse.parts();
    task.loss = loss.data();
    task.gradient = problem.rows_in(gradient);
    task.scale = scale.data();
    task.lse_scale = lse_scale.data();
    // In two parts, as two threads would.
    for (const auto run : {cpu::cross_entropy_forward, cpu::cross_entropy_backward}) {
      run(is_float64, task, 0, rows / 3);
      run(is_float64, task, rows / 3, rows);
    }
    Stored streamed(dtype, std::vector<double>(problem.count()));
    task.gradient = problem.rows_in(streamed);
    task.streams = true;
    cpu::cross_entropy_backward(is_float64, task, 0, rows);
    check(streamed == gradient, what + ": other bits if they are written past the caches");
    if (!first.empty()) {
      check(gradient == first[0] && loss == first_loss, what + ": " + cpu::name_of(variant) + " gives other bits");
      continue;
    }
    first.push_back(gradient);
    first_loss = loss;
    bool right = true;
    for (int64_t row = 0; row < rows; ++row) {
      const CrossEntropyProblem::Row exact = problem.exact(row);
      const bool ignored = problem.is_ignored(row);
      right = right && is_near(loss[row], exact.loss, 4 + 8 * exact.all_mass, is_float64 ? dtype : DType::kFloat32);
      for (int64_t k = 0; k < c.classes; ++k) {
        const double size = (1 + std::fabs(scale[row])) * (exact.all_mass + exact.mass[k]) + std::fabs(lse_scale[row]);
        right = right && is_near(gradient[problem.place(row, k)],
                                 problem.slope(exact, ignored, k, scale[row], lse_scale[row]), size, dtype);
      }
    }
    check(right, what);
  }
}

void test_cross_entropy() {
  for (const DType dtype : kDTypes)
    for (const int64_t classes : {1, 2, 10, 64, 65, 1037})
      for (const int64_t inner : {1, 37, 300})
        for (const bool probabilities : {false, true})
          for (int option = 0; option < 4; ++option)
            test_cross_entropy(
                {classes, inner == 300 ? 1 : 3 + 37 * (inner == 1 && classes < 100), inner, probabilities,
                 option % 2 == 1, option < 2 ? 0.0 : 0.2, option == 3 ? 3.0 : 0.0, option == 1 ? 0.5 : 0.0,
                 option == 2   ? 1.5
                 : option == 3 ? 2.0
                               : 1.0},
                dtype);
  for (const int64_t classes : {5, 100, 1500})
    for (const int64_t inner : {1, 37})
      for (const int option : {0, 1, 2})
        for (const double offset : {1e3, 1e6, 1e17, -1e17}) {
          const Case large{classes, 3, inner, option == 1, false, option == 2 ? 0.2 : 0.0, 0, 0};
          test_cross_entropy(large, DType::kFloat64, offset);
          if (offset == 1e3) test_cross_entropy(large, DType::kFloat32, offset);
        }
}

}  // namespace
}  // namespace trainopt

int main() {
  using namespace trainopt;
  check(cpu::find_pointwise_loss("nothing") == nullptr, "a loss that does not exist");
  test_elementary();
  test_multiply_add();
  // Large enough to be written past the caches, and no whole number of vectors.
  test_pointwise(kFormulas[0], DType::kFloat32, cpu::kStreamFrom / sizeof(float) + 37, false);
  for (const Formula& formula : kFormulas)
    for (const DType dtype : kDTypes)
      for (const size_t count : {size_t{0}, size_t{1}, size_t{15}, size_t{32}, size_t{255}, size_t{257}, size_t{1031}})
        for (const bool weighted : {false, true}) test_pointwise(formula, dtype, count, weighted);
  test_cross_entropy();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
