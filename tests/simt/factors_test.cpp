// Steps of matrices whose second moments are averages over rows and columns, on the SIMT machine: bit by bit those of
// the CPU engine.
#include "cpu/factors.h"

#include <array>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "../cpp/parameters.h"
#include "cuda/engine.h"
#include "kernel_tests.h"
#include "step_run.h"

namespace trainopt {
namespace {

// Few rows and many, one piece of columns and more, groups that end with a row; stacks of each.
constexpr FactoredShape kShapes[] = {{1, 1, 3},    {1, 7, 6},    {1, 66, 258},  {1, 64, 768},
                                     {1, 33, 513}, {1, 300, 3},  {9, 5, 30},    {3, 129, 100},
                                     {70, 3, 3},   {2, 65, 300}, {1, 3, 17001}, {1, 16390, 3}};

// What a shard of this shape is a part of, with others on all sides.
FactoredBlock block_of(const FactoredShape& shape) {
  return {{shape.matrices + 2, shape.rows + 3, shape.columns + 5}, 1, 2, 4};
}
// The sums over rows and columns of these others.
double of_others(int64_t i) { return 2 + 0.37 * static_cast<double>(i % 11); }

// A matrix with its averages, on either engine.
struct Matrix {
  FactoredShape shape;
  FactoredBlock block;
  FactoredShape whole;
  Parameter tensors;
  Array rows, columns;
  cpu::FactoredTensor factors;

  Matrix(const FactoredShape& of, const Arrangement& a, bool is_shard)
      : shape(of),
        block(block_of(of)),
        whole(is_shard ? block.whole : of),
        tensors(of.matrices * of.rows * of.columns, of.rows, 0, a),
        rows(a.state_dtype, whole.matrices * whole.rows, run_of(0), a.guarded),
        columns(a.state_dtype, whole.matrices * whole.columns, run_of(0), a.guarded),
        factors(of, rows.view(), columns.view(), is_shard ? &block : nullptr) {
    for (int64_t i = 0; i < whole.matrices * whole.rows; ++i) rows.set(i, 0.5 + static_cast<double>(i % 7));
    for (int64_t i = 0; i < whole.matrices * whole.columns; ++i) columns.set(i, 0.25 + static_cast<double>(i % 5));
  }

  template <class Task>
  void describe(Task* task) {
    tensors.describe(task);
    task->state[0] = {&factors, nullptr, DType::kFactored};
    task->numel_of_whole = whole.matrices * whole.rows * whole.columns;
  }
  bool is_intact() const { return tensors.is_intact() && rows.is_intact() && columns.is_intact(); }
};
using Matrices = std::vector<std::unique_ptr<Matrix>>;

// All of them, or every second one, shards.
Matrices make(const Arrangement& a, bool with_shards) {
  Matrices made;
  for (const FactoredShape& shape : kShapes)
    made.push_back(std::make_unique<Matrix>(shape, a, with_shards && made.size() % 2 == 0));
  return made;
}

bool same_bits(const Array& a, const Array& b, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (a.bits(i) != b.bits(i)) return false;
  return true;
}

bool same_bits(const Matrix& a, const Matrix& b) {
  return same_bits(a.tensors.param, b.tensors.param, a.tensors.numel) &&
         same_bits(a.tensors.gradient, b.tensors.gradient, a.tensors.numel) &&
         same_bits(a.rows, b.rows, a.whole.matrices * a.whole.rows) &&
         same_bits(a.columns, b.columns, a.whole.matrices * a.whole.columns);
}

void step_on_cpu(const Setting& s, Matrices& matrices, bool is_float64) {
  const cpu::Rule* rule = cpu::find_rule(s.rule);
  const Scalars scalars = scalars_of(s, is_float64);
  for (const auto& matrix : matrices) {
    cpu::TensorTask task;
    matrix->describe(&task);
    task.scalars = &scalars;
    task.tensor = 0;
    const cpu::FactorSettings settings = rule->factor_settings(scalars, is_float64, task.param.dtype);
    matrix->factors.reserve(is_float64);
    for (int64_t part = 0; part < matrix->factors.cut.parts(); ++part)
      cpu::add_squares(task, is_float64, settings, matrix->factors, part);
    if (matrix->factors.is_shard) {
      std::vector<double> totals(static_cast<size_t>(matrix->whole.numbers()));
      cpu::total_squares(matrix->factors, totals.data());
      for (size_t i = 0; i < totals.size(); ++i) totals[i] += of_others(static_cast<int64_t>(i));
      cpu::move_factors_by(totals.data(), is_float64, settings, matrix->factors);
    } else if (!matrix->factors.cut.is_whole) {
      cpu::move_factors(is_float64, settings, matrix->factors);
    }
    const int64_t starts[] = {0, cpu::blocks_of(task.numel)};
    cpu::Update run{&task, starts, 1, rule, is_float64};
    const auto count = static_cast<size_t>(rule->sums_in(kOwnSums));
    std::vector<Sum> partials(cpu::places_of(run) * count), sums(count);
    cpu::gather_blocks(run, kOwnSums, 0, starts[1], partials.data());
    cpu::sums_of(run, kOwnSums, 0, partials.data(), sums.data());
    run.sums[kOwnSums] = sums.data();
    cpu::run_blocks(run, 0, starts[1]);
  }
}

void step_on_device(const Setting& s, Matrices& matrices, bool is_float64, const float* found_inf) {
  const cuda::Prepared prepared = prepared_of(s, is_float64);
  std::vector<cuda::TensorTask> tasks(matrices.size());
  for (size_t t = 0; t < tasks.size(); ++t) matrices[t]->describe(&tasks[t]);
  cuda::Update work{cpu::find_rule(s.rule)->index, is_float64, tasks.data(), tasks.size(), &prepared, false, found_inf};
  std::vector<cuda::TensorTask> factored = tasks;
  std::vector<std::array<double, 2>> memory(cuda::factor_bytes(work) / sizeof(std::array<double, 2>));
  std::memset(memory.data(), 0xff, memory.size() * sizeof memory[0]);
  const std::vector<int64_t> shared = cuda::shared_numbers(work);
  std::vector<double> totals(static_cast<size_t>(std::accumulate(shared.begin(), shared.end(), int64_t{0})));
  cuda::add_squares(work, memory.data(), totals.data(), nullptr);
  size_t at = 0;
  for (const int64_t count : shared)
    for (int64_t i = 0; i < count; ++i) totals[at++] += of_others(i);
  cuda::move_factors(work, memory.data(), totals.data(), factored.data(), nullptr);
  work.tasks = factored.data();
  step(s, work, factored);
}

void test_step(const Setting& s, const Arrangement& a, bool with_shards = false) {
  const bool is_float64 = a.param_dtype == DType::kFloat64;
  const std::string what = std::string("adafactor ") + s.name + ", " + format_of(a.param_dtype).name + " " +
                           format_of(a.gradient_dtype).name + " " + a.param.name + " " + a.gradient.name +
                           (with_shards ? ", shards" : "");
  Matrices expected = make(a, with_shards), found = make(a, with_shards);
  step_on_cpu(s, expected, is_float64);
  const float overflow = 1, none = 0;
  step_on_device(s, found, is_float64, &overflow);
  const Matrices before = make(a, with_shards);
  for (size_t m = 0; m < found.size(); ++m) check(same_bits(*found[m], *before[m]), what + ": left out");
  step_on_device(s, found, is_float64, &none);
  for (size_t m = 0; m < found.size(); ++m) {
    check(same_bits(*found[m], *expected[m]), what + ", matrix " + std::to_string(m));
    check(found[m]->is_intact(), what + ": memory beside matrix " + std::to_string(m));
  }
  check_no_faults(what);
}

}  // namespace

void test_factors() {
  const Setting plain{"plain", "adafactor", {-0.8, 1e-3, 1e-3, 1}, kDecoupled, 0.05, 0, false, 0, false, 0, 1, 3};
  const Setting all{"all", "adafactor", {-0.3, 0.2, 2, 0.5}, kDecoupled, 0.05, 0.3, true, 0.5, false, 0.1, 3, 2};
  for (const Setting& s : {plain, all})
    for (const DType type : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      test_step(s, {type, type, type, run_of(0), run_of(0), run_of(0), true});
      test_step(s, {type, type, type, run_of(1), run_of(3), run_of(0), true});
      test_step(s, {type, type, type, kTransposed, kSliced, run_of(0), true});
      test_step(s, {type, type, type, run_of(1), kSliced, run_of(0), true}, true);
    }
  test_step(all, {DType::kFloat32, DType::kBFloat16, DType::kFloat16, run_of(0), kTransposed, run_of(0), true});
}

}  // namespace trainopt
