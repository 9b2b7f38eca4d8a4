// What a step finds out about its parameters on the SIMT machine, against the same taken before and after it in double.
#include <array>
#include <cmath>

#include "cuda/engine.h"
#include "kernel_tests.h"
#include "step_run.h"

namespace trainopt {
namespace {

using Told = std::array<double, cuda::kToldStats>;

std::vector<double> values_of(const Array& array, int64_t count) {
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(array.get(i));
  return values;
}

Told truth(const std::vector<double>& before, const std::vector<double>& gradient, const std::vector<double>& after,
           double scale) {
  Told told{};
  for (size_t i = 0; i < before.size(); ++i) {
    told[0] += gradient[i] * gradient[i] / scale / scale;
    told[1] += before[i] * before[i];
    told[2] += (after[i] - before[i]) * (after[i] - before[i]);
    told[3] = std::fmax(told[3], std::fabs(gradient[i]) / scale);
    told[4] += !std::isfinite(gradient[i]);
  }
  for (int k = 0; k < 3; ++k) told[k] = std::sqrt(told[k]);
  return told;
}

bool is_near(double found, double expected) {
  if (!std::isfinite(expected)) return std::isnan(expected) ? std::isnan(found) : found == expected;
  return std::fabs(found - expected) <= 1e-12 * std::fabs(expected);
}

// A step of which two parameters in three are measured. `nonfinite`: some gradients have elements that are not.
void test_step(const Setting& s, const Arrangement& a, bool is_left_out, bool nonfinite) {
  const bool is_float64 = a.param_dtype == DType::kFloat64;
  const std::string what = std::string("stats of ") + s.rule + " " + s.name + ", " + format_of(a.param_dtype).name +
                           (is_left_out ? ", left out" : "");
  Parameters parameters;
  for (const int64_t n : {0, 3, 258, 16383, 40008, 9}) parameters.push_back(new Parameter(n, n, states_of(s), a));
  if (nonfinite)
    for (const int64_t i : {1, 5, 8}) parameters.back()->gradient.set(i, i == 5 ? std::nan("") : -HUGE_VAL);
  std::vector<cuda::TensorTask> tasks = tasks_of(parameters);
  std::vector<std::vector<double>> before, gradients;
  size_t measured = 0;
  for (size_t t = 0; t < tasks.size(); ++t) {
    tasks[t].is_measured = t % 3 != 1;
    tasks[t].rounds_at_random = s.tail.rounds_at_random;
    measured += tasks[t].is_measured;
    before.push_back(values_of(parameters[t]->param, parameters[t]->numel));
    gradients.push_back(values_of(parameters[t]->gradient, parameters[t]->numel));
  }
  const float found_inf = is_left_out ? 1 : 0, scale = 4;
  const cuda::Prepared prepared = prepared_of(s, is_float64);
  const cuda::Update work{
      cpu::find_rule(s.rule)->index, is_float64, tasks.data(), tasks.size(), &prepared, false, &found_inf};
  const double unset = std::nan("");
  std::vector<StepStats> chunks(cuda::measured_chunks(work), StepStats{unset, unset, unset, unset, -1});
  std::vector<double> out(measured * cuda::kToldStats, unset);
  cuda::update(work, chunks.data(), nullptr);
  cuda::tell(work, chunks.data(), nonfinite ? &scale : nullptr, 8, out.data(), nullptr);
  size_t row = 0;
  for (size_t t = 0; t < tasks.size(); ++t) {
    if (!tasks[t].is_measured) continue;
    const std::vector<double> after = values_of(parameters[t]->param, parameters[t]->numel);
    if (is_left_out) check(before[t] == after, what + ": something has changed");
    Told expected = truth(before[t], gradients[t], after, nonfinite ? 4 : 8);
    for (int k = 0; k < cuda::kToldStats; ++k)
      check(is_near(out[row * cuda::kToldStats + k], expected[k]),
            what + ", number " + std::to_string(k) + " of tensor " + std::to_string(t));
    ++row;
  }
  check_no_faults(what);
  drop(parameters);
}

}  // namespace

void test_stats() {
  for (const Setting& s : {setting("sgd", "nesterov"), setting("adam", "everything"), setting("adam", "tail")})
    for (const DType type : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16})
      for (const bool is_left_out : {false, true}) {
        const Arrangement whole{type, type, type, run_of(0), run_of(0), run_of(0), true};
        const Arrangement apart{type, type, type, run_of(1), run_of(3), run_of(0), true};
        const Arrangement strided{type, type, type, kTransposed, run_of(0), kSliced, true};
        test_step(s, whole, is_left_out, false);
        test_step(s, apart, is_left_out, true);
        test_step(s, strided, is_left_out, false);
      }
}

}  // namespace trainopt
