// The pointwise losses on the SIMT machine: every loss, type, order in memory and option against the formulas in
// double, and where no exponential or logarithm is taken, or in double, against the CPU engine bit by bit.
#include "cuda/pointwise.h"

#include <algorithm>
#include <iterator>
#include <memory>

#include "../cpp/arrays.h"
#include "../cpp/pointwise_judge.h"
#include "cpu/losses.h"
#include "kernel_tests.h"

namespace trainopt {
namespace {

constexpr double kParameter = 0.75;

enum Role { kInput, kTarget, kWeight, kPositive, kUpstream, kValue, kInputGradient, kTargetGradient, kRoles };
constexpr int kRead = kUpstream + 1;  // so many are read

struct Types {
  DType input, target, factors, upstream;

  DType of(int role) const {
    const DType by_role[kRoles] = {input, target, factors, factors, upstream, result(), input, target};
    return by_role[role];
  }
  // As torch promotes them.
  DType result() const {
    if (input == target) return input;
    return is_float64() ? DType::kFloat64 : DType::kFloat32;
  }
  bool is_float64() const { return input == DType::kFloat64 || target == DType::kFloat64; }
};

const std::vector<Types> kTypes = {
    {DType::kFloat32, DType::kFloat32, DType::kFloat32, DType::kFloat32},
    {DType::kFloat64, DType::kFloat64, DType::kFloat64, DType::kFloat64},
    {DType::kBFloat16, DType::kBFloat16, DType::kBFloat16, DType::kBFloat16},
    {DType::kFloat16, DType::kFloat16, DType::kFloat16, DType::kFloat16},
    {DType::kBFloat16, DType::kFloat32, DType::kFloat64, DType::kFloat32},
    {DType::kFloat16, DType::kBFloat16, DType::kFloat16, DType::kFloat32},
    {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat64},
    {DType::kFloat64, DType::kFloat16, DType::kFloat32, DType::kFloat32},
};

// Broadcast: over all elements, over rows of three, over rows of eight (aligned and not), over columns.
const Placement kScalar{"scalar", true, 3, [](Layout& l) { l.strides[0] = l.strides[1] = 0; }, 1};
const Placement kRow{"row", true, 3, [](Layout& l) { l.strides[0] = 0, l.strides[1] = 1; }, 0};
const Placement kWideRow{"row of 8", true, 8, [](Layout& l) { l.strides[0] = 0, l.strides[1] = 1; }, 0};
const Placement kShiftedRow{"row of 8, shifted", true, 8, [](Layout& l) { l.strides[0] = 0, l.strides[1] = 1; }, 1};
const Placement kColumn{"column", true, 3, [](Layout& l) { l.strides[0] = 1, l.strides[1] = 0; }, 0};

struct Places {
  const char* name;
  Placement input, target, weight, positive, upstream, output;

  const Placement& of(int role) const {
    const Placement* by_role[kRoles] = {&input, &target, &weight, &positive, &upstream, &output, &output, &output};
    return *by_role[role];
  }
};

const Places kPlain{"aligned", run_of(0), run_of(0), run_of(0), run_of(0), run_of(0), run_of(0)};
const std::vector<Places> kPlaces = {
    kPlain,
    {"unaligned", run_of(1), run_of(3), run_of(5), run_of(1), run_of(7), run_of(1)},
    {"unaligned outputs", run_of(0), run_of(0), run_of(0), run_of(0), run_of(0), run_of(1)},
    {"unaligned factors", run_of(0), run_of(0), run_of(3), run_of(1), run_of(0), run_of(0)},
    {"broadcast factors", run_of(0), run_of(0), kRow, kScalar, run_of(0), run_of(0)},
    {"factors of 8", run_of(0), run_of(0), kWideRow, kShiftedRow, run_of(0), run_of(0)},
    {"strided", kTransposed, kSliced, kColumn, kSliced, kExpanded, kTransposed},
    {"broadcast input", kRow, run_of(0), kColumn, kRow, kColumn, run_of(0)},
};

// What there is beside input and target, and what is wanted.
struct Options {
  bool weight, positive, upstream, input_gradient, target_gradient;
};

// All tensors of a pass.
class Tensors {
 public:
  Tensors(const Types& types, const Places& places, int64_t numel, bool guarded) {
    for (int role = 0; role < kRoles; ++role)
      array_[role] = std::make_unique<Array>(types.of(role), numel, places.of(role), guarded);
  }
  Array& operator[](int role) const { return *array_[role]; }

  PointwiseTask task(int64_t numel, const Options& options) const {
    PointwiseTask task{};
    task.numel = numel;
    task.input = array_[kInput]->view();
    task.target = array_[kTarget]->view();
    if (options.weight) task.weight = array_[kWeight]->view();
    if (options.positive) task.positive = array_[kPositive]->view();
    task.parameter = kParameter;
    if (options.upstream) task.upstream = array_[kUpstream]->view();
    task.scale = std::nan("");
    task.value = array_[kValue]->view();
    if (options.input_gradient) task.input_gradient = array_[kInputGradient]->view();
    if (options.target_gradient) task.target_gradient = array_[kTargetGradient]->view();
    return task;
  }

  bool is_intact() const {
    bool intact = true;
    for (const std::unique_ptr<Array>& array : array_) intact = intact && array->is_intact();
    return intact;
  }

 private:
  std::unique_ptr<Array> array_[kRoles];
};

void set_values(const Formula& formula, Tensors& tensors, int64_t numel) {
  const std::function<double(double)> shapes[kRead] = {formula.input, formula.target, as_it_is, into_unit, as_it_is};
  for (int role = 0; role < kRead; ++role) {
    RandomNumbers numbers{static_cast<uint64_t>(role + 1)};
    for (int64_t i = 0; i < numel; ++i) tensors[role].set(i, shapes[role](numbers.value()));
  }
}

// The same values as one aligned run each.
Tensors plain_copy(const Types& types, const Tensors& from, int64_t numel) {
  Tensors copy(types, kPlain, numel, true);
  for (int role = 0; role < kRead; ++role)
    for (int64_t i = 0; i < numel; ++i) copy[role].set(i, from[role].get(i));
  return copy;
}

bool same_elements(const Array& a, const Array& b, int64_t numel) {
  for (int64_t i = 0; i < numel; ++i)
    if (a.bits(i) != b.bits(i) && !(std::isnan(a.get(i)) && std::isnan(b.get(i)))) return false;
  return true;
}

// On a device exp and log are its own, in float32.
bool has_cpus_bits(const Formula& formula, bool is_float64) {
  const char* const others[] = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"};
  return is_float64 || std::any_of(std::begin(others), std::end(others),
                                   [&](const char* name) { return std::strcmp(formula.name, name) == 0; });
}

// The sum divided by `divisor`, in a dtype; what is not written stays NaN.
double run_forward(int loss, bool is_float64, PointwiseTask task, bool keep, DType dtype, double divisor) {
  Array result(dtype, 1, run_of(0), true);
  result.set(0, std::nan(""));
  std::vector<double> partials(static_cast<size_t>(cuda::pointwise_partials(task.numel)), std::nan(""));
  if (!keep) task.value = TensorView{};
  cuda::pointwise_forward(loss, is_float64, task, {result.view(), divisor, partials.data()}, nullptr, nullptr);
  check(result.is_intact(), "written beside the sum");
  return result.get(0);
}

double rounded(double x, DType dtype) {
  Array one(dtype, 1, run_of(0), false);
  one.set(0, x);
  return one.get(0);
}

void test_pass(const Formula& formula, const Types& types, const Places& places, int64_t numel, const Options& options,
               bool guarded) {
  const std::string what = std::string(formula.name) + ", " + format_of(types.input).name + " and " +
                           format_of(types.target).name + ", " + places.name + ", " + std::to_string(numel);
  const bool is_float64 = types.is_float64();
  const cpu::PointwiseLoss& loss = *cpu::find_pointwise_loss(formula.name);
  Tensors found(types, places, numel, guarded);
  set_values(formula, found, numel);
  Tensors expected = plain_copy(types, found, numel);
  const double number = 0.375, divisor = static_cast<double>(numel);

  PointwiseTask task = expected.task(numel, options);
  task.scale = number / divisor;
  cpu::pointwise_forward(loss, is_float64, task, 0, numel);
  cpu::pointwise_backward(loss, is_float64, task, 0, numel);

  // Forward: with and without each element's value, in either order of threads, and as aligned runs: one sum.
  task = found.task(numel, options);
  const double sum = run_forward(loss.index, is_float64, task, true, DType::kFloat64, 1);
  if (has_cpus_bits(formula, is_float64))
    check(same_elements(found[kValue], expected[kValue], numel), what + ": other values than the CPU's");
  simt::set_order(simt::Order::kDescending);
  const double again = run_forward(loss.index, is_float64, task, false, DType::kFloat64, 1);
  simt::set_order(simt::Order::kAscending);
  Tensors plain = plain_copy(types, found, numel);
  const double of_plain = run_forward(loss.index, is_float64, plain.task(numel, options), true, DType::kFloat64, 1);
  check(same_value(sum, again), what + ": another sum in another order of threads");
  check(same_value(sum, of_plain), what + ": another sum than that of aligned runs");
  check(same_elements(found[kValue], plain[kValue], numel), what + ": other values than those of aligned runs");
  check(same_value(run_forward(loss.index, is_float64, task, false, types.result(), divisor),
                   rounded(sum / divisor, types.result())),
        what + ": not the mean, rounded once");

  // Backward.
  const float scale = static_cast<float>(number);
  const cuda::Upstream upstream{{const_cast<float*>(&scale), nullptr, DType::kFloat32}, divisor};
  cuda::pointwise_backward(loss.index, is_float64, task, options.upstream ? cuda::Upstream{} : upstream, nullptr);
  if (has_cpus_bits(formula, is_float64))
    for (const int role : {kInputGradient, kTargetGradient})
      check(same_elements(found[role], expected[role], numel), what + ": other gradients than the CPU's");
  check(found.is_intact(), what + ": written where nothing is to be written");
  check_no_faults(what);

  bool right = true;
  long double exact_sum = 0;
  double size = 1;
  const DType arithmetic = is_float64 ? DType::kFloat64 : DType::kFloat32;
  const auto is_close_to = [&](int role, int64_t i, double exact, double scale_of_terms) {
    const double allowed = spacing(exact, types.of(role)) + spacing(scale_of_terms, arithmetic) * 16;
    return std::fabs(found[role].get(i) - exact) <= allowed;
  };
  for (int64_t i = 0; i < numel; ++i) {
    const double x = found[kInput].get(i), t = found[kTarget].get(i), w = options.weight ? found[kWeight].get(i) : 1;
    const double p = options.positive ? found[kPositive].get(i) : 1;
    const double g = options.upstream ? found[kUpstream].get(i) : number / divisor;
    const double exact = w * formula.value(x, t, p, kParameter), terms = size_of_terms(formula, x, t, w, exact);
    exact_sum += exact;
    size += terms;
    right = right && is_close_to(kValue, i, exact, terms);
    if (options.input_gradient)
      right = right &&
              is_close_to(kInputGradient, i, w * g * formula.slope(x, t, p, kParameter), terms * (1 + std::fabs(g)));
    if (options.target_gradient)
      right = right && is_close_to(kTargetGradient, i, w * g * formula.target_slope(x, t, p, kParameter),
                                   terms * (1 + std::fabs(g)));
  }
  check(right, what + ": not what the formula gives");
  check(std::fabs(sum - static_cast<double>(exact_sum)) <= (is_float64 ? 1e-15 : 2e-7) * size, what + ": the sum");
}

void test_grid() {
  int turn = 0;
  for (const Formula& formula : kFormulas)
    for (const Types& types : kTypes)
      for (const Places& places : kPlaces)
        for (const int64_t numel : {24, 264, 2064, 4104}) {
          // Every third: all sizes, options and guards still meet.
          if (++turn % 3 != 0) continue;
          const Options options{turn % 2 == 0, turn % 5 < 3, turn % 7 < 4, turn % 11 != 0, turn % 13 != 0};
          test_pass(formula, types, places, numel, options, turn / 3 % 2 == 0);
        }
}

// Sizes that no eight and no block divides, of which one element is the smallest.
void test_tails() {
  for (const Formula& formula : kFormulas)
    for (const int64_t numel : {1, 7, 9, 2047, 2049, 4099})
      for (const Places& places : {kPlaces[0], kPlaces[1], kPlaces[3]}) {
        test_pass(formula, kTypes[0], places, numel, {true, true, numel % 2 == 0, true, true}, true);
        test_pass(formula, kTypes[2], places, numel, {true, true, true, true, true}, false);
      }
}

// The sum of nothing is 0 and its mean NaN; no kernel runs for no values and no gradients.
void test_empty() {
  const Tensors none(kTypes[0], kPlain, 0, true);
  const PointwiseTask task = none.task(0, {true, true, true, true, true});
  check(run_forward(0, false, task, true, DType::kFloat32, 1) == 0, "the sum of nothing");
  check(std::isnan(run_forward(0, false, task, true, DType::kFloat32, 0)), "the mean of nothing");
  simt::take_launches();
  cuda::pointwise_forward(0, false, task, {}, nullptr, nullptr);
  cuda::pointwise_backward(0, false, task, {}, nullptr);
  check(simt::take_launches().empty(), "a launch for nothing");
  check(none.is_intact(), "written for nothing");
  check_no_faults("nothing");
}

// What is outside of a loss's domain: as the CPU has it, and binary_cross_entropy of no probability is NaN.
void test_specials() {
  const double specials[] = {0, 1, -0.5, 1.5, HUGE_VAL, -HUGE_VAL, std::nan(""), 1e-40, 200, -200, 3e38, -0.0};
  constexpr int64_t kCount = 12 * 12;
  for (const Formula& formula : kFormulas) {
    for (const Types& types : {kTypes[0], kTypes[1], kTypes[3]}) {
      Tensors found(types, kPlain, kCount, true);
      for (int64_t i = 0; i < kCount; ++i) {
        found[kInput].set(i, specials[i / 12]);
        found[kTarget].set(i, specials[i % 12]);
      }
      const Tensors expected = plain_copy(types, found, kCount);
      const cpu::PointwiseLoss& loss = *cpu::find_pointwise_loss(formula.name);
      const bool is_float64 = types.is_float64();
      const Options options{false, false, false, true, true};
      PointwiseTask task = expected.task(kCount, options);
      task.scale = 1;
      cpu::pointwise_forward(loss, is_float64, task, 0, kCount);
      cpu::pointwise_backward(loss, is_float64, task, 0, kCount);
      double one = 1;
      run_forward(loss.index, is_float64, found.task(kCount, options), true, DType::kFloat64, 1);
      cuda::pointwise_backward(loss.index, is_float64, found.task(kCount, options),
                               {{&one, nullptr, DType::kFloat64}, 1}, nullptr);
      const std::string what = std::string(formula.name) + " of special numbers";
      for (const int role : {kValue, kInputGradient, kTargetGradient}) {
        bool right = has_cpus_bits(formula, is_float64) ? same_elements(found[role], expected[role], kCount) : true;
        for (int64_t i = 0; i < kCount; ++i) {
          const double mine = found[role].get(i), theirs = expected[role].get(i);
          const double allowed = types.of(role) == DType::kFloat16 ? 2e-3 : 1e-6;
          right =
              right && (same_value(mine, theirs) || std::fabs(mine - theirs) <= allowed * std::fabs(theirs) + 1e-37);
        }
        check(right, what + ": not what the CPU gives");
      }
      if (std::strcmp(formula.name, "binary_cross_entropy") != 0) continue;
      for (int64_t i = 0; i < kCount; ++i) {
        const double x = found[kInput].get(i), t = found[kTarget].get(i);
        if (!(x >= 0 && x <= 1) && std::isfinite(t)) check(std::isnan(found[kValue].get(i)), what + ": not NaN");
      }
    }
  }
  check_no_faults("special numbers");
}

// An input or a target that is no probability is told of, wherever it is, and nothing else is.
void test_bad_probabilities() {
  const int loss = cpu::find_pointwise_loss("binary_cross_entropy")->index;
  constexpr int64_t kCount = 4100;
  Array input(DType::kFloat32, kCount, run_of(0), true), target(DType::kFloat32, kCount, run_of(0), true);
  for (int64_t i = 0; i < kCount; ++i) input.set(i, i % 2), target.set(i, 0.5);
  PointwiseTask task{};
  task.numel = kCount;
  task.input = input.view();
  task.target = target.view();
  double result;
  std::vector<double> partials(static_cast<size_t>(cuda::pointwise_partials(kCount)));
  const auto told_of = [&](int which) {
    int64_t told = 0;
    cuda::pointwise_forward(which, false, task, {{&result, nullptr, DType::kFloat64}, 1, partials.data()}, &told,
                            nullptr);
    return told;
  };
  check(told_of(loss) == 0, "0 and 1 are probabilities");
  for (const int64_t at : {int64_t{0}, int64_t{2047}, int64_t{2048}, kCount - 1})
    for (const double bad : {-0.001, 1.001, HUGE_VAL, std::nan("")}) {
      for (Array* array : {&input, &target}) {
        const double before = array->get(at);
        array->set(at, bad);
        check(told_of(loss) == (array == &input ? 1 : 2), "element " + std::to_string(at) + " is no probability");
        check(std::isnan(result), "the loss of what is no probability");
        check(told_of(cpu::find_pointwise_loss("mse_loss")->index) == 0, "any number has a squared error");
        array->set(at, before);
      }
    }
  check_no_faults("bad probabilities");
}

// More than 2^31 elements, which are only reserved: the first and the last block, forward and backward.
void test_huge() {
  const int64_t n = (int64_t{1} << 31) + 8;
  const Reserved input(n), target(n), gradient(n);
  if (!input || !target || !gradient) return check(false, "could not reserve memory for a huge tensor");
  const int64_t places[] = {0, 4095, n - 9, n - 8, n - 1};
  for (const int64_t at : places) input[at] = to_bfloat16(3.0f).bits;
  PointwiseTask task{};
  task.numel = n;
  task.input = {input.get(), nullptr, DType::kBFloat16};
  task.target = {target.get(), nullptr, DType::kBFloat16};
  task.input_gradient = {gradient.get(), nullptr, DType::kBFloat16};
  double result = std::nan(""), one = 1;
  std::vector<double> partials(static_cast<size_t>(cuda::pointwise_partials(n)));
  const auto last = static_cast<unsigned>(partials.size() - 1);
  simt::take_launches();
  simt::set_blocks({0, last - 1, last});
  cuda::pointwise_forward(0, false, task, {{&result, nullptr, DType::kFloat64}, 1, partials.data()}, nullptr, nullptr);
  cuda::pointwise_backward(0, false, task, {{&one, nullptr, DType::kFloat64}, 1}, nullptr);
  simt::set_blocks({});
  check(simt::take_launches() == std::vector<unsigned>{last + 1, 1, last + 1}, "the launches of a huge tensor");
  check(result == 5 * 9, "the sum of a huge tensor");
  for (const int64_t at : places)
    check(gradient[at] == to_bfloat16(6.0f).bits, "gradient " + std::to_string(at) + " of a huge tensor");
  check_no_faults("a huge tensor");
}

}  // namespace

void test_pointwise_losses() {
  test_grid();
  test_tails();
  test_empty();
  test_specials();
  test_bad_probabilities();
  test_huge();
}

}  // namespace trainopt
