#include "torch/losses/cross_entropy_cuda.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "torch/losses/findings.h"

namespace trainopt::aten {

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
      is_float64_(logits_dtype == at::kDouble),
      chunk_(std::max<int64_t>(chunk, 1)),
      stream_(stream) {
  check_findings_on(device);
}

c10::ScalarType DeviceCrossEntropy::weight_dtype(c10::ScalarType logits_dtype) {
  return logits_dtype == at::kDouble ? at::kDouble : at::kFloat;
}

cuda::RowsWork DeviceCrossEntropy::rows_work(const CrossEntropyBatch& batch, int64_t first, int64_t rows) const {
  cuda::RowsWork work{};
  static_cast<CrossEntropyBatch&>(work.task) = batch;
  work.task.rows = rows;
  work.task.is_float64 = is_float64_;
  work.task.weight = target_.weight_data();
  if (lse.defined()) {
    const LogSumExp kept = lse_in(lse, target_.rows()).from(first);
    work.task.peak = kept.peak;
    work.task.sum = kept.log_sum;
  }
  const double share = target_.options().reduction == Reduction::kMean ? 1 / static_cast<double>(target_.rows()) : 1;
  work.totals = {share, share, static_cast<double>(target_.classes()), 1};
  if (totals_.defined()) work.on_device = data_of<cuda::TargetTotals>(totals_);
  return work;
}

void DeviceCrossEntropy::start(c10::ScalarType loss_dtype) {
  const CrossEntropyOptions& options = target_.options();
  const at::TensorOptions as_loss = on_device_.dtype(loss_dtype);
  const bool by_row = options.reduction == Reduction::kNone;
  lse = empty_lse(target_.rows(), on_device_);
  loss_ = by_row ? at::empty(target_.row_sizes(), as_loss) : at::empty({}, as_loss);
  z_ = options.z_loss == 0 ? at::empty({0}, as_loss) : at::empty_like(loss_);
  const auto blocks = [](int64_t rows) { return std::min(rows, cuda::kMostBlocks); };
  const int64_t rows = target_.rows();
  partials_ = words(rows / chunk_ * blocks(chunk_) + blocks(rows % chunk_), sizeof(cuda::LossPartial), on_device_);
}

void DeviceCrossEntropy::forward(const CrossEntropyBatch& batch, int64_t first, int64_t rows, const Rows* gradient) {
  cuda::RowsWork work = rows_work(batch, first, rows);
  work.forward = true;
  work.partials = data_of<cuda::LossPartial>(partials_) + partial_count_;
  work.first_row = first;
  if (target_.options().reduction == Reduction::kNone) {
    work.loss = view_from(loss_, first);
    work.z = view_from(z_, first);
  }
  if (gradient != nullptr) work.gradient = *gradient;
  partial_count_ += cuda::rows_blocks(work.task);
  cuda::cross_entropy_rows(work, stream_);
}

std::pair<at::Tensor, at::Tensor> DeviceCrossEntropy::finish() {
  const CrossEntropyOptions& options = target_.options();
  cuda::FinishWork work{};
  work.partials = data_of<cuda::LossPartial>(partials_);
  work.count = partial_count_;
  work.reduction = options.reduction;
  work.empty_is_zero = options.empty_is_zero;
  if (options.reduction != Reduction::kNone) {
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
  const bool labelled = target_.label_data() != nullptr, mean = options.reduction == Reduction::kMean;
  const bool must_weigh = labelled && options.smoothing != 0 && target_.weight_data() != nullptr;
  if (!defer && !must_weigh && !(mean && labelled)) return;
  CrossEntropyBatch batch{};
  static_cast<CrossEntropyOptions&>(batch) = options;
  batch.classes = target_.classes();
  batch.labels = target_.label_data();
  const at::Tensor partials = words(cuda::count_blocks(target_.rows()), sizeof(cuda::CountPartial), on_device_);
  totals_ = words(1, sizeof(cuda::TargetTotals), on_device_);
  cuda::count_targets({rows_work(batch, 0, target_.rows()).task, mean, defer, data_of<cuda::CountPartial>(partials),
                       data_of<cuda::TargetTotals>(totals_)},
                      stream_);
}

at::Tensor DeviceCrossEntropy::rest() const {
  return totals_.select(0, static_cast<int64_t>(offsetof(cuda::TargetTotals, rest)) / kWord);
}

bool DeviceCrossEntropy::was_scaled(c10::Device device) {
  const Findings* findings = findings_of(device);
  return findings != nullptr && *const_cast<const volatile int64_t*>(&findings->scaled) != 0;
}

void DeviceCrossEntropy::backward(const CrossEntropyBatch& batch, int64_t first, int64_t rows,
                                  const at::Tensor& upstream, const Rows& gradient, bool unless_one) {
  const bool by_row = target_.options().reduction == Reduction::kNone;
  cuda::RowsWork work = rows_work(batch, first, rows);
  work.gradient = gradient;
  work.unless_one = unless_one;
  at::Tensor above;  // held until the launch
  if (upstream.defined()) {
    above = by_row ? upstream.reshape({-1}) : upstream;
    const TensorView view = view_of(above);
    work.upstream = view.data;
    work.upstream_dtype = view.dtype;
    work.upstream_stride = by_row ? above.stride(0) : 0;
    Findings* findings = by_row ? nullptr : findings_of(on_device_.device());
    if (findings != nullptr) work.scaled = &findings->scaled;
  }
  cuda::cross_entropy_rows(work, stream_);
}

#endif

}  // namespace trainopt::aten
