#include "torch/optim/cuda_batch.h"

#if defined(TRAINOPT_WITH_CUDA)

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "torch/inspect.h"

namespace trainopt::aten {
namespace {

static_assert(sizeof(Sum) == 2 * sizeof(double));

// One number, on `device`. `kept` holds it where it had to be copied there.
const void* number_on(const at::Tensor& tensor, c10::Device device, std::vector<at::Tensor>* kept) {
  if (tensor.device() == device) return tensor.const_data_ptr();
  return kept->emplace_back(tensor.to(device, /*non_blocking=*/true)).const_data_ptr();
}

const float* float_on(const at::Tensor& number, c10::Device device, std::vector<at::Tensor>* kept) {
  return number.defined() ? static_cast<const float*>(number_on(number, device, kept)) : nullptr;
}

// Memory that lives as long as `kept`, or until the kernels launched by then have ended.
void* memory_on(c10::Device device, size_t bytes, std::vector<at::Tensor>* kept) {
  const auto options = at::TensorOptions(device).dtype(at::kByte);
  return kept->emplace_back(at::empty({static_cast<int64_t>(bytes)}, options)).mutable_data_ptr();
}

cuda::GroupSource source_of(const GroupValues& group, c10::Device device, std::vector<at::Tensor>* kept) {
  cuda::GroupSource source{};
  source.settings = group;
  std::copy(std::begin(group.options), std::end(group.options), source.options);
  for (int i = 0; i < cuda::kMaxDeviceNumbers && group.on_device[i].tensor != nullptr; ++i) {
    const at::Tensor number = tensor_from(group.on_device[i].tensor);
    source.replaced[i] = {number_on(number, device, kept), static_cast<int32_t>(group.on_device[i].option),
                          number.scalar_type() == at::kDouble};
  }
  return source;
}

}  // namespace

void CudaBatch::clear() {
  parts_.clear();
  devices_.clear();
  counts_on_host_ = sums_over_shards_ = false;
}

void CudaBatch::visit(c10::Device device) {
  if (std::find(devices_.begin(), devices_.end(), device) != devices_.end()) return;
  current_stream(device);
  devices_.push_back(device);
}

CudaPlace CudaBatch::add(const TensorTask& task, const GroupValues* group, c10::Device device, bool is_float64,
                         bool first, const StepCount& count, const HeldNumbers& numbers, const Shard* shard) {
  const bool is_summed_by_all = (rule_.sum_count > 0 || group->cautious != 0) && shard != nullptr;
  counts_on_host_ = counts_on_host_ || count.on_host || numbers.on_host;
  sums_over_shards_ = sums_over_shards_ || is_summed_by_all;
  // Without elements, its steps may still be counted there, or its numbers moved, or other processes ask for its sums.
  if (task.numel == 0 && count.on_device == nullptr && !numbers.on_device && !is_summed_by_all) return {};
  const auto is_its = [&](const Part& part) { return part.device == device && part.is_float64 == is_float64; };
  auto part = std::find_if(parts_.begin(), parts_.end(), is_its);
  if (part == parts_.end()) part = parts_.insert(part, Part(device, is_float64));
  cuda::TensorTask& added = part->tasks.emplace_back();
  static_cast<TensorTask&>(added) = task;
  added.rounds_at_random = group->round_at_random != 0;
  added.is_measured = group->stats != 0;
  if (added.is_measured) part->measured.push_back(task.tensor);
  added.numbers_are_float32 = numbers.values.are_float32;
  for (int n = 0; n < numbers.count; ++n) added.numbers[n].data = numbers.data[n];
  part->sources.push_back({group, first, count, numbers, shard});
  return {static_cast<int>(part - parts_.begin()), static_cast<int64_t>(part->tasks.size()) - 1};
}

void CudaBatch::Part::forget() {
  by = By::kUnknown;
  tables.reset();
}

void CudaBatch::set_gradient(CudaPlace place, void* data) {
  Part& part = parts_[place.part];
  void*& last = part.tasks[place.index].gradient.data;
  // Which kernel takes a tensor goes by this.
  if (reinterpret_cast<uintptr_t>(last) % cuda::kAlignment != reinterpret_cast<uintptr_t>(data) % cuda::kAlignment)
    gradients_stay_aligned_ = false;
  last = data;
  if (part.tables != nullptr) part.tables->set_gradient(static_cast<size_t>(place.index), data);
}

bool CudaBatch::advance(bool is_scaled) {
  const auto is_first = [](const Run& run) { return run.first; };
  for (const Part& part : parts_) {
    if (part.was_scaled != is_scaled) return false;
    if (part.by == Part::By::kHost && std::none_of(part.runs.begin(), part.runs.end(), is_first)) continue;
    if (part.by == Part::By::kDevice && !part.has_first) continue;
    return false;
  }
  for (Part& part : parts_) {
    for (Run& run : part.runs) run.step += run.counts ? 1 : 0;
    for (cuda::Count& count : part.counts) count.step += count.counts ? 1 : 0;
  }
  return true;
}

void CudaBatch::recount(CudaPlace place, double step, const HeldNumbers& numbers) {
  Part& part = parts_[place.part];
  part.forget();
  part.sources[place.index].count.step = step;
  part.sources[place.index].numbers = numbers;
  part.sources[place.index].first = false;
}

bool CudaBatch::is_captured() const {
  return std::any_of(devices_.begin(), devices_.end(), [](c10::Device device) { return is_capturing(device); });
}

void CudaBatch::run(const GradientScaling& scaling, const DeviceScaling& on_device, const AddShards& add_shards) {
  if (!gradients_stay_aligned_.exchange(true))
    for (Part& part : parts_) part.tables.reset();
  for (Part& part : parts_) run_part(part, {scaling, on_device, add_shards, &over_all_, &told_});
}

std::vector<Sum> CudaBatch::sums_over_all() const {
  std::vector<Sum> sums(static_cast<size_t>(rule_.sum_count));
  if (parts_.empty()) return sums;  // of no elements
  const at::Tensor read = over_all_.cpu();
  std::copy_n(static_cast<const Sum*>(read.const_data_ptr()), sums.size(), sums.begin());
  return sums;
}

// The scalars are prepared by the host where it knows all that they are made of, else on the device.
void CudaBatch::run_part(Part& part, const Step& step) const {
  using By = Part::By;
  const bool is_scaled = step.on_device.changes_scalars();
  const auto is_by_host = [&](const Source& source) {
    return source.count.on_device == nullptr && !source.numbers.on_device &&
           source.group->on_device[0].tensor == nullptr && !is_scaled;
  };
  if (part.by == By::kUnknown || part.was_scaled != is_scaled) {
    part.forget();
    part.was_scaled = is_scaled;
    const auto by_host = std::count_if(part.sources.begin(), part.sources.end(), is_by_host);
    // The device can prepare what the host knows, too, where all have to be in one step.
    part.by = by_host == static_cast<std::ptrdiff_t>(part.sources.size()) ? By::kHost
              : by_host == 0 || rule_.sums_over_all                       ? By::kDevice
                                                                          : By::kBoth;
    if (part.by == By::kHost) part.find_runs();
    if (part.by == By::kDevice) part.find_counts();
  }
  if (part.by == By::kHost) return run_by_host(part, step);
  if (part.by == By::kDevice) return run_by_device(part, step);
  Part host(part.device, part.is_float64), device(part.device, part.is_float64);
  for (size_t i = 0; i < part.tasks.size(); ++i) {
    Part& to = is_by_host(part.sources[i]) ? host : device;
    to.tasks.push_back(part.tasks[i]);
    to.sources.push_back(part.sources[i]);
    if (part.tasks[i].is_measured) to.measured.push_back(part.tasks[i].tensor);
  }
  host.find_runs();
  run_by_host(host, step);
  device.find_counts();
  run_by_device(device, step);
}

void CudaBatch::Part::find_runs() {
  runs.clear();
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Source& source = sources[i];
    const bool first = source.is_first();
    const Numbers& numbers = source.numbers.values;
    if (runs.empty() || runs.back().group != source.group || runs.back().step != source.count.step ||
        runs.back().counts != source.count.on_host || runs.back().first != first || !(runs.back().numbers == numbers))
      runs.push_back({source.group, source.count.step, source.count.on_host, first, numbers});
    tasks[i].prepared = static_cast<uint32_t>(runs.size() - 1);
  }
}

void CudaBatch::Part::find_counts() {
  counts.clear();
  groups.clear();
  has_first = false;
  counts.reserve(tasks.size());
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Source& source = sources[i];
    if (groups.empty() || groups.back() != source.group) groups.push_back(source.group);
    tasks[i].prepared = static_cast<uint32_t>(i);
    const HeldNumbers& numbers = source.numbers;
    cuda::Count& count = counts.emplace_back(cuda::Count{source.count.on_device,
                                                         source.count.step,
                                                         static_cast<uint32_t>(groups.size() - 1),
                                                         source.count.is_double,
                                                         source.is_first(),
                                                         source.count.on_host,
                                                         numbers.values.are_float32,
                                                         numbers.on_host,
                                                         {}});
    for (int n = 0; n < numbers.count; ++n) {
      if (numbers.on_host) {
        count.numbers[n].value = numbers.values.at[n];
      } else {
        count.numbers[n].data = numbers.data[n];
      }
    }
    has_first = has_first || source.is_first();
  }
}

void CudaBatch::run_by_host(Part& part, const Step& step) const {
  std::vector<cuda::Prepared> prepared;
  prepared.reserve(part.runs.size());
  for (const Run& run : part.runs) {
    Numbers numbers = run.numbers;
    prepared.push_back({run.group->scalars(rule_, run.step, run.first, part.is_float64, step.scaling, &numbers),
                        random_key(run.group->seed, run.step).step});
  }
  std::vector<at::Tensor> kept;
  const OnDevice on(part.device);
  update(part, prepared.data(), false, float_on(step.on_device.found_inf, part.device, &kept), step, on.stream);
}

// Memory for the scalars of so many parameters. It is kept for the next step, whose kernels on the same stream come
// after this one's; a graph has memory of its own, which is there when it is replayed.
cuda::Prepared* CudaBatch::scalars_on(Part& part, size_t count, cuda::Stream stream,
                                      std::vector<at::Tensor>* kept) const {
  const size_t bytes = count * sizeof(cuda::Prepared);
  if (is_capturing(part.device)) return static_cast<cuda::Prepared*>(memory_on(part.device, bytes, kept));
  if (!part.memory.defined() || part.stream != stream || part.memory.nbytes() < bytes) {
    std::vector<at::Tensor> made;
    memory_on(part.device, bytes, &made);
    part.memory = std::move(made.back());
    part.stream = stream;
  }
  return static_cast<cuda::Prepared*>(part.memory.mutable_data_ptr());
}

void CudaBatch::run_by_device(Part& part, const Step& step) const {
  std::vector<at::Tensor> kept;
  const OnDevice on(part.device);
  std::vector<cuda::GroupSource> groups;
  for (const GroupValues* group : part.groups) groups.push_back(source_of(*group, part.device, &kept));
  const float* scale = float_on(step.on_device.gradient_scale, part.device, &kept);
  const at::Tensor& device_norm = step.on_device.norm;
  const auto* norm =
      device_norm.defined() ? static_cast<const double*>(number_on(device_norm, part.device, &kept)) : nullptr;
  const float* found_inf = float_on(step.on_device.found_inf, part.device, &kept);
  cuda::Prepared* const prepared = scalars_on(part, part.counts.size(), on.stream, &kept);
  cuda::prepare({rule_.index, part.is_float64, groups.data(), groups.size(), part.counts.data(), part.counts.size(),
                 step.scaling.scale, step.scaling.norm, scale, norm, found_inf, prepared},
                on.stream);
  update(part, prepared, true, found_inf, step, on.stream);
}

void CudaBatch::update(Part& part, const cuda::Prepared* prepared, bool on_device, const float* found_inf,
                       const Step& step, cuda::Stream stream) const {
  const size_t count = part.tasks.size();
  cuda::Update work{rule_.index, part.is_float64, part.tasks.data(), count, prepared, on_device, found_inf};
  const bool is_cautious = std::any_of(part.sources.begin(), part.sources.end(),
                                       [](const Source& source) { return source.group->cautious != 0; });
  if (rule_.sum_count == 0 && !is_cautious) return launch_update(part, work, true, step, stream);

  // The reduce phase: each task has scalars of its own from then on, on the device.
  part.forget();
  std::vector<at::Tensor> kept;
  std::vector<const Shard*> shards;
  for (const Source& source : part.sources) shards.push_back(source.shard);
  const bool has_shards =
      std::any_of(shards.begin(), shards.end(), [](const Shard* shard) { return shard != nullptr; });
  std::vector<cuda::TensorTask> factored;  // whose states lie in this step's memory
  if (rule_.factors != 0) {
    factored = part.tasks;
    void* const memory = memory_on(part.device, cuda::factor_bytes(work), &kept);
    const std::vector<int64_t> rows = cuda::shared_numbers(work);
    const int64_t shared = std::accumulate(rows.begin(), rows.end(), int64_t{0});
    const at::Tensor totals = at::zeros({shared}, at::TensorOptions(part.device).dtype(at::kDouble));
    auto* const of_shards = static_cast<double*>(kept.emplace_back(totals).mutable_data_ptr());
    cuda::add_squares(work, memory, of_shards, stream);
    if (shared > 0) step.add_shards(totals, shards, rows);
    cuda::move_factors(work, memory, of_shards, factored.data(), stream);
    work.tasks = factored.data();
  }
  std::vector<cuda::TensorTask>& tasks = rule_.factors != 0 ? factored : part.tasks;
  for (const Pass pass : {kOwnSums, kAgreement}) {
    if (pass == kOwnSums ? rule_.sum_count == 0 : !is_cautious) continue;
    const int sum_count = rule_.sums_in(pass);
    const at::Tensor sums =
        at::empty({static_cast<int64_t>(count), sum_count, 2}, at::TensorOptions(part.device).dtype(at::kDouble));
    auto* const own = static_cast<Sum*>(kept.emplace_back(sums).mutable_data_ptr());
    const size_t partial_bytes = cuda::partial_sums(work, sum_count) * sizeof(Sum);
    cuda::gather(work, pass, static_cast<Sum*>(memory_on(part.device, partial_bytes, &kept)), own, stream);
    if (has_shards) step.add_shards(sums, shards, {});
    const bool of_all = pass == kOwnSums && rule_.sums_over_all;
    if (of_all) {
      *step.over_all = at::empty({sum_count, 2}, sums.options());
      cuda::add_over_all(work, sum_count, own, static_cast<Sum*>(step.over_all->mutable_data_ptr()), stream);
    }
    auto* const finished = static_cast<cuda::Prepared*>(memory_on(part.device, count * sizeof(cuda::Prepared), &kept));
    const auto* const found = of_all ? static_cast<const Sum*>(step.over_all->const_data_ptr()) : own;
    cuda::finish(work, pass, found, of_all, finished, stream);
    for (size_t t = 0; t < count; ++t) tasks[t].prepared = static_cast<uint32_t>(t);
    work.prepared = finished;
    work.prepared_on_device = true;
  }
  launch_update(part, work, false, step, stream);
}

// The update itself, and what it finds out.
void CudaBatch::launch_update(Part& part, const cuda::Update& work, bool keeps_tables, const Step& step,
                              cuda::Stream stream) const {
  std::vector<at::Tensor> kept;
  StepStats* chunk_stats = nullptr;
  if (!part.measured.empty())
    chunk_stats =
        static_cast<StepStats*>(memory_on(part.device, cuda::measured_chunks(work) * sizeof(StepStats), &kept));
  if (keeps_tables) {
    if (part.tables == nullptr) part.tables = cuda::tables_of(work);
    part.tables->launch(work.prepared, work.found_inf, chunk_stats, stream);
  } else {
    cuda::update(work, chunk_stats, stream);
  }
  if (part.measured.empty()) return;
  const at::Tensor rows = at::empty({static_cast<int64_t>(part.measured.size()), cuda::kToldStats},
                                    at::TensorOptions(part.device).dtype(at::kDouble));
  cuda::tell(work, chunk_stats, float_on(step.on_device.gradient_scale, part.device, &kept), step.scaling.scale,
             static_cast<double*>(rows.mutable_data_ptr()), stream);
  step.told->push_back({rows, part.measured});
}

}  // namespace trainopt::aten

#endif
