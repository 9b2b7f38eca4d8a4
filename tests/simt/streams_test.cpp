// A training step's launches on a stream, which does its work late, and in a graph: as when each is done at once. What
// the host hands over is gone by then.
#include <cstring>

#include "cpu/engine.h"
#include "cpu/losses.h"
#include "cuda/cross_entropy.h"
#include "cuda/engine.h"
#include "cuda/norm.h"
#include "cuda/pointwise.h"
#include "kernel_tests.h"
#include "queue.h"

namespace trainopt {
namespace {

constexpr int64_t kCount = 2100, kRows = 5, kClasses = 40;

// The memory of a device: all that the kernels read and write.
struct Memory {
  std::vector<float> params, gradients, moments, squares, logits, logit_gradient, targets;
  std::vector<int64_t> labels;
  std::vector<double> norm_partials, loss_partials, peak, sum;
  std::vector<cuda::LossPartial> row_partials;
  std::vector<cuda::CountPartial> count_partials;
  std::vector<cuda::Prepared> prepared;
  float lr = 0, steps = 0, found_inf = 0, mse = 0, entropy = 0;
  double norm = 0;
  cuda::TargetTotals totals{};
  cuda::BadTarget bad{};

  std::vector<float> results() const {
    std::vector<float> all{steps, mse, entropy, static_cast<float>(norm)};
    for (const std::vector<float>* some : {&params, &gradients, &moments, &squares, &logit_gradient})
      all.insert(all.end(), some->begin(), some->end());
    return all;
  }
};

void set_inputs(Memory& m, int batch) {
  m.lr = 0.1f / static_cast<float>(batch + 1);
  for (size_t i = 0; i < m.gradients.size(); ++i)
    m.gradients[i] = static_cast<float>((i * 7 + static_cast<size_t>(batch) * 5) % 11) - 5;
  for (size_t i = 0; i < m.logits.size(); ++i)
    m.logits[i] = static_cast<float>((i * 3 + static_cast<size_t>(batch)) % 13) / 4;
  for (size_t i = 0; i < m.labels.size(); ++i) m.labels[i] = static_cast<int64_t>(i + static_cast<size_t>(batch));
}

Memory fresh_memory() {
  Memory m;
  const auto poisoned = [](auto& memory, int64_t count) {
    memory.resize(static_cast<size_t>(count));
    std::memset(static_cast<void*>(memory.data()), 0xff, memory.size() * sizeof memory[0]);
  };
  m.params.assign(kCount, 1.0f);
  m.moments.assign(kCount, 0.0f);
  m.squares.assign(kCount, 0.0f);
  m.targets.assign(kCount, 0.5f);
  m.gradients.resize(kCount);
  m.logits.resize(kRows * kClasses);
  m.labels.resize(kRows);
  poisoned(m.logit_gradient, kRows * kClasses);
  const cuda::NormTensor whole{{m.gradients.data(), nullptr, DType::kFloat32}, kCount};
  poisoned(m.norm_partials, cuda::norm_partials(&whole, 1));
  poisoned(m.loss_partials, cuda::pointwise_partials(kCount));
  poisoned(m.peak, kRows);
  poisoned(m.sum, kRows);
  poisoned(m.row_partials, kRows);
  poisoned(m.count_partials, cuda::count_blocks(kRows));
  poisoned(m.prepared, 1);
  return m;
}

TensorView view(std::vector<float>& memory) { return {memory.data(), nullptr, DType::kFloat32}; }
TensorView view(float& number) { return {&number, nullptr, DType::kFloat32}; }

void entropy(Memory& m, cuda::Stream stream) {
  cuda::CrossEntropyTask task{};
  task.reduction = Reduction::kMean;
  task.classes = kClasses;
  task.inner = 1;
  task.logits = {m.logits.data(), kClasses, 1, DType::kFloat32};
  task.labels = m.labels.data();
  task.rows = kRows;
  task.peak = m.peak.data();
  task.sum = m.sum.data();
  cuda::count_targets({task, true, false, m.count_partials.data(), &m.totals}, stream);
  cuda::RowsWork rows{};
  rows.task = task;
  rows.forward = true;
  rows.partials = m.row_partials.data();
  rows.gradient = {m.logit_gradient.data(), kClasses, 1, DType::kFloat32};
  rows.on_device = &m.totals;
  cuda::cross_entropy_rows(rows, stream);
  cuda::FinishWork finish{};
  finish.partials = m.row_partials.data();
  finish.count = cuda::rows_blocks(task);
  finish.reduction = task.reduction;
  finish.loss = view(m.entropy);
  finish.labels = m.labels.data();
  finish.classes = kClasses;
  finish.ndim = 1;
  finish.sizes[0] = kRows;
  finish.bad = &m.bad;
  cuda::cross_entropy_finish(finish, stream);
}

void step(Memory& m, cuda::Stream stream) {
  entropy(m, stream);

  PointwiseTask pointwise{};
  pointwise.numel = kCount;
  pointwise.input = view(m.params);
  pointwise.target = view(m.targets);
  const int mse = cpu::find_pointwise_loss("mse_loss")->index;
  cuda::pointwise_forward(mse, false, pointwise, {view(m.mse), kCount, m.loss_partials.data()}, nullptr, stream);

  // Lists of the host's, which are overwritten before any kernel has run.
  cuda::NormTensor gradients{view(m.gradients), kCount};
  cuda::norm({Norm::kSquares, &gradients, 1, m.norm_partials.data(), &m.norm, {}}, stream);
  cuda::clip(&gradients, 1, &m.norm, 1.0, stream);

  cuda::GroupSource group{};
  const double options[] = {0.9, 0.999, 1e-8, 0, 0, 1};
  std::copy(options, options + 6, group.options);
  group.replaced[0] = {&m.lr, cuda::DeviceNumber::kLr, 0};
  cuda::Count count{&m.steps, 0, 0, 0, 0, 0, 0, 0, {}};
  cuda::TensorTask task{};
  task.numel = kCount;
  task.param = view(m.params);
  task.gradient = view(m.gradients);
  task.state[0] = view(m.moments);
  task.state[1] = view(m.squares);
  const int adam = cpu::find_rule("adam")->index;
  cuda::prepare({adam, false, &group, 1, &count, 1, 1, 0, nullptr, nullptr, &m.found_inf, m.prepared.data()}, stream);
  cuda::update({adam, false, &task, 1, m.prepared.data(), true, &m.found_inf}, nullptr, stream);

  for (auto [memory, bytes] : {std::pair<void*, size_t>{&gradients, sizeof gradients},
                               {&group, sizeof group},
                               {&count, sizeof count},
                               {&task, sizeof task}})
    std::memset(memory, 0xff, bytes);
}

// Memory that nothing has written yet holds NaNs.
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
}

// The results after each batch, each step done by `run`.
template <class Run>
std::vector<std::vector<float>> train(Memory& m, const Run& run) {
  std::vector<std::vector<float>> all;
  for (int batch = 0; batch < 3; ++batch) {
    set_inputs(m, batch);
    run();
    all.push_back(m.results());
  }
  return all;
}

}  // namespace

void test_streams() {
  char handles[8];  // no default streams
  const auto stream = reinterpret_cast<cuda::Stream>(&handles[0]);
  const auto check_no_faults = [](const std::string& what) {
    const std::vector<simt::Fault> faults = simt::take_faults();
    check(faults.empty(), what + ": " + (faults.empty() ? "" : faults[0].text));
  };

  Memory at_once = fresh_memory();
  const auto expected = train(at_once, [&] { step(at_once, nullptr); });
  check(expected[2] != expected[1] && !std::isnan(expected[2][1]) && !std::isnan(expected[2][2]), "a step at once");
  check_no_faults("a step at once");

  for (const uint64_t seed : {0, 1, 2}) {
    const std::string which = " with seed " + std::to_string(seed);
    simt::set_seed(seed);
    Memory late = fresh_memory();
    bool waits = true;
    const auto found = train(late, [&] {
      const std::vector<float> before = late.results();
      step(late, stream);
      waits = waits && same_bits(late.results(), before);
      simt::finish_stream(stream);
    });
    check(waits, "nothing is done before somebody waits" + which);
    check(found == expected, "a step on a stream" + which);

    Memory replayed = fresh_memory();
    set_inputs(replayed, 7);  // what the graph must not remember
    simt::begin_capture(stream);
    step(replayed, stream);
    const std::shared_ptr<simt::Graph> graph = simt::end_capture(stream);
    check(train(replayed,
                [&] {
                  simt::replay(graph, stream);
                  simt::finish_stream(stream);
                }) == expected,
          "a step in a graph" + which);
    check_no_faults("a step on a stream" + which);
  }
  simt::set_seed(0);
}

}  // namespace trainopt
