// The CUDA engine's steps of tensors in two parts and of parameters rounded at random: every rule and stage, every way
// to store them and every place in memory, against the CPU engine bit by bit. The CPU's own are judged by tests/cpp.
#include "../cpp/two_part_test.h"

#include <memory>

#include "../cpp/step_judge.h"
#include "kernel_tests.h"
#include "step_run.h"

namespace trainopt {
namespace {

// How the tensors of a parameter lie: so many elements into an aligned word, the gradient transposed or not, as a part
// of a larger whole or not.
struct Lie {
  const char* name;
  int64_t param_shift, gradient_shift, state_shift;
  bool transposed = false, is_shard = false;
};
const Lie kLies[] = {
    {"aligned", 0, 0, 0},        {"shifted parameter", 1, 0, 0},         {"shifted gradient", 0, 3, 0},
    {"shifted states", 0, 0, 5}, {"transposed gradient", 0, 0, 0, true}, {"shard", 0, 0, 0, false, true}};

const TwoParts kWhole[] = {
    {"bfloat16", DType::kBFloat16, DType::kBFloat16, DType::kBFloat16, DType::kBFloat16},
    {"float16, float32 states", DType::kFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat32},
    {"bfloat16, codes", DType::kBFloat16, DType::kBFloat16, DType::kSigned8, DType::kUnsigned8},
    {"float16, float32 gradient, codes", DType::kFloat16, DType::kFloat32, DType::kSigned8, DType::kUnsigned8},
};

// A tensor that begins so many elements into its memory, with nothing behind it.
struct Shifted {
  TwoPartTensor tensor;
  int64_t shift;

  Shifted(DType dtype, const std::vector<float>& values, int64_t by)
      : tensor(dtype, static_cast<int64_t>(values.size())), shift(by * size_of(dtype)) {
    tensor.set_all(values, 0);
    tensor.first.insert(tensor.first.begin(), static_cast<size_t>(shift), 0xa5);
  }
  TensorView view() {
    TensorView result = tensor.view();
    result.data = tensor.first.data() + shift;
    if (tensor.second.empty()) result.beside = nullptr;
    return result;
  }
  bool has_bits_of(const Shifted& other) const {
    return tensor.first == other.tensor.first && tensor.second == other.tensor.second;
  }
};

// What a step reads and writes of one parameter, with the same values for the same number of elements.
struct Stored {
  int64_t numel;
  std::vector<Shifted> param, gradient;  // of one each
  std::unique_ptr<Shifted> states[kMaxViews];
  Layout transposed;
  ShardLayout shard;
  Lie lie;

  Stored(const Setting& s, const TwoParts& stored, const Lie& place, int64_t n) : numel(n), lie(place) {
    transposed = {2, {n / 3, 3}, {1, n / 3}};
    shard = {7, {2, {n / 3, 3}, {5, 1}}};
    RandomNumbers numbers{static_cast<uint64_t>(n)};
    const auto values = [&](bool is_unsigned, bool is_small) {
      std::vector<float> all;
      for (int64_t i = 0; i < n; ++i) {
        // Blocks of one magnitude, and of many.
        const double spread = is_small || i / kCodeBlock % 2 == 0 ? 1 : std::exp(3 * numbers.value());
        const double value = numbers.value() * spread;
        all.push_back(static_cast<float>(is_unsigned ? std::fabs(value * spread) : value));
      }
      return all;
    };
    param.emplace_back(stored.param, values(false, true), place.param_shift);
    gradient.emplace_back(stored.gradient, values(false, false), place.gradient_shift);
    const cpu::Rule* rule = cpu::find_rule(s.rule);
    for (int k = 0; k < kMaxViews; ++k) {
      if (!contains(states_of(s), k)) continue;
      const bool is_unsigned = contains(rule->unsigned_states, k);
      const DType first = k == 0 ? stored.moment : stored.square;
      const DType dtype = k == average_of(s)  ? DType::kFloat32
                          : !has_codes(first) ? first
                          : is_unsigned       ? DType::kUnsigned8
                                              : DType::kSigned8;
      states[k] = std::make_unique<Shifted>(dtype, values(k > 0, false), place.state_shift);
    }
  }
  template <class TensorTask>
  void describe(TensorTask* task) {
    task->numel = numel;
    task->param = param[0].view();
    task->gradient = gradient[0].view();
    if (lie.transposed) task->gradient.layout = &transposed;
    if (lie.is_shard) task->shard = &shard;
    for (int k = 0; k < kMaxViews; ++k) task->state[k] = states[k] == nullptr ? TensorView{} : states[k]->view();
  }
  bool has_bits_of(const Stored& other) const {
    bool same = param[0].has_bits_of(other.param[0]) && gradient[0].has_bits_of(other.gradient[0]);
    for (int k = 0; k < kMaxViews; ++k)
      if (states[k] != nullptr) same = same && states[k]->has_bits_of(*other.states[k]);
    return same;
  }
};

void test_stored(const Setting& s, const TwoParts& stored, const Lie& lie, std::initializer_list<int64_t> sizes) {
  std::vector<std::unique_ptr<Stored>> before, expected, found;
  for (const int64_t n : sizes)
    for (auto* to : {&before, &expected, &found}) to->push_back(std::make_unique<Stored>(s, stored, lie, n));
  run_cpu(s, expected, false, 0);
  run_cuda(s, found, false);
  const std::string what = std::string(s.rule) + " " + s.name + ", " + stored.name + ", " + lie.name +
                           (s.tail.rounds_at_random ? ", rounded at random" : "");
  for (size_t i = 0; i < found.size(); ++i) {
    const std::string which = what + ", " + std::to_string(found[i]->numel) + " elements";
    check(found[i]->has_bits_of(*expected[i]), which + ": not the CPU's bits");
    check(!found[i]->has_bits_of(*before[i]), which + ": nothing has changed");
  }
  const float found_inf = 1;
  run_cuda(s, before, false, &found_inf);
  check(before[0]->has_bits_of(Stored(s, stored, lie, before[0]->numel)), what + ", found_inf: something has changed");
  check_no_faults(what);
}

}  // namespace

void test_steps_in_two_parts() {
  int turn = 0;
  const auto test = [&](const Setting& s, const TwoParts& stored) {
    for (const Lie& lie : kLies) {
      simt::set_order(++turn % 2 == 0 ? simt::Order::kAscending : simt::Order::kDescending);
      test_stored(s, stored, lie, {3, 255, 258, 768, 1029});
    }
  };
  for (Setting s : kSettings) {
    for (const TwoParts& stored : kTwoParts) test(s, stored);
    s.tail.rounds_at_random = true;
    for (const TwoParts& stored : kWhole) test(s, stored);
  }
  // More than a chunk.
  for (const char* name : {"plain", "tail"})
    for (const char* rule : {"adam", "lamb"})
      for (const TwoParts& stored : kTwoParts) test_stored(setting(rule, name), stored, kLies[0], {16641, 33024, 3});
}

}  // namespace trainopt
