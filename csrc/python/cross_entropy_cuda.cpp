#include "python/cross_entropy_cuda.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "python/findings.h"

namespace trainopt::python {

#if defined(TRAINOPT_WITH_CUDA)

namespace {

constexpr int64_t kWord = sizeof(double);
static_assert(sizeof(cuda::LossPartial) % kWord == 0 && sizeof(cuda::CountPartial) % kWord == 0 &&
              sizeof(cuda::TargetTotals) % kWord == 0);

at::Tensor words(int64_t count, size_t bytes, const at::TensorOptions& options) {
  return at::empty({count * static_cast<int64_t>(bytes) / kWord}, options.dtype(at::kDouble));
}

template <class T>
T* data_of(const at::Tensor& words) {
  return static_cast<T*>(words.mutable_data_ptr());
}

// A tensor's elements from `at` on; absent for a tensor without elements.
TensorView view_from(const at::Tensor& tensor, int64_t at) {
  if (tensor.numel() == 0) return {};
  TensorView view = view_of(tensor);
  view.data = static_cast<char*>(view.data) + at * size_of(view.dtype);
  return view;
}

}  // namespace

DeviceCrossEntropy::DeviceCrossEntropy(const CrossEntropyTarget& target, c10::Device device,
                                       c10::ScalarType logits_dtype, int64_t chunk, cuda::Stream stream)
    : target_(target),
      on_device_(at::TensorOptions(device)),
      wide_(logits_dtype == at::kDouble),
      chunk_(std::max<int64_t>(chunk, 1)),
      stream_(stream) {
  check_findings_on(device);
}

c10::ScalarType DeviceCrossEntropy::weight_dtype(c10::ScalarType logits_dtype) {
  return logits_dtype == at::kDouble ? at::kDouble : at::kFloat;
}

cuda::CrossEntropyTask DeviceCrossEntropy::task(const CrossEntropyBatch& batch, int64_t first, int64_t rows) const {
  cuda::CrossEntropyTask task{};
  static_cast<CrossEntropyBatch&>(task) = batch;
  task.rows = rows;
  task.wide = wide_;
  task.weight = target_.weight_data();
  task.z_loss = target_.options().z_loss;
  if (lse.defined()) task.lse = lse_in(lse, target_.rows()).from(first);
  return task;
}

void DeviceCrossEntropy::start(c10::ScalarType loss_dtype) {
  const CrossEntropyOptions& options = target_.options();
  const at::TensorOptions as_loss = on_device_.dtype(loss_dtype);
  const bool by_row = options.reduction == kNone;
  lse = empty_lse(target_.rows(), on_device_);
  loss_ = by_row ? at::empty(target_.row_sizes(), as_loss) : at::empty({}, as_loss);
  z_ = options.z_loss == 0 ? at::empty({0}, as_loss) : at::empty_like(loss_);
  const auto blocks = [](int64_t rows) { return std::min(rows, cuda::kMostForwardBlocks); };
  const int64_t rows = target_.rows();
  partials_ = words(rows / chunk_ * blocks(chunk_) + blocks(rows % chunk_), sizeof(cuda::LossPartial), on_device_);
}

void DeviceCrossEntropy::forward(const CrossEntropyBatch& batch, int64_t first, int64_t rows) {
  cuda::ForwardWork work{};
  work.task = task(batch, first, rows);
  work.partials = data_of<cuda::LossPartial>(partials_) + partial_count_;
  work.first_row = first;
  if (target_.options().reduction == kNone) {
    work.loss = view_from(loss_, first);
    work.z = view_from(z_, first);
  }
  partial_count_ += cuda::forward_blocks(work.task);
  cuda::cross_entropy_forward(work, stream_);
}

std::pair<at::Tensor, at::Tensor> DeviceCrossEntropy::finish() {
  const CrossEntropyOptions& options = target_.options();
  cuda::FinishWork work{};
  work.partials = data_of<cuda::LossPartial>(partials_);
  work.count = partial_count_;
  work.reduction = options.reduction == kNone   ? cuda::LossReduction::kNone
                   : options.reduction == kMean ? cuda::LossReduction::kMean
                                                : cuda::LossReduction::kSum;
  work.empty_is_zero = options.empty_is_zero;
  if (options.reduction != kNone) {
    work.loss = view_from(loss_, 0);
    work.z = view_from(z_, 0);
  }
  work.labels = target_.label_data();
  work.classes = target_.classes();
  const c10::DimVector& sizes = target_.row_sizes();
  if (sizes.size() <= static_cast<size_t>(kMaxDims)) {
    work.ndim = static_cast<int>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), work.sizes);
  } else {
    work.ndim = 1;
    work.sizes[0] = target_.rows();
  }
  Findings* findings = work.labels != nullptr ? findings_of(on_device_.device()) : nullptr;
  work.bad = findings != nullptr ? &findings->bad_target : nullptr;
  cuda::cross_entropy_finish(work, stream_);
  return {loss_, z_};
}

void DeviceCrossEntropy::count(bool defer) {
  const CrossEntropyOptions& options = target_.options();
  const bool labelled = target_.label_data() != nullptr, mean = options.reduction == kMean;
  const bool must_weigh = labelled && options.label_smoothing != 0 && target_.weight_data() != nullptr;
  if (!defer && !must_weigh && !(mean && labelled)) return;
  CrossEntropyBatch batch{};
  batch.classes = target_.classes();
  batch.labels = target_.label_data();
  batch.ignore_index = options.ignore_index;
  const at::Tensor partials = words(cuda::count_blocks(target_.rows()), sizeof(cuda::CountPartial), on_device_);
  totals_ = words(1, sizeof(cuda::TargetTotals), on_device_);
  cuda::count_targets({task(batch, 0, target_.rows()), mean, defer, data_of<cuda::CountPartial>(partials),
                       data_of<cuda::TargetTotals>(totals_)},
                      stream_);
}

at::Tensor DeviceCrossEntropy::rest() const {
  return totals_.select(0, static_cast<int64_t>(offsetof(cuda::TargetTotals, rest)) / kWord);
}

void DeviceCrossEntropy::backward(const CrossEntropyBatch& batch, int64_t first, int64_t rows,
                                  const at::Tensor& upstream, const Rows& gradient) {
  const bool by_row = target_.options().reduction == kNone, mean = target_.options().reduction == kMean;
  cuda::BackwardWork work{};
  work.task = task(batch, first, rows);
  work.gradient = gradient;
  at::Tensor above;  // held until the launch
  if (upstream.defined()) {
    above = by_row ? upstream.reshape({-1}) : upstream;
    const TensorView view = view_of(above);
    work.upstream = view.data;
    work.upstream_dtype = view.dtype;
    work.upstream_stride = by_row ? above.stride(0) : 0;
  }
  const double share = mean ? 1 / static_cast<double>(target_.rows()) : 1;
  work.totals = {share, share, static_cast<double>(target_.classes()), 1};
  if (totals_.defined()) work.on_device = data_of<cuda::TargetTotals>(totals_);
  cuda::cross_entropy_backward(work, stream_);
}

#endif

}  // namespace trainopt::python
