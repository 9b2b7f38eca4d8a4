// Several optimizers at once, each by several threads, as they are where Python's interpreter is let go: the same bits
// as one after the other in one thread. Meant to run under ThreadSanitizer (`make sanitize`).
#include <thread>

#include "cpu/norm.h"
#include "step_judge.h"

namespace trainopt {
namespace {

constexpr int kOptimizers = 4, kThreads = 3, kSteps = 3;

Setting setting_of(int optimizer, int step) {
  const Setting kChosen[kOptimizers] = {setting("sgd", "momentum"), setting("adam", "plain"),
                                        setting("adam", "everything"), setting("lamb", "plain")};
  Setting s = kChosen[optimizer];
  s.step = step + 1;
  return s;
}

// What all steps of one optimizer need, as a plan has it.
struct Optimizer {
  const int number;
  const Arrangement arrangement;
  Parameters parameters;
  std::vector<cpu::TensorTask> tasks;
  std::vector<int64_t> starts{0};
  Scalars scalars;

  Optimizer(int which, DType dtype)
      : number(which), arrangement{dtype, dtype, dtype, run_of(0), run_of(0), run_of(0), false} {
    for (const int64_t size : {int64_t{3}, int64_t{258}, int64_t{4098}, int64_t{0}, int64_t{1029}})
      parameters.push_back(new Parameter(size, size + 1, states_of(setting_of(number, 0)), arrangement));
    for (const Parameter* from : parameters) {
      cpu::TensorTask task{};
      from->describe(&task);
      task.scalars = &scalars;
      task.tensor = static_cast<uint32_t>(tasks.size());
      tasks.push_back(task);
      starts.push_back(starts.back() + cpu::blocks_of(from->numel));
    }
  }
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;
  ~Optimizer() { drop(parameters); }

  void step(int which, int threads) {
    const Setting s = setting_of(number, which);
    scalars = scalars_of(s, false);
    cpu::Update run{tasks.data(), starts.data(), tasks.size(), cpu::find_rule(s.rule), false};
    const auto share = [&](auto use) {
      const int64_t blocks = starts.back();
      const auto part_of = [&, use](int part) { use(blocks * part / threads, blocks * (part + 1) / threads); };
      std::vector<std::thread> others;
      for (int part = 1; part < threads; ++part) others.emplace_back(part_of, part);
      part_of(0);
      for (std::thread& other : others) other.join();
    };
    std::vector<Sum> sums[kPasses];
    for (const Pass pass : passes_of(s)) {
      const auto count = static_cast<size_t>(run.rule->sums_in(pass));
      std::vector<Sum> partials(cpu::places_of(run) * count);
      sums[pass].resize(tasks.size() * count);
      share([&](int64_t first, int64_t last) { cpu::gather_blocks(run, pass, first, last, partials.data()); });
      for (size_t t = 0; t < tasks.size(); ++t) cpu::sums_of(run, pass, t, partials.data(), &sums[pass][t * count]);
      run.sums[pass] = sums[pass].data();
    }
    for (cpu::TensorTask& task : tasks) task.is_measured = which % 2 == 1;
    std::vector<StepStats> stats(cpu::places_of(run));
    share([&](int64_t first, int64_t last) { cpu::run_blocks(run, first, last, stats.data()); });
  }
};

void test_steps(DType dtype) {
  std::vector<std::thread> running;
  std::vector<Optimizer*> at_once;
  for (int i = 0; i < kOptimizers; ++i) at_once.push_back(new Optimizer(i, dtype));
  for (Optimizer* optimizer : at_once)
    running.emplace_back([optimizer] {
      for (int step = 0; step < kSteps; ++step) optimizer->step(step, kThreads);
    });
  // Meanwhile somebody chooses among the variants, which all give the same bits, and somebody reads the gradients.
  const cpu::Variant before = cpu::current_variant();
  const TensorView gradient = at_once[0]->parameters[2]->gradient.view();
  const double norm = cpu::norm_of_chunk(Norm::kSquares, gradient, 0, at_once[0]->parameters[2]->numel);
  for (int v = 0; v < cpu::kVariants; ++v)
    if (cpu::supported(static_cast<cpu::Variant>(v))) cpu::set_variant(static_cast<cpu::Variant>(v));
  cpu::set_variant(before);
  check(norm == cpu::norm_of_chunk(Norm::kSquares, gradient, 0, at_once[0]->parameters[2]->numel),
        "the norm of a gradient while others step");
  for (std::thread& thread : running) thread.join();
  for (Optimizer* optimizer : at_once) {
    Optimizer alone(optimizer->number, dtype);
    for (int step = 0; step < kSteps; ++step) alone.step(step, 1);
    check(
        same_bits(optimizer->parameters, alone.parameters, true),
        std::string("optimizer ") + std::to_string(optimizer->number) + " of " + format_of(dtype).name + " in threads");
    delete optimizer;
  }
}

}  // namespace
}  // namespace trainopt

int main() {
  using namespace trainopt;
  for (const DType dtype : kDTypes)
    if (dtype != DType::kFloat64) test_steps(dtype);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
