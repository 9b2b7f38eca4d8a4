// The losses by themselves, without torch: elementary functions against the C library's in double, and every loss,
// dtype, order in memory, option and SIMD variant against formulas in double that are written here anew. Meant to run
// under AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`): every array ends where its last element
// does.
#include "cpu/losses.h"

#include <functional>
#include <limits>

#include "core/elementary.h"
#include "judge.h"
#include "pointwise_judge.h"

namespace trainopt {
namespace {

std::vector<cpu::Variant> variants() {
  std::vector<cpu::Variant> result;
  for (int v = 0; v < cpu::kVariants; ++v)
    if (cpu::supported(static_cast<cpu::Variant>(v))) result.push_back(static_cast<cpu::Variant>(v));
  return result;
}

// Elements of one type, in memory of exactly their size.
class Stored {
 public:
  Stored(DType dtype, const std::vector<double>& values) : dtype_(dtype), bytes_(values.size() * size_of(dtype)) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  void* data() { return bytes_.data(); }
  DType dtype() const { return dtype_; }
  double operator[](size_t i) const {
    const unsigned char* at = bytes_.data() + i * size_of(dtype_);
    if (dtype_ == DType::kFloat64) return read<double>(at);
    if (dtype_ == DType::kFloat32) return static_cast<double>(read<float>(at));
    return static_cast<double>(convert(read<uint16_t>(at), dtype_));
  }
  bool operator==(const Stored& other) const { return bytes_ == other.bytes_; }

 private:
  DType dtype_;
  std::vector<unsigned char> bytes_;

  template <class T>
  static T read(const unsigned char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  void set(size_t i, double value) {
    unsigned char* at = bytes_.data() + i * size_of(dtype_);
    const float single = static_cast<float>(value);
    if (dtype_ == DType::kFloat64) std::memcpy(at, &value, 8);
    if (dtype_ == DType::kFloat32) std::memcpy(at, &single, 4);
    if (size_of(dtype_) != 2) return;
    const uint16_t bits = convert(single, dtype_);
    std::memcpy(at, &bits, 2);
  }
};

std::vector<double> numbers(size_t count, uint64_t seed, const std::function<double(double)>& shape) {
  Numbers source{seed};
  std::vector<double> result(count);
  for (double& value : result) value = shape(source.value());
  return result;
}

// Elementary functions
// -------------------------------------------------------------------------------------------------

void test_elementary(const char* name, float (*ours)(float), double (*exact)(double), float low, float high,
                     double allowed) {
  Numbers source{42};
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
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  check(exponential(-infinity) == 0 && exponential(-200.0f) == 0, "exponential of what is very small");
  check(exponential(infinity) == infinity && exponential(89.0f) == infinity, "exponential of what is very large");
  check(std::isnan(exponential(nan)) && std::isnan(logarithm(nan)) && std::isnan(hyperbolic_tangent(nan)), "NaN");
  check(logarithm(0.0f) == -infinity && std::isnan(logarithm(-1.0f)), "logarithm of what has none");
  check(logarithm(infinity) == infinity && logarithm(1.0f) == 0, "logarithm of infinity and 1");
  check(std::fabs(logarithm(1e-40f) - static_cast<float>(std::log(1e-40))) < 1e-4f, "logarithm of a subnormal");
  check(log_one_minus(1.0f) == -infinity, "log(1 - 1)");
}

// Pointwise losses
// -----------------------------------------------------------------------------------------------------

void test_pointwise(const Formula& formula, DType dtype, size_t count, bool weighted) {
  const std::string what = std::string(formula.name) + ", " + format_of(dtype).name + ", " + std::to_string(count);
  const bool wide = dtype == DType::kFloat64;
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
    const double sum = cpu::pointwise_forward(loss, wide, task, 0, middle) +
                       cpu::pointwise_forward(loss, wide, task, middle, task.numel);
    cpu::pointwise_backward(loss, wide, task, 0, task.numel);
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
      check(std::fabs(sum - exact_sum) <= (wide ? 1e-15 : 2e-7) * size, what + ", sum");
    } else {
      check(value == first[0] && by_input == first[1] && by_target == first[2] && sum == first_sum,
            what + ": " + cpu::name_of(variant) + " gives other bits");
    }
  }
}

// Cross-entropy
// --------------------------------------------------------------------------------------------------------

struct Case {
  int64_t classes, outer, inner;  // inner > 1: rows side by side
  bool probabilities, weighted;
  double smoothing, softcap, z;
};

std::string describe(const Case& c, DType dtype) {
  return "cross-entropy, " + std::string(format_of(dtype).name) + ", " + std::to_string(c.classes) + " classes, " +
         std::to_string(c.outer) + " x " + std::to_string(c.inner) + " rows" +
         (c.probabilities ? ", probabilities" : "") + (c.weighted ? ", weighted" : "") + ", smoothing " +
         std::to_string(c.smoothing) + ", softcap " + std::to_string(c.softcap) + ", z " + std::to_string(c.z);
}

void test_cross_entropy(const Case& c, DType dtype) {
  const std::string what = describe(c, dtype);
  const bool wide = dtype == DType::kFloat64;
  const int64_t rows = c.outer * c.inner;
  const size_t count = static_cast<size_t>(rows * c.classes);
  const auto place = [&](int64_t row, int64_t k) {
    return static_cast<size_t>(c.inner == 1 ? row * c.classes + k
                                            : (row / c.inner * c.classes + k) * c.inner + row % c.inner);
  };
  Stored x(dtype, numbers(count, 7, as_it_is)), t(dtype, numbers(count, 8, into_unit));
  std::vector<double> weight = numbers(static_cast<size_t>(c.classes), 9, into_unit);
  const std::vector<double> scale = numbers(static_cast<size_t>(rows), 10, as_it_is);
  const std::vector<double> lse_scale = numbers(static_cast<size_t>(rows), 11, [&](double v) { return c.z * v; });
  std::vector<int64_t> labels(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) labels[row] = row % 5 == 3 ? -7 : row * 31 % c.classes;

  std::vector<Stored> first;
  std::vector<double> first_loss;
  for (const cpu::Variant variant : variants()) {
    cpu::set_variant(variant);
    std::vector<double> lse(rows), loss(rows);
    Stored gradient(dtype, std::vector<double>(count));
    const auto rows_in = [&](Stored& s) {
      const int64_t stride = c.classes * c.inner;
      return cpu::Rows{s.data(), stride, c.inner, s.dtype()};
    };
    cpu::CrossEntropyTask task{};
    task.classes = c.classes;
    task.inner = c.inner;
    task.logits = rows_in(x);
    if (c.probabilities) {
      task.probabilities = rows_in(t);
    } else {
      task.labels = labels.data();
    }
    task.weight = c.weighted ? weight.data() : nullptr;
    for (int64_t k = 0; k < c.classes; ++k) task.total_weight += c.weighted ? weight[k] : 1;
    task.ignore_index = -7;
    task.smoothing = c.smoothing;
    task.softcap = c.softcap;
    task.lse = lse.data();
    task.loss = loss.data();
    task.gradient = rows_in(gradient);
    task.scale = scale.data();
    task.lse_scale = lse_scale.data();
    // In two parts, as two threads would.
    for (const auto run : {cpu::cross_entropy_forward, cpu::cross_entropy_backward}) {
      run(wide, task, 0, rows / 3);
      run(wide, task, rows / 3, rows);
    }
    if (!first.empty()) {
      check(gradient == first[0] && loss == first_loss, what + ": " + cpu::name_of(variant) + " gives other bits");
      continue;
    }
    first.push_back(gradient);
    first_loss = loss;
    bool right = true;
    for (int64_t row = 0; row < rows; ++row) {
      const bool ignored = !c.probabilities && labels[row] == -7;
      std::vector<double> logit(c.classes), mass(c.classes);
      double sum = 0, all_mass = 0, exact = 0;
      for (int64_t k = 0; k < c.classes; ++k) {
        const double raw = x[place(row, k)], w = c.weighted ? weight[k] : 1;
        const double target = c.probabilities ? t[place(row, k)] : labels[row] == k;
        logit[k] = c.softcap == 0 ? raw : c.softcap * std::tanh(raw / c.softcap);
        mass[k] = ignored ? 0 : w * ((1 - c.smoothing) * target + c.smoothing / static_cast<double>(c.classes));
        all_mass += mass[k];
        sum += std::exp(logit[k]);
      }
      const double exact_lse = std::log(sum);
      for (int64_t k = 0; k < c.classes; ++k) exact += mass[k] * (exact_lse - logit[k]);
      right = right && is_near(loss[row], exact, 4 + 8 * all_mass, wide ? dtype : DType::kFloat32);
      for (int64_t k = 0; k < c.classes; ++k) {
        const double u = logit[k] / c.softcap, cap = c.softcap == 0 ? 1 : 1 - u * u;
        const double p = std::exp(logit[k] - exact_lse);
        const double slope = ignored ? 0 : ((scale[row] * all_mass + lse_scale[row]) * p - scale[row] * mass[k]) * cap;
        right = right && is_near(gradient[place(row, k)], slope,
                                 (1 + std::fabs(scale[row])) * (all_mass + mass[k]) + std::fabs(lse_scale[row]), dtype);
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
                 option % 2 == 1, option < 2 ? 0.0 : 0.2, option == 3 ? 3.0 : 0.0, option == 1 ? 0.5 : 0.0},
                dtype);
}

}  // namespace
}  // namespace trainopt

int main() {
  using namespace trainopt;
  check(cpu::find_pointwise_loss("nothing") == nullptr, "a loss that does not exist");
  test_elementary();
  for (const Formula& formula : kFormulas)
    for (const DType dtype : kDTypes)
      for (const size_t count : {size_t{0}, size_t{1}, size_t{15}, size_t{32}, size_t{255}, size_t{257}, size_t{1031}})
        for (const bool weighted : {false, true}) test_pointwise(formula, dtype, count, weighted);
  test_cross_entropy();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
