// The CUDA engine on the SIMT machine: every rule, type, layout and stage against the CPU engine, bit by bit, and
// against the formulas in double. The last line tells what passed and failed.
#include "cuda/engine.h"

#include "../cpp/step_judge.h"
#include "cuda/step_table.h"
#include "kernel_tests.h"
#include "rules/rules.h"
#include "step_run.h"

namespace trainopt {
namespace {

// With scalars prepared on the device, from step counts there, GradScaler's scale and, if `tensors`, a learning rate
// and a first option (a beta, a momentum) that are tensors.
void run_prepared(const Setting& s, const Parameters& parameters, bool is_float64, bool tensors, bool double_steps,
                  float found_inf, std::vector<double>* steps_after) {
  cuda::GroupSource source{};
  source.settings = settings_of(s);
  std::copy(s.options.begin(), s.options.end(), source.options);
  const double lr = s.lr, option = s.options[0];
  if (tensors) {
    source.settings.lr = source.options[0] = std::nan("");
    source.replaced[0] = {&lr, cuda::DeviceNumber::kLr, 1};
    source.replaced[1] = {&option, 0, 1};
  }
  std::vector<cuda::TensorTask> tasks = tasks_of(parameters);
  std::vector<float> float_steps(tasks.size(), static_cast<float>(s.step - 1));
  std::vector<double> double_steps_of(tasks.size(), s.step - 1);
  std::vector<cuda::Count> counts;
  for (size_t i = 0; i < tasks.size(); ++i) {
    void* steps = double_steps ? static_cast<void*>(&double_steps_of[i]) : &float_steps[i];
    counts.push_back({steps, 0, 0, double_steps, 0, 0, 0, 0, {}});
    tasks[i].prepared = static_cast<uint32_t>(i);
  }
  std::vector<cuda::Prepared> prepared(tasks.size());
  std::memset(static_cast<void*>(prepared.data()), 0xff, prepared.size() * sizeof(cuda::Prepared));
  const auto scale = static_cast<float>(s.gradient_scale);
  const int rule = cpu::find_rule(s.rule)->index;
  cuda::prepare(
      {rule, is_float64, &source, 1, counts.data(), counts.size(), 1, s.tail.norm,
       s.gradient_scale == 1 ? nullptr : &scale, tensors ? &s.tail.norm : nullptr, &found_inf, prepared.data()},
      nullptr);
  step(s, {rule, is_float64, tasks.data(), tasks.size(), prepared.data(), true, &found_inf}, tasks);
  for (size_t i = 0; i < tasks.size(); ++i)
    steps_after->push_back(double_steps ? double_steps_of[i] : static_cast<double>(float_steps[i]));
}

struct Types {
  DType param, gradient, state;
};

const std::vector<Types> kTypes = {
    {DType::kFloat32, DType::kFloat32, DType::kFloat32},    {DType::kFloat64, DType::kFloat64, DType::kFloat64},
    {DType::kBFloat16, DType::kBFloat16, DType::kBFloat16}, {DType::kFloat16, DType::kFloat16, DType::kFloat16},
    {DType::kFloat32, DType::kBFloat16, DType::kFloat32},   {DType::kFloat32, DType::kFloat64, DType::kBFloat16},
    {DType::kBFloat16, DType::kFloat32, DType::kFloat32},   {DType::kFloat16, DType::kFloat16, DType::kFloat32},
    {DType::kFloat64, DType::kFloat32, DType::kFloat64},    {DType::kFloat64, DType::kFloat16, DType::kFloat32},
};

struct Places {
  Placement param, gradient, state;
};

const std::vector<Places> kPlaces = {
    {run_of(0), run_of(0), run_of(0)},   {run_of(1), run_of(3), run_of(5)}, {run_of(0), run_of(4), run_of(1)},
    {run_of(0), kTransposed, run_of(1)}, {run_of(1), kSliced, kTransposed}, {kSliced, kTransposed, kSliced},
};

void test_rules() {
  int turn = 0;
  for (const Setting& s : kSettings) {
    for (const Types& t : kTypes) {
      const bool is_float64 = t.param == DType::kFloat64;
      const std::string what = std::string(s.rule) + " " + s.name + ", " + format_of(t.param).name + ", gradient " +
                               format_of(t.gradient).name + ", states " + format_of(t.state).name;
      const Arrangement plain{t.param, t.gradient, t.state, run_of(0), run_of(0), run_of(0), true};
      Parameters before = make(s, plain), expected = make(s, plain);
      run_cpu(s, expected, is_float64, 0);
      for (const Places& p : kPlaces) {
        // Every other time without guards: AddressSanitizer sees the ends then.
        ++turn;
        simt::set_order(turn % 2 == 0 ? simt::Order::kAscending : simt::Order::kDescending);
        const Arrangement arrangement{t.param, t.gradient, t.state, p.param, p.gradient, p.state, turn % 4 < 2};
        Parameters found = make(s, arrangement);
        run_cuda(s, found, is_float64);
        const std::string where = what + ", " + p.param.name + " " + p.gradient.name + " " + p.state.name;
        check(is_right(s, before, found, arrangement, is_float64), where + ": not what the formula gives");
        check(same_bits(expected, found, true), where + ": not the CPU's bits");
        check(is_intact(found), where + ": written where nothing is to be written");
        check_no_faults(where);
        drop(found);
      }
      Parameters found = make(s, plain);
      std::vector<double> steps;
      const bool counts = s.step > 0;
      if (counts) {
        run_prepared(s, found, is_float64, turn % 2 == 0, turn % 3 == 0, 0, &steps);
        check(same_bits(expected, found, true), what + ", prepared on the device: not the CPU's bits");
        for (const double step : steps) check(step == s.step, what + ": the step is not counted");
        drop(found);
        found = make(s, plain);
        steps.clear();
        run_prepared(s, found, is_float64, false, false, 1, &steps);
        check(same_bits(before, found, true), what + ", found_inf: something has changed");
        for (const double step : steps) check(step == s.step - 1, what + ", found_inf: the step is counted");
      }
      check_no_faults(what);
      drop(found);
      drop(before);
      drop(expected);
    }
  }
}

// An expanded gradient is read with stride 0.
void test_expanded_gradient() {
  for (const Setting& s : kSettings) {
    if (s.writes_gradient()) continue;
    const DType type = DType::kFloat32;
    const Arrangement expanded{type, type, type, run_of(0), kExpanded, run_of(0), false};
    Parameters start = make(s, expanded), found = make(s, expanded);
    run_cuda(s, found, false);
    check(is_right(s, start, found, expanded, false), std::string(s.name) + ", expanded gradient");
    check_no_faults("expanded gradient");
    drop(start);
    drop(found);
  }
}

// Tensors that are cut into chunks, alone and among others, aligned and not.
void test_chunks() {
  for (const Setting& s : {setting("sgd", "nesterov"), setting("adam", "everything"), setting("adam", "tail"),
                           setting("lamb", "plain"), setting("lars", "everything")}) {
    for (const DType type : {DType::kFloat32, DType::kBFloat16}) {
      for (const int64_t shift : {0, 1}) {
        const Arrangement a{type, type, type, run_of(shift), run_of(shift), run_of(shift), false};
        Parameters expected, found;
        for (const int64_t n : {int64_t{16384}, int64_t{1}, int64_t{0}, int64_t{16385}, int64_t{16383}, int64_t{40007}})
          for (Parameters* to : {&expected, &found}) to->push_back(new Parameter(n, n, states_of(s), a));
        run_cpu(s, expected, false, 0);
        run_cuda(s, found, false);
        const std::string what = std::string(s.name) + ", chunks, shift " + std::to_string(shift);
        check(same_bits(expected, found, true), what + ": not the CPU's bits");
        check_no_faults(what);
        drop(expected);
        drop(found);
      }
    }
  }
}

// More tensors and more sets of scalars than a launch has room for; empty and unaligned tensors at every place.
void test_many() {
  const Setting s = setting("adam", "amsgrad");
  const DType type = DType::kFloat32;
  const int rule = cpu::find_rule(s.rule)->index;
  for (const int64_t count : {1, 2, 40, 700}) {
    for (const uint32_t sets : {1u, 3u, 33u}) {
      Parameters expected, found;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = i * 7 % 5 == 0 ? 0 : i * 7 % 23;
        const Placement place = i % 11 == 3 && n % 3 == 0 ? kTransposed : run_of(i % 3);
        const Arrangement a{type, type, type, place, run_of(0), run_of(i % 2), true};
        // Some without amsgrad's state.
        for (Parameters* to : {&expected, &found}) to->push_back(new Parameter(n, i, i % 5 == 4 ? 0b011 : 0b111, a));
      }
      std::vector<cuda::Prepared> prepared;
      std::vector<Setting> settings;
      for (uint32_t k = 0; k < 2 * sets; ++k) {
        settings.push_back(s);
        settings.back().lr = 0.01 * (k / 2 + 1);
        settings.back().options[3] = k % 2 == 0;
        prepared.push_back(prepared_of(settings.back(), false));
      }
      std::vector<cuda::TensorTask> tasks = tasks_of(found);
      for (size_t i = 0; i < tasks.size(); ++i) {
        tasks[i].prepared = static_cast<uint32_t>(i) * 5 % sets * 2 + (i % 5 == 4);
        const Parameters one{expected[i]};
        if (expected[i]->numel > 0) run_cpu(settings[tasks[i].prepared], one, false, 0);
      }
      simt::take_launches();
      cuda::update({rule, false, tasks.data(), tasks.size(), prepared.data(), false, nullptr}, nullptr, nullptr);
      const std::string what = std::to_string(count) + " tensors, " + std::to_string(sets) + " groups";
      check(same_bits(expected, found, true), what + ": not the CPU's bits");
      check(is_intact(found), what + ": written where nothing is to be written");
      check_no_faults(what);
      drop(expected);
      drop(found);
    }
  }
}

// One launch for as many tensors as a table holds, and another for one more.
void test_launches() {
  const Setting s = setting("adam", "decoupled");
  const Arrangement a{DType::kFloat32, DType::kFloat32, DType::kFloat32, run_of(0), run_of(0), run_of(0), false};
  constexpr unsigned kFitting = cuda::TableOf<float, 4>::kCapacity;
  Parameters parameters;
  for (unsigned i = 0; i < kFitting; ++i) parameters.push_back(new Parameter(3, i, 0b011, a));
  simt::take_launches();
  run_cuda(s, parameters, false);
  check(simt::take_launches() == std::vector<unsigned>{kFitting}, "one launch for all tensors");
  parameters.push_back(new Parameter(3, kFitting, 0b011, a));
  run_cuda(s, parameters, false);
  check(simt::take_launches() == std::vector<unsigned>{kFitting, 1}, "a second launch for one more");
  drop(parameters);
  run_cuda(s, {}, false);
  check(simt::take_launches().empty(), "no launch for no tensors");
}

// Sums of more tensors, and of more groups' scalars, than a launch has room for.
void test_many_sums() {
  const Setting s = setting("lamb", "plain");
  const DType type = DType::kFloat32;
  const cpu::Rule* rule = cpu::find_rule(s.rule);
  constexpr uint32_t kCount = 900, kSets = 33;
  Parameters expected, found;
  for (int64_t i = 0; i < kCount; ++i) {
    const Placement place = i % 11 == 3 ? kTransposed : run_of(i % 3);
    const Arrangement a{type, type, type, place, run_of(0), run_of(i % 2), true};
    for (Parameters* to : {&expected, &found}) to->push_back(new Parameter(i * 7 % 5 * 3, i, states_of(s), a));
  }
  std::vector<Setting> settings(kSets, s);
  std::vector<cuda::Prepared> prepared;
  for (uint32_t k = 0; k < kSets; ++k) {
    settings[k].lr = 0.01 * (k + 1);
    prepared.push_back(prepared_of(settings[k], false));
  }
  std::vector<cuda::TensorTask> tasks = tasks_of(found);
  for (uint32_t i = 0; i < kCount; ++i) {
    tasks[i].prepared = i * 5 % kSets;
    if (expected[i]->numel > 0) run_cpu(settings[tasks[i].prepared], {expected[i]}, false, 0);
  }
  step(s, {rule->index, false, tasks.data(), tasks.size(), prepared.data(), false, nullptr}, tasks);
  check(same_bits(expected, found, true), "sums of many tensors: not the CPU's bits");
  check(is_intact(found), "sums of many tensors: written where nothing is to be written");
  check_no_faults("sums of many tensors");
  drop(expected);
  drop(found);
}

// A first step without a step count: SGD's buffer takes the gradient whole, as the host says.
void test_first() {
  const Setting s = setting("sgd", "first");
  const Arrangement a{DType::kFloat32, DType::kFloat32, DType::kFloat32, run_of(0), run_of(0), run_of(0), false};
  Parameters expected = make(s, a), found = make(s, a);
  run_cpu(s, expected, false, 0);
  std::vector<cuda::TensorTask> tasks = tasks_of(found);
  std::vector<cuda::Count> counts;
  for (uint32_t i = 0; i < tasks.size(); ++i) {
    counts.push_back({nullptr, 0, 0, 0, 1, 0, 0, 0, {}});
    tasks[i].prepared = i;
  }
  cuda::GroupSource source{};
  source.settings = settings_of(s);
  std::copy(s.options.begin(), s.options.end(), source.options);
  std::vector<cuda::Prepared> prepared(tasks.size());
  cuda::prepare({0, false, &source, 1, counts.data(), counts.size(), 1, 0, nullptr, nullptr, nullptr, prepared.data()},
                nullptr);
  cuda::update({0, false, tasks.data(), tasks.size(), prepared.data(), true, nullptr}, nullptr, nullptr);
  check(same_bits(expected, found, true), "a first step that is not counted");
  check_no_faults("a first step that is not counted");
  drop(expected);
  drop(found);
}

// Many groups in one preparation, each parameter with a step count of its own.
void test_groups() {
  constexpr uint32_t kCount = 2500, kGroups = 40;
  std::vector<cuda::GroupSource> sources(kGroups);
  std::vector<float> steps(kCount);
  std::vector<cuda::Count> counts;
  for (uint32_t g = 0; g < kGroups; ++g) {
    sources[g] = cuda::GroupSource{};
    sources[g].settings.lr = g + 1;
    const double options[] = {0.9, 0.999, 1e-8, 0, 0, 1};
    std::copy(options, options + 6, sources[g].options);
  }
  for (uint32_t i = 0; i < kCount; ++i) {
    steps[i] = static_cast<float>(i % 7);
    // Every third was counted by the host.
    void* on_device = i % 3 == 0 ? nullptr : &steps[i];
    counts.push_back({on_device, i % 7 + 1.0, i * 13 / 50 % kGroups, 0, 0, 0, 0, 0, {}});
  }
  std::vector<cuda::Prepared> prepared(kCount);
  const cpu::Rule* rule = cpu::find_rule("adam");
  cuda::prepare({rule->index, false, sources.data(), kGroups, counts.data(), kCount, 1, 0, nullptr, nullptr, nullptr,
                 prepared.data()},
                nullptr);
  bool same = true;
  for (uint32_t i = 0; i < kCount; ++i) {
    Scalars expected;
    std::memset(static_cast<void*>(&expected), 0, sizeof expected);
    Numbers none{};
    const cuda::GroupSource& source = sources[counts[i].group];
    rule->prepare(source.options, StepInfo{source.settings.lr, false, 0, i % 7 + 1.0, i % 7 == 0}, false, &expected,
                  &none);
    Adam::Scalars<float> a, b;
    std::memcpy(&a, expected.rule, sizeof a);
    std::memcpy(&b, prepared[i].scalars.rule, sizeof b);
    same = same && a.step_size == b.step_size && a.inverse_sqrt_correction2 == b.inverse_sqrt_correction2 &&
           prepared[i].step == i % 7 + 1;
  }
  check(same, "scalars of many groups");
  check_no_faults("scalars of many groups");
}

// More than 2^31 elements: the first and the last block of a tensor that is only reserved.
void test_huge() {
  const int64_t n = (int64_t{1} << 31) + 8;
  const Reserved param(n), gradient(n);
  if (!param || !gradient) return check(false, "could not reserve memory for a huge tensor");
  const uint16_t one = to_bfloat16(1.0f).bits;
  const int64_t places[] = {0, 16383, n - 9, n - 8, n - 1};
  for (const int64_t at : places) gradient[at] = one;
  cuda::TensorTask task{};
  task.numel = n;
  task.param = {param.get(), nullptr, DType::kBFloat16};
  task.gradient = {gradient.get(), nullptr, DType::kBFloat16};
  const cuda::Prepared prepared = prepared_of(setting("sgd", "plain"), false);
  simt::take_launches();
  const unsigned last = static_cast<unsigned>((n - 1) / 16384);
  simt::set_blocks({0, last - 1, last});
  cuda::update({0, false, &task, 1, &prepared, false, nullptr}, nullptr, nullptr);
  simt::set_blocks({});
  check(simt::take_launches() == std::vector<unsigned>{last + 1}, "a huge tensor takes one launch");
  const uint16_t stepped = to_bfloat16(-0.1f).bits;
  for (const int64_t at : places) check(param[at] == stepped, "element " + std::to_string(at) + " of a huge tensor");
  check_no_faults("a huge tensor");
}

}  // namespace
}  // namespace trainopt

// With an argument, only one part of the tests: norms, cross-entropy (a part of its grid), pointwise, streams or steps.
int main(int count, char** arguments) {
  using namespace trainopt;
  const std::string only = count > 1 ? arguments[1] : "";
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // a fault may end the process
  std::printf("kernel parameters of %zu bytes\n", cuda::kParameterBytes);
  if (only.empty() || only == "norms") test_norms();
  if (only.empty() || only == "cross-entropy") {
    test_cross_entropy(only.empty());
    test_cross_entropy_edges();
  }
  if (only.empty() || only == "large-rows") test_large_rows();
  if (only.empty() || only == "pointwise") test_pointwise_losses();
  if (only.empty() || only == "streams") test_streams();
  if (only.empty() || only == "steps") {
    test_rules();
    test_expanded_gradient();
    test_chunks();
    test_many();
    test_launches();
    test_many_sums();
    test_first();
    test_groups();
    test_huge();
    test_steps_in_two_parts();
    test_stats();
    test_factors();
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
