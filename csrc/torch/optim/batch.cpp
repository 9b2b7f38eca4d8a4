#include "torch/optim/batch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "torch/inspect.h"

namespace trainopt::aten {
namespace {

// Elements that a thread should at least have to do: less is not worth waking it.
constexpr int64_t kGrainElements = 48 * 1024;

void count_and_tell(Entry& entry) {
  for (VersionCounter* const* counter = entry.written; *counter != nullptr; ++counter) move_on(*counter);
  if (entry.steps == nullptr) return;
  if (entry.steps_are_double) {
    *static_cast<double*>(entry.steps) = entry.step;
  } else {
    *static_cast<float*>(entry.steps) = static_cast<float>(entry.step);
  }
}

}  // namespace

void HeldNumbers::read() {
  for (int n = 0; n < count; ++n)
    values.at[n] = values.are_float32 ? *static_cast<float*>(data[n]) : *static_cast<double*>(data[n]);
}

void HeldNumbers::write(const Numbers& moved) const {
  for (int n = 0; n < count; ++n) {
    if (values.are_float32) {
      *static_cast<float*>(data[n]) = static_cast<float>(moved.at[n]);
    } else {
      *static_cast<double*>(data[n]) = moved.at[n];
    }
  }
}

double Entry::next_count() const {
  return steps_are_double ? *static_cast<double*>(steps) + 1 : *static_cast<float*>(steps) + 1.0f;
}

bool Entry::recount() {
  const double last = step;
  step = next_count();
  return step == last + 1;
}

int64_t threads_for(int64_t elements) {
  if (elements < 2 * kGrainElements || at::in_parallel_region()) return 1;
  return std::min<int64_t>(elements / kGrainElements, at::get_num_threads());
}

void Batch::clear() {
  entries.clear();
  cuda.clear();
  cuda_entries_ = 0;
  has_host_numbers_ = false;
  layouts_.clear();
  shard_layouts_.clear();
  factored_.clear();
  outer_written_.clear();
  shards_.clear();
  is_cautious_ = is_measured_ = false;
  elements = 0;
  memory_.clear();
  for (int is_float64 = 0; is_float64 < 2; ++is_float64) {
    tasks[is_float64].clear();
    starts_[is_float64].assign(1, 0);
  }
}

Path Batch::add(const Operands& operands, const GroupValues* group, uint32_t tensor, bool first, bool writes_gradient) {
  const bool is_float64 = operands.param->dtype() == caffe2::TypeMeta::Make<double>();
  cpu::TensorTask& task = tasks[is_float64].emplace_back();
  Entry& entry = entries.emplace_back();
  const Path path = look(operands, *group, writes_gradient, &task, &entry);
  note_operands(operands, tensor, writes_gradient);
  if (path != Path::kFused) {
    tasks[is_float64].pop_back();
    entries.pop_back();
    return path;
  }
  for (const c10::TensorImpl* outer : operands.outers)
    if (VersionCounter* counter = counter_of(outer)) outer_written_.push_back(counter);
  if (writes_gradient && operands.outer_gradient != nullptr)
    if (VersionCounter* counter = counter_of(operands.outer_gradient)) outer_written_.push_back(counter);
  has_host_numbers_ = has_host_numbers_ || entry.numbers.on_host;
  entry.group = group;
  entry.task = -1;
  entry.on_cuda = {};
  entry.first = first;
  entry.tensor = tensor;
  entry.shard = -1;
  entry.is_float64 = is_float64;
  task.tensor = first_tensor_ + tensor;
  task.is_measured = group->stats != 0;
  is_measured_ = is_measured_ || task.is_measured;
  if (is_plain_cuda(operands.param)) {
    const c10::Device device = operands.param->device();
    cuda.visit(device);
    entry.on_cuda = cuda.add(task, group, device, is_float64, first,
                             {entry.device_steps, entry.steps_are_double, entry.step, entry.steps != nullptr},
                             entry.numbers, operands.shard);
    ++cuda_entries_;
    tasks[is_float64].pop_back();
    return path;
  }
  const bool moves_on = rule_.number_count > 0 || (rule_.factors != 0 && operands.shard != nullptr);
  if (task.numel == 0 && !moves_on) {
    tasks[is_float64].pop_back();
  } else {
    entry.task = static_cast<int64_t>(tasks[is_float64].size()) - 1;
    elements += task.numel;
    starts_[is_float64].push_back(starts_[is_float64].back() + cpu::blocks_of(task.numel));
  }
  is_cautious_ = is_cautious_ || group->cautious != 0;
  if (operands.shard != nullptr) {
    entry.shard = static_cast<int64_t>(shards_.size());
    shards_.push_back({operands.shard, entry.task, is_float64});
  }
  return path;
}

Path Batch::announce(const Operands& operands, const GroupValues& group, uint32_t tensor, bool writes_gradient) {
  TensorTask task;
  Entry entry;
  const Path path = look(operands, group, writes_gradient, &task, &entry);
  if (path == Path::kFused && is_plain_cuda(operands.param)) cuda.visit(operands.param->device());
  note_operands(operands, tensor, writes_gradient);
  return path;
}

void Batch::note_operands(const Operands& operands, uint32_t tensor, bool writes_gradient) {
  memory_.note_written(operands.param, tensor);
  for (int s = 0; s < rule_.slots().count(); ++s) memory_.note_written(operands.states[s], tensor);
  memory_.note_written(operands.steps, tensor);
  for (const c10::TensorImpl* number : operands.numbers) memory_.note_written(number, tensor);
  writes_gradient ? memory_.note_written(operands.gradient, tensor) : memory_.note_read(operands.gradient, tensor);
}

// The step ------------------------------------------------------------------------------------------------------------

cpu::Scalars Batch::scalars_of(const ScalarsKey& key, Numbers* numbers) const {
  *numbers = key.numbers;
  return key.group->scalars(rule_, key.step, key.first, key.is_float64, scaling_, numbers);
}

// A graph repeats what the host has said once, and the host reads nothing of it.
void Batch::check_counts() const {
  TORCH_CHECK(!rule_.sums_over_all || !cuda.is_captured(), "a step of ", rule_.name,
              " cannot be captured into a CUDA graph: the host reads its sums over all parameters in each step");
  TORCH_CHECK(!cuda.counts_on_host() || !cuda.is_captured(),
              "a step that is captured into a CUDA graph must count on the device, and a step count lies on the host:"
              " give the optimizer capturable=True");
}

void Batch::prepare(const GradientScaling& scaling, const DeviceScaling& on_device) {
  check_counts();
  scaling_ = scaling;
  on_device_ = on_device;
  scalars_keys_.clear();
  scalars_.clear();
  scalars_.reserve(entries.size());  // tasks point into it
  equal_groups_.clear();
  Numbers moved{};
  for (Entry& entry : entries) {
    if (entry.task < 0 && !entry.numbers.on_host) continue;
    const ScalarsKey key{entry.group,      entry.step,          entry.steps != nullptr, entry.first || entry.step == 1,
                         entry.is_float64, entry.numbers.values};
    const ScalarsKey* last = scalars_keys_.empty() ? nullptr : &scalars_keys_.back();
    const bool joins = last != nullptr && last->step == key.step && last->counts == key.counts &&
                       last->first == key.first && last->is_float64 == key.is_float64 && last->numbers == key.numbers &&
                       (last->group == key.group || *last->group == *key.group);
    if (!joins) {
      scalars_keys_.push_back(key);
      scalars_.push_back(scalars_of(key, &moved));
    } else if (last->group != key.group && (equal_groups_.empty() || equal_groups_.back().second != key.group)) {
      equal_groups_.emplace_back(last->group, key.group);
    }
    entry.moved = moved;
    if (entry.task < 0) continue;
    cpu::TensorTask& task = tasks[entry.is_float64][entry.task];
    task.scalars = &scalars_.back();
    if (rule_.number_count > 0) task.numbers = &entry.moved;
  }
}

// The entries and the tasks need not be touched if the runs stay what they were. Those of the host's numbers do not:
// `all_next` is false then.
void Batch::prepare_again(const GradientScaling& scaling, bool all_next, const DeviceScaling& on_device) {
  if (cuda_entries_ != 0 && !(all_next && cuda.advance(on_device.changes_scalars())))
    for (const Entry& entry : entries)
      if (entry.on_cuda.part >= 0) cuda.recount(entry.on_cuda, entry.step, entry.numbers);
  for (const auto& [group, other] : equal_groups_) all_next = all_next && *group == *other;
  for (const ScalarsKey& key : scalars_keys_) all_next = all_next && !key.first && !(key.counts && key.step == 0);
  if (!all_next) {
    for (Entry& entry : entries) entry.first = false;
    return prepare(scaling, on_device);
  }
  check_counts();
  scaling_ = scaling;
  on_device_ = on_device;
  for (size_t i = 0; i < scalars_keys_.size(); ++i) {
    scalars_keys_[i].step += scalars_keys_[i].counts ? 1 : 0;
    Numbers none;
    scalars_[i] = scalars_of(scalars_keys_[i], &none);
  }
}

int64_t Batch::parts() const {
  const int64_t on_cpu = static_cast<int64_t>(entries.size()) - static_cast<int64_t>(cuda_entries_);
  return threads_for(elements + kTensorElements * on_cpu);
}

cpu::Update Batch::update_of(bool is_float64) const {
  return {tasks[is_float64].data(), starts_[is_float64].data(), tasks[is_float64].size(), &rule_, is_float64};
}

namespace {

// Calls use(part) for each of so many, on torch's threads.
template <class Use>
void in_parts(int64_t parts, Use use) {
  if (parts == 1) return use(0);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) use(part);
  });
}

int64_t cut(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

}  // namespace

// The sums of every tensor on the CPU in one pass of the reduce phase, for the passes after it and the update.
void Batch::gather(Pass pass, cpu::Update (&updates)[2], const AddShards& add_shards) {
  const size_t count = static_cast<size_t>(rule_.sums_in(pass));
  for (const bool is_float64 : {false, true}) {
    sums_[pass][is_float64].resize(count * tasks[is_float64].size());
    partials_[is_float64].resize(count * cpu::places_of(updates[is_float64]));
  }
  const int64_t parts = this->parts();
  in_parts(parts, [&](int64_t part) {
    for (const cpu::Update& update : updates) {
      if (update.count == 0) continue;
      const int64_t blocks = update.starts[update.count];
      cpu::gather_blocks(update, pass, cut(blocks, part, parts), cut(blocks, part + 1, parts),
                         partials_[update.is_float64].data());
    }
  });
  for (const bool is_float64 : {false, true}) {
    Sum* const sums = sums_[pass][is_float64].data();
    for (size_t t = 0; t < tasks[is_float64].size(); ++t)
      cpu::sums_of(updates[is_float64], pass, t, partials_[is_float64].data(), sums + t * count);
    updates[is_float64].sums[pass] = sums;
  }
  if (!shards_.empty()) share_sums(pass, count, add_shards);
  if (pass == kOwnSums && rule_.sums_over_all) add_over_all();
}

// Moves on the averages over rows and columns, in one pass over the gradients that are matrices, and makes of them what
// the passes after it see.
void Batch::move_factors(const cpu::Update (&updates)[2], const AddShards& add_shards) {
  struct Matrix {
    const cpu::TensorTask* task;
    bool is_float64;
    cpu::FactorSettings settings;
    cpu::FactoredTensor* factors;
  };
  std::vector<Matrix> matrices;
  std::vector<int64_t> starts{0};  // of each one's parts
  const int state = first_of(rule_.factors);
  for (const cpu::Update& update : updates)
    for (size_t t = 0; t < update.count; ++t) {
      const cpu::TensorTask& task = update.tasks[t];
      if (task.state[state].data == nullptr) continue;
      const cpu::FactorSettings settings = rule_.factor_settings(*task.scalars, update.is_float64, task.param.dtype);
      cpu::FactoredTensor& factors = cpu::factors_of(task, state);
      factors.reserve(update.is_float64);
      matrices.push_back({&task, update.is_float64, settings, &factors});
      starts.push_back(starts.back() + factors.cut.parts());
    }
  const int64_t parts = this->parts();
  in_parts(parts, [&](int64_t part) {
    const int64_t first = cut(starts.back(), part, parts), last = cut(starts.back(), part + 1, parts);
    size_t m = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), first) - starts.begin()) - 1;
    for (int64_t i = first; i < last; ++i) {
      while (i >= starts[m + 1]) ++m;
      const auto& [task, is_float64, settings, factors] = matrices[m];
      cpu::add_squares(*task, is_float64, settings, *factors, i - starts[m]);
    }
  });
  if (!shards_.empty()) share_factors(updates, add_shards);
  // Parts that are whole matrices have moved theirs on.
  const auto is_done = [](const Matrix& matrix) { return matrix.factors->cut.is_whole || matrix.factors->is_shard; };
  matrices.erase(std::remove_if(matrices.begin(), matrices.end(), is_done), matrices.end());
  if (matrices.empty()) return;
  const auto count = static_cast<int64_t>(matrices.size());
  in_parts(parts, [&](int64_t part) {
    for (int64_t m = cut(count, part, parts); m < cut(count, part + 1, parts); ++m) {
      const auto& [task, is_float64, settings, factors] = matrices[static_cast<size_t>(m)];
      cpu::move_factors(is_float64, settings, *factors);
    }
  });
}

// Moves on the averages of DTensors, which every process has of the whole, whether it holds elements of it or not.
void Batch::share_factors(const cpu::Update (&updates)[2], const AddShards& add_shards) {
  std::vector<const cpu::TensorTask*> tasks;
  std::vector<const Shard*> shards;
  std::vector<int64_t> rows;
  int64_t count = 0;
  const int state = first_of(rule_.factors);
  for (const auto& [shard, task, is_float64] : shards_) {
    const cpu::TensorTask& matrix = updates[is_float64].tasks[task];
    if (matrix.state[state].dtype != DType::kFactored || matrix.state[state].data == nullptr) continue;
    tasks.push_back(&matrix);
    shards.push_back(shard);
    rows.push_back(cpu::factors_of(matrix, state).block.whole.numbers());
    count += rows.back();
  }
  if (tasks.empty()) return;
  const at::Tensor totals = at::zeros({count}, at::kDouble);
  double* of_task = static_cast<double*>(totals.mutable_data_ptr());
  for (size_t i = 0; i < tasks.size(); of_task += rows[i++])
    cpu::total_squares(cpu::factors_of(*tasks[i], state), of_task);
  add_shards(totals, shards, rows);
  of_task = static_cast<double*>(totals.mutable_data_ptr());
  for (size_t i = 0; i < tasks.size(); of_task += rows[i++]) {
    const cpu::TensorTask& task = *tasks[i];
    const bool is_float64 = task.param.dtype == DType::kFloat64;
    const cpu::FactorSettings settings = rule_.factor_settings(*task.scalars, is_float64, task.param.dtype);
    cpu::move_factors_by(of_task, is_float64, settings, cpu::factors_of(task, state));
  }
}

// Makes the sums of DTensors' shards those of the whole tensors.
void Batch::share_sums(Pass pass, size_t count, const AddShards& add_shards) {
  static_assert(sizeof(Sum) == 2 * sizeof(double));
  const auto rows = static_cast<int64_t>(shards_.size());
  const at::Tensor shared = at::zeros({rows, static_cast<int64_t>(count), 2}, at::kDouble);
  Sum* const values = static_cast<Sum*>(shared.mutable_data_ptr());
  std::vector<const Shard*> shards;
  const auto for_each_row = [&](auto use) {
    for (size_t i = 0; i < shards_.size(); ++i) {
      const auto& [shard, task, is_float64] = shards_[i];
      if (task >= 0) use(&values[i * count], &sums_[pass][is_float64][static_cast<size_t>(task) * count]);
    }
  };
  for (const ShardedTask& item : shards_) shards.push_back(item.shard);
  for_each_row([&](Sum* row, Sum* own) { std::copy(own, own + count, row); });
  add_shards(shared, shards, {});
  for_each_row([&](Sum* row, Sum* own) { std::copy(row, row + count, own); });
  shared_.assign(values, values + shards_.size() * count);
}

// Makes each tensor's sums those over all tensors. A DTensor counts on every process, whoever holds elements of it.
void Batch::add_over_all() {
  const auto count = static_cast<size_t>(rule_.sum_count);
  over_all_.resize(count);
  for (size_t s = 0; s < count; ++s) {
    Sum lanes[kSumLanes] = {};
    for (size_t i = 0; i < entries.size(); ++i) {
      const Entry& entry = entries[i];
      Sum& lane = lanes[i % kSumLanes];
      if (entry.shard >= 0) {
        lane = trainopt::add(lane, shared_[static_cast<size_t>(entry.shard) * count + s]);
      } else if (entry.task >= 0) {
        lane = trainopt::add(lane, sums_[kOwnSums][entry.is_float64][static_cast<size_t>(entry.task) * count + s]);
      }
    }
    over_all_[s] = combine_lanes(lanes, kSumLanes);
  }
  for (std::vector<Sum>& sums : sums_[kOwnSums])
    for (size_t i = 0; i < sums.size(); ++i) sums[i] = over_all_[i % count];
}

std::optional<std::vector<double>> Batch::sums_over_all() const {
  if (!rule_.sums_over_all || entries.empty()) return std::nullopt;
  std::vector<double> values;
  for (const Sum& sum : cuda_entries_ != 0 ? cuda.sums_over_all() : over_all_) values.push_back(value_of(sum));
  return values;
}

// Once the sums are there, which may have moved them. Their memory is that of the step's other tensors, and kept.
void Batch::write_numbers(const cpu::Update (&updates)[2]) const {
  for (const Entry& entry : entries) {
    if (!entry.numbers.on_host) continue;
    const bool is_summed = rule_.sum_count > 0;
    const Numbers moved =
        is_summed ? cpu::numbers_of(updates[entry.is_float64], static_cast<size_t>(entry.task)) : entry.moved;
    entry.numbers.write(moved);
  }
}

void Batch::work(bool counts, bool updates, const AddShards& add_shards) {
  cpu::Update each[2] = {update_of(false), update_of(true)};
  if (updates && rule_.factors != 0) move_factors(each, add_shards);
  if (updates && rule_.sum_count > 0) gather(kOwnSums, each, add_shards);
  if (updates && is_cautious_) gather(kAgreement, each, add_shards);
  if (updates && cuda_entries_ != 0) cuda.run(scaling_, std::exchange(on_device_, {}), add_shards);
  if (updates && is_measured_)
    for (const bool is_float64 : {false, true}) chunk_stats_[is_float64].resize(cpu::places_of(each[is_float64]));
  const int64_t tensors = static_cast<int64_t>(entries.size());
  // Equal shares: a thread has the same tensors in every step, and so does its cache.
  const int64_t parts = this->parts();
  in_parts(parts, [&](int64_t part) {
    if (counts)
      for (int64_t i = cut(tensors, part, parts); i < cut(tensors, part + 1, parts); ++i) count_and_tell(entries[i]);
    if (counts && part == 0)
      for (VersionCounter* counter : outer_written_) move_on(counter);
    for (const cpu::Update& update : each) {
      if (!updates || update.count == 0) continue;
      const int64_t blocks = update.starts[update.count];
      cpu::run_blocks(update, cut(blocks, part, parts), cut(blocks, part + 1, parts),
                      is_measured_ ? chunk_stats_[update.is_float64].data() : nullptr);
    }
  });
  if (updates && rule_.number_count > 0) write_numbers(each);
  if (!updates || !is_measured_) return;
  for (const Entry& entry : entries) {
    if (entry.group->stats == 0 || entry.on_cuda.part >= 0) continue;
    StepStats found{};
    if (entry.task >= 0)
      found =
          cpu::stats_of(each[entry.is_float64], static_cast<size_t>(entry.task), chunk_stats_[entry.is_float64].data());
    stats_.push_back({entry.tensor, found, scaling_.scale});
  }
}

}  // namespace trainopt::aten
