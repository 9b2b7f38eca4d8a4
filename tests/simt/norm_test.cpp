// Norms and clipping on the SIMT machine, against sums in long double.
#include "cuda/norm.h"

#include "../cpp/parameters.h"
#include "kernel_tests.h"

namespace trainopt {
namespace {

constexpr Norm kNorms[] = {Norm::kSizes, Norm::kSquares, Norm::kLargest};

std::vector<cuda::NormTensor> tensors_of(const Parameters& parameters) {
  std::vector<cuda::NormTensor> tensors;
  for (const Parameter* p : parameters) tensors.push_back({p->gradient.view(), p->numel});
  return tensors;
}

double run_norm(Norm norm, const Parameters& parameters) {
  const std::vector<cuda::NormTensor> tensors = tensors_of(parameters);
  // Poisoned, as fresh memory of a device may be.
  std::vector<double> partials(static_cast<size_t>(cuda::norm_partials(tensors.data(), tensors.size())), std::nan(""));
  double total = std::nan("");
  Array rounded(DType::kFloat16, 1, run_of(1), true);
  cuda::norm({norm, tensors.data(), tensors.size(), partials.data(), &total, rounded.view()}, nullptr);
  const double once = round16(static_cast<double>(static_cast<float>(total)), DType::kFloat16);
  check(same_value(rounded.get(0), once) && rounded.is_intact(), "the norm of all, rounded");
  return total;
}

long double exact_sum(Norm norm, const Parameter& p) {
  long double sum = 0;
  for (int64_t i = 0; i < p.numel; ++i) {
    const long double x = std::fabs(p.gradient.get(i));
    if (norm == Norm::kLargest) {
      sum = x > sum || std::isnan(x) ? x : sum;
    } else {
      sum += norm == Norm::kSquares ? x * x : x;
    }
  }
  return sum;
}

double exact_root(Norm norm, long double sum) {
  return static_cast<double>(norm == Norm::kSquares ? std::sqrt(sum) : sum);
}

bool is_near(double found, double exact, bool is_float64) {
  if (std::isnan(exact) || std::isinf(exact)) return same_value(found, exact);
  return std::fabs(found - exact) <= (is_float64 ? 1e-13 : 2e-7) * exact;
}

// The norm, in either order of blocks and threads; then clipping by value, and to half of the norm.
void check_norms(Parameters& parameters, bool is_float64, const std::string& what) {
  const auto check_no_faults = [&] {
    const std::vector<simt::Fault> faults = simt::take_faults();
    check(faults.empty(), what + ": " + (faults.empty() ? "" : faults[0].text));
  };
  for (const Norm norm : kNorms) {
    simt::set_order(simt::Order::kDescending);
    const double other = run_norm(norm, parameters);
    simt::set_order(simt::Order::kAscending);
    const double found = run_norm(norm, parameters);
    check(same_value(other, found), what + ": other bits in another order");
    long double sum = 0;
    for (const Parameter* p : parameters) {
      const long double exact = exact_sum(norm, *p);
      sum = norm != Norm::kLargest ? sum + exact : exact > sum || std::isnan(exact) ? exact : sum;
    }
    check(is_near(found, exact_root(norm, sum), is_float64), what);
    check_no_faults();
  }

  const auto values = [&] {
    std::vector<std::vector<double>> result;
    for (const Parameter* p : parameters) {
      result.emplace_back();
      for (int64_t i = 0; i < p->numel; ++i) result.back().push_back(p->gradient.get(i));
    }
    return result;
  };
  for (const double limit : {0x1p15, 0.25}) {  // numbers of each dtype
    std::vector<std::vector<double>> clamped_values = values();
    for (std::vector<double>& of_one : clamped_values)
      for (double& value : of_one) value = clamped(value, limit);
    cuda::clamp(tensors_of(parameters).data(), parameters.size(), limit, nullptr);
    const std::vector<std::vector<double>> found = values();
    for (size_t t = 0; t < found.size(); ++t)
      for (size_t i = 0; i < found[t].size(); ++i)
        check(same_value(found[t][i], clamped_values[t][i]), what + ": not what clipping by value gives");
    check_no_faults();
  }

  const std::vector<std::vector<double>> before = values();
  const std::vector<cuda::NormTensor> tensors = tensors_of(parameters);
  const auto is_scaled = [&](double factor) {
    for (size_t t = 0; t < parameters.size(); ++t)
      for (int64_t i = 0; i < parameters[t]->numel; ++i) {
        const double exact = before[t][static_cast<size_t>(i)] * factor, found = parameters[t]->gradient.get(i);
        if (std::isnan(exact) ? !std::isnan(found)
                              : !(found == exact || is_close(found, exact, tensors[t].view.dtype, is_float64, 0)))
          return false;
      }
    return true;
  };
  const double total = 8;
  cuda::clip(tensors.data(), tensors.size(), &total, 9.0, nullptr);
  check(is_scaled(1), what + ": changed below the limit");
  cuda::clip(tensors.data(), tensors.size(), &total, 4.0, nullptr);
  check(is_scaled(4.0 / (8 + 1e-6)), what + ": not what clipping gives");
  for (const Parameter* p : parameters) check(p->is_intact(), what + ": written where nothing is to be written");
  const double nan = std::nan("");
  cuda::clip(tensors.data(), tensors.size(), &nan, 4.0, nullptr);
  check(is_scaled(nan), what + ": a norm of NaN");
  check_no_faults();
}

}  // namespace

void test_norms() {
  for (const DType dtype : kDTypes) {
    const bool is_float64 = dtype == DType::kFloat64;
    const std::string name = std::string("norms, ") + format_of(dtype).name;
    for (const bool guarded : {false, true}) {
      Parameters parameters;
      int turn = 0;
      for (const int64_t n : {0, 3, 1, 9, 2047, 2049, 16383, 16384, 16386, 40007, 0}) {
        const Placement place = n % 3 == 0 && n > 3 && n < 100 ? kSliced
                                : n == 16386                   ? kTransposed
                                                               : run_of(turn++ % 3);
        const Arrangement a{dtype, dtype, dtype, run_of(0), place, run_of(0), guarded};
        parameters.push_back(new Parameter(n, n, 0, a));
      }
      check_norms(parameters, is_float64, name);
      drop(parameters);
    }
    // What a float's square cannot hold, what a double's cannot, and what is not finite.
    for (const double special : {1e25, 1e-25, 1e160, 1e-160, 1e300, 1e-300, HUGE_VAL, std::nan("")}) {
      if (dtype == DType::kFloat16 && std::isfinite(special)) continue;
      if (!is_float64 && std::isfinite(special) && std::fabs(std::log10(special)) > 30) continue;
      const Arrangement a{dtype, dtype, dtype, run_of(0), run_of(0), run_of(0), true};
      Parameters parameters{new Parameter(19, 1, 0, a), new Parameter(3, 1, 0, a)};
      for (int64_t i = 0; i < 19; ++i)
        if (std::isfinite(special) || i == 17) parameters[0]->gradient.set(i, special);
      check_norms(parameters, is_float64, name + " of " + std::to_string(special));
      drop(parameters);
    }
  }
  // More chunks than a warp has lanes.
  const Arrangement long_one{DType::kFloat32, DType::kFloat32, DType::kFloat32, run_of(0), run_of(0), run_of(0), true};
  Parameters parameters{new Parameter(33 * 16384 + 5, 1, 0, long_one)};
  check_norms(parameters, false, "a long tensor");
  drop(parameters);
  parameters.clear();
  // More tensors than fit in a launch, of mixed types.
  for (int64_t i = 0; i < 800; ++i) {
    const DType dtype = kDTypes[i % 4 == 1 ? 0 : i % 4];
    parameters.push_back(new Parameter(i % 13, i, 0, {dtype, dtype, dtype, run_of(0), run_of(i % 2), run_of(0), true}));
  }
  check_norms(parameters, false, "many tensors");
  drop(parameters);
  check(run_norm(Norm::kSquares, {}) == 0, "the norm of nothing");
}

}  // namespace trainopt
