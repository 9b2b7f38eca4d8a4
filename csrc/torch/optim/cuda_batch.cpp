#include "torch/optim/cuda_batch.h"

#if defined(TRAINOPT_WITH_CUDA)

#include <ATen/ATen.h>

#include <algorithm>

#include "torch/inspect.h"

namespace trainopt::aten {
namespace {

static_assert(sizeof(Sum) == 2 * sizeof(double));

// One number, on `device`. `kept` holds it where it had to be copied there.
const void* number_on(const at::Tensor& tensor, c10::Device device, std::vector<at::Tensor>* kept) {
  if (tensor.device() == device) return tensor.const_data_ptr();
  return kept->emplace_back(tensor.to(device, /*non_blocking=*/true)).const_data_ptr();
}

// The parameters of one device and one arithmetic whose scalars are prepared in one place.
struct Part {
  std::vector<cuda::TensorTask> tasks;
  std::vector<const Shard*> shards;        // of the tasks
  std::vector<cuda::Prepared> prepared;    // by the host
  std::vector<cuda::Count> counts;         // for the device to prepare from
  std::vector<cuda::GroupSource> sources;  // likewise
  std::vector<const GroupValues*> groups;  // of the sources, or of what is prepared
};

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
  device_tasks_.clear();
  devices_.clear();
}

void CudaBatch::visit(c10::Device device) {
  if (std::find(devices_.begin(), devices_.end(), device) != devices_.end()) return;
  current_stream(device);
  devices_.push_back(device);
}

void CudaBatch::add(const TensorTask& task, const GroupValues* group, c10::Device device, bool is_float64, bool first,
                    const StepCount& count, const Shard* shard) {
  device_tasks_.push_back({task, group, device, is_float64, first, count, shard});
}

bool CudaBatch::sums_over_shards() const {
  return rule_.sum_count > 0 && std::any_of(device_tasks_.begin(), device_tasks_.end(),
                                            [](const DeviceTask& item) { return item.shard != nullptr; });
}

bool CudaBatch::counts_on_host() const {
  return std::any_of(device_tasks_.begin(), device_tasks_.end(),
                     [](const DeviceTask& item) { return item.count.on_host; });
}

bool CudaBatch::is_captured() const {
  return std::any_of(devices_.begin(), devices_.end(), [](c10::Device device) { return is_capturing(device); });
}

void CudaBatch::run(double gradient_scale, const DeviceScaling& scaling, const AddShards& add_shards) {
  for (const c10::Device device : devices_)
    for (const bool is_float64 : {false, true}) run_on(device, is_float64, gradient_scale, scaling, add_shards);
}

void CudaBatch::run_on(c10::Device device, bool is_float64, double gradient_scale, const DeviceScaling& scaling,
                       const AddShards& add_shards) {
  Part by_host, by_device;
  std::vector<at::Tensor> kept;
  double last_step = 0;
  bool last_first = false;
  for (const DeviceTask& item : device_tasks_) {
    if (item.device != device || item.is_float64 != is_float64) continue;
    // Without elements, its steps may still be counted there, or other processes ask for its sums.
    const bool takes_part = item.count.on_device != nullptr || (rule_.sum_count > 0 && item.shard != nullptr);
    if (item.task.numel == 0 && !takes_part) continue;
    const GroupValues& group = *item.group;
    const bool first = item.first || (item.count.on_host && item.count.step == 1);
    const bool on_host =
        item.count.on_device == nullptr && group.on_device[0].tensor == nullptr && !scaling.gradient_scale.defined();
    Part& part = on_host ? by_host : by_device;
    const bool new_group = part.groups.empty() || part.groups.back() != &group;
    if (on_host) {
      if (new_group || last_step != item.count.step || last_first != first) {
        part.groups.push_back(&group);
        part.prepared.push_back({group.scalars(rule_, item.count.step, first, is_float64, gradient_scale),
                                 random_key(group.seed, item.count.step).step});
        last_step = item.count.step;
        last_first = first;
      }
    } else {
      if (new_group) {
        part.groups.push_back(&group);
        part.sources.push_back(source_of(group, device, &kept));
      }
      part.counts.push_back({item.count.on_device, item.count.step, static_cast<uint32_t>(part.sources.size() - 1),
                             item.count.is_double, first});
    }
    cuda::TensorTask& task = part.tasks.emplace_back();
    static_cast<TensorTask&>(task) = item.task;
    part.shards.push_back(item.shard);
    task.prepared = static_cast<uint32_t>((on_host ? part.prepared.size() : part.counts.size()) - 1);
  }
  if (by_host.tasks.empty() && by_device.tasks.empty()) return;

  const OnDevice on(device);
  const auto float_on_device = [&](const at::Tensor& number) {
    return number.defined() ? static_cast<const float*>(number_on(number, device, &kept)) : nullptr;
  };
  const float* found_inf = float_on_device(scaling.found_inf);
  const auto memory_on_device = [&](size_t bytes) {
    const at::Tensor& memory =
        kept.emplace_back(at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(device).dtype(at::kByte)));
    return memory.mutable_data_ptr();
  };
  // The reduce phase: each task has scalars of its own from then on, on the device.
  const auto finish = [&](Part& part, cuda::Update* work) {
    const auto tasks = static_cast<int64_t>(part.tasks.size());
    const at::Tensor sums = at::empty({tasks, rule_.sum_count, 2}, at::TensorOptions(device).dtype(at::kDouble));
    auto* const own = static_cast<Sum*>(sums.mutable_data_ptr());
    cuda::gather(*work, static_cast<Sum*>(memory_on_device(cuda::partial_sums(*work, rule_.sum_count) * sizeof(Sum))),
                 own, on.stream);
    const auto is_shard = [](const Shard* shard) { return shard != nullptr; };
    if (std::any_of(part.shards.begin(), part.shards.end(), is_shard)) add_shards(sums, part.shards);
    auto* const finished = static_cast<cuda::Prepared*>(memory_on_device(part.tasks.size() * sizeof(cuda::Prepared)));
    cuda::finish(*work, own, finished, on.stream);
    for (size_t t = 0; t < part.tasks.size(); ++t) part.tasks[t].prepared = static_cast<uint32_t>(t);
    work->prepared = finished;
    work->prepared_on_device = true;
  };
  const auto update = [&](Part& part, const cuda::Prepared* prepared, bool on_device) {
    cuda::Update work{rule_.index, is_float64, part.tasks.data(), part.tasks.size(), prepared, on_device, found_inf};
    if (rule_.sum_count > 0) finish(part, &work);
    cuda::update(work, on.stream);
  };
  if (!by_host.tasks.empty()) update(by_host, by_host.prepared.data(), false);
  if (by_device.tasks.empty()) return;

  const float* scale = float_on_device(scaling.gradient_scale);
  if (scale == nullptr && gradient_scale != 1)
    scale = kept.emplace_back(at::full({}, gradient_scale, at::TensorOptions(device).dtype(at::kFloat)))
                .const_data_ptr<float>();
  auto* const prepared =
      static_cast<cuda::Prepared*>(memory_on_device(by_device.counts.size() * sizeof(cuda::Prepared)));
  cuda::prepare({rule_.index, is_float64, by_device.sources.data(), by_device.sources.size(), by_device.counts.data(),
                 by_device.counts.size(), scale, found_inf, prepared},
                on.stream);
  update(by_device, prepared, true);
}

}  // namespace trainopt::aten

#endif
