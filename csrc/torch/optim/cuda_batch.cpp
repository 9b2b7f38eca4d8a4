#include "torch/optim/cuda_batch.h"

#if defined(TRAINOPT_WITH_CUDA)

#include <ATen/ATen.h>

#include <algorithm>

#include "torch/inspect.h"

namespace trainopt::aten {
namespace {

// One number, on `device`. `kept` holds it where it had to be copied there.
const void* number_on(const at::Tensor& tensor, c10::Device device, std::vector<at::Tensor>* kept) {
  if (tensor.device() == device) return tensor.const_data_ptr();
  return kept->emplace_back(tensor.to(device, /*non_blocking=*/true)).const_data_ptr();
}

// The parameters of one device and one arithmetic whose scalars are prepared in one place.
struct Part {
  std::vector<cuda::TensorTask> tasks;
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
                    const StepCount& count) {
  device_tasks_.push_back({task, group, device, is_float64, first, count});
}

bool CudaBatch::counts_on_host() const {
  return std::any_of(device_tasks_.begin(), device_tasks_.end(),
                     [](const DeviceTask& item) { return item.count.on_host; });
}

bool CudaBatch::is_captured() const {
  return std::any_of(devices_.begin(), devices_.end(), [](c10::Device device) { return is_capturing(device); });
}

void CudaBatch::run(double gradient_scale, const DeviceScaling& scaling) {
  for (const c10::Device device : devices_)
    for (const bool is_float64 : {false, true}) run_on(device, is_float64, gradient_scale, scaling);
}

void CudaBatch::run_on(c10::Device device, bool is_float64, double gradient_scale, const DeviceScaling& scaling) {
  Part by_host, by_device;
  std::vector<at::Tensor> kept;
  double last_step = 0;
  bool last_first = false;
  for (const DeviceTask& item : device_tasks_) {
    if (item.device != device || item.is_float64 != is_float64) continue;
    if (item.task.numel == 0 && item.count.on_device == nullptr) continue;  // else its steps are counted there
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
    task.prepared = static_cast<uint32_t>((on_host ? part.prepared.size() : part.counts.size()) - 1);
  }
  if (by_host.tasks.empty() && by_device.tasks.empty()) return;

  const OnDevice on(device);
  const auto float_on_device = [&](const at::Tensor& number) {
    return number.defined() ? static_cast<const float*>(number_on(number, device, &kept)) : nullptr;
  };
  const float* found_inf = float_on_device(scaling.found_inf);
  const auto update = [&](const Part& part, const cuda::Prepared* prepared, bool on_device) {
    cuda::update({rule_.index, is_float64, part.tasks.data(), part.tasks.size(), prepared, on_device, found_inf},
                 on.stream);
  };
  if (!by_host.tasks.empty()) update(by_host, by_host.prepared.data(), false);
  if (by_device.tasks.empty()) return;

  const float* scale = float_on_device(scaling.gradient_scale);
  if (scale == nullptr && gradient_scale != 1)
    scale = kept.emplace_back(at::full({}, gradient_scale, at::TensorOptions(device).dtype(at::kFloat)))
                .const_data_ptr<float>();
  const auto bytes = static_cast<int64_t>(by_device.counts.size() * sizeof(cuda::Prepared));
  const at::Tensor memory = at::empty({bytes}, at::TensorOptions(device).dtype(at::kByte));
  auto* prepared = static_cast<cuda::Prepared*>(memory.mutable_data_ptr());
  cuda::prepare({rule_.index, is_float64, by_device.sources.data(), by_device.sources.size(), by_device.counts.data(),
                 by_device.counts.size(), scale, found_inf, prepared},
                on.stream);
  update(by_device, prepared, true);
}

}  // namespace trainopt::aten

#endif
