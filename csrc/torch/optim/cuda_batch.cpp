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
                         bool first, const StepCount& count, const Shard* shard) {
  const bool is_summed_by_all = rule_.sum_count > 0 && shard != nullptr;
  counts_on_host_ = counts_on_host_ || count.on_host;
  sums_over_shards_ = sums_over_shards_ || is_summed_by_all;
  // Without elements, its steps may still be counted there, or other processes ask for its sums.
  if (task.numel == 0 && count.on_device == nullptr && !is_summed_by_all) return {};
  const auto is_its = [&](const Part& part) { return part.device == device && part.is_float64 == is_float64; };
  auto part = std::find_if(parts_.begin(), parts_.end(), is_its);
  if (part == parts_.end()) part = parts_.insert(part, {device, is_float64, {}, {}});
  static_cast<TensorTask&>(part->tasks.emplace_back()) = task;
  part->sources.push_back({group, first, count, shard});
  return {static_cast<int>(part - parts_.begin()), static_cast<int64_t>(part->tasks.size()) - 1};
}

void CudaBatch::recount(CudaPlace place, double step) {
  Source& source = parts_[place.part].sources[place.index];
  source.count.step = step;
  source.first = false;
}

bool CudaBatch::is_captured() const {
  return std::any_of(devices_.begin(), devices_.end(), [](c10::Device device) { return is_capturing(device); });
}

void CudaBatch::run(double gradient_scale, const DeviceScaling& scaling, const AddShards& add_shards) {
  for (Part& part : parts_) run_part(part, {gradient_scale, scaling, add_shards});
}

// The scalars are prepared by the host where it knows all that they are made of, else on the device.
void CudaBatch::run_part(Part& part, const Step& step) const {
  const auto is_by_host = [&](const Source& source) {
    return source.count.on_device == nullptr && source.group->on_device[0].tensor == nullptr &&
           !step.scaling.gradient_scale.defined();
  };
  const auto by_host = std::count_if(part.sources.begin(), part.sources.end(), is_by_host);
  if (by_host == static_cast<std::ptrdiff_t>(part.sources.size())) return run_by_host(part, step);
  if (by_host == 0) return run_by_device(part, step);
  Part host{part.device, part.is_float64, {}, {}}, device = host;
  for (size_t i = 0; i < part.tasks.size(); ++i) {
    Part& to = is_by_host(part.sources[i]) ? host : device;
    to.tasks.push_back(part.tasks[i]);
    to.sources.push_back(part.sources[i]);
  }
  run_by_host(host, step);
  run_by_device(device, step);
}

void CudaBatch::run_by_host(Part& part, const Step& step) const {
  std::vector<cuda::Prepared> prepared;
  const Source* last = nullptr;
  bool last_first = false;
  for (size_t i = 0; i < part.tasks.size(); ++i) {
    const Source& source = part.sources[i];
    const bool first = source.is_first();
    if (last == nullptr || last->group != source.group || last->count.step != source.count.step ||
        last_first != first) {
      prepared.push_back({source.group->scalars(rule_, source.count.step, first, part.is_float64, step.gradient_scale),
                          random_key(source.group->seed, source.count.step).step});
      last = &source;
      last_first = first;
    }
    part.tasks[i].prepared = static_cast<uint32_t>(prepared.size() - 1);
  }
  std::vector<at::Tensor> kept;
  const OnDevice on(part.device);
  update(part, prepared.data(), false, float_on(step.scaling.found_inf, part.device, &kept), step, on.stream);
}

void CudaBatch::run_by_device(Part& part, const Step& step) const {
  std::vector<cuda::Count> counts;
  std::vector<cuda::GroupSource> groups;
  std::vector<at::Tensor> kept;
  counts.reserve(part.tasks.size());
  const OnDevice on(part.device);
  const GroupValues* last = nullptr;
  for (size_t i = 0; i < part.tasks.size(); ++i) {
    const Source& source = part.sources[i];
    if (last != source.group) groups.push_back(source_of(*source.group, part.device, &kept));
    last = source.group;
    part.tasks[i].prepared = static_cast<uint32_t>(counts.size());
    counts.push_back({source.count.on_device, source.count.step, static_cast<uint32_t>(groups.size() - 1),
                      source.count.is_double, source.is_first()});
  }
  const float* scale = float_on(step.scaling.gradient_scale, part.device, &kept);
  if (scale == nullptr && step.gradient_scale != 1)
    scale = kept.emplace_back(at::full({}, step.gradient_scale, at::TensorOptions(part.device).dtype(at::kFloat)))
                .const_data_ptr<float>();
  const float* found_inf = float_on(step.scaling.found_inf, part.device, &kept);
  auto* const prepared =
      static_cast<cuda::Prepared*>(memory_on(part.device, counts.size() * sizeof(cuda::Prepared), &kept));
  cuda::prepare({rule_.index, part.is_float64, groups.data(), groups.size(), counts.data(), counts.size(), scale,
                 found_inf, prepared},
                on.stream);
  update(part, prepared, true, found_inf, step, on.stream);
}

void CudaBatch::update(Part& part, const cuda::Prepared* prepared, bool on_device, const float* found_inf,
                       const Step& step, cuda::Stream stream) const {
  const size_t count = part.tasks.size();
  cuda::Update work{rule_.index, part.is_float64, part.tasks.data(), count, prepared, on_device, found_inf};
  if (rule_.sum_count == 0) return cuda::update(work, stream);

  // The reduce phase: each task has scalars of its own from then on, on the device.
  std::vector<at::Tensor> kept;
  const at::Tensor sums =
      at::empty({static_cast<int64_t>(count), rule_.sum_count, 2}, at::TensorOptions(part.device).dtype(at::kDouble));
  auto* const own = static_cast<Sum*>(sums.mutable_data_ptr());
  const size_t partial_bytes = cuda::partial_sums(work, rule_.sum_count) * sizeof(Sum);
  cuda::gather(work, static_cast<Sum*>(memory_on(part.device, partial_bytes, &kept)), own, stream);
  const auto is_shard = [](const Source& source) { return source.shard != nullptr; };
  if (std::any_of(part.sources.begin(), part.sources.end(), is_shard)) {
    std::vector<const Shard*> shards;
    for (const Source& source : part.sources) shards.push_back(source.shard);
    step.add_shards(sums, shards);
  }
  auto* const finished = static_cast<cuda::Prepared*>(memory_on(part.device, count * sizeof(cuda::Prepared), &kept));
  cuda::finish(work, own, finished, stream);
  for (size_t t = 0; t < count; ++t) part.tasks[t].prepared = static_cast<uint32_t>(t);
  work.prepared = finished;
  work.prepared_on_device = true;
  cuda::update(work, stream);
}

}  // namespace trainopt::aten

#endif
