#include "torch/losses/cross_entropy.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>

namespace trainopt::aten {
namespace {

constexpr int64_t kGrain = 65536;  // logits that a thread should at least have to do

// The indices of element `place` of a row-major array.
c10::DimVector indices(c10::IntArrayRef sizes, int64_t place) {
  c10::DimVector result(sizes.size());
  for (size_t d = sizes.size(); d-- > 0; place /= sizes[d]) result[d] = place % sizes[d];
  return result;
}

}  // namespace

void for_each_row(int64_t rows, int64_t classes, const std::function<void(int64_t, int64_t)>& use) {
  at::parallel_for(0, rows, std::max<int64_t>(kGrain / std::max<int64_t>(classes, 1), 1), use);
}

HostTarget::HostTarget(c10::IntArrayRef input_sizes, int64_t class_dim, const at::Tensor& target,
                       const std::optional<at::Tensor>& class_weight, const CrossEntropyOptions& options)
    : CrossEntropyTarget(input_sizes, class_dim, target, class_weight, at::kDouble, options) {
  total_weight_ = weight_.defined() ? weight_.sum().item<double>() : static_cast<double>(classes_);
  denominator_ = row_count_ = static_cast<double>(rows_);
  if (!labels_.defined()) return;
  const int64_t* labels = labels_.const_data_ptr<int64_t>();
  const double* weight = weight_.defined() ? weight_.const_data_ptr<double>() : nullptr;
  int64_t counted = 0;
  denominator_ = 0;
  for (int64_t row = 0; row < rows_; ++row) {
    const int64_t label = labels[row];
    if (label == options_.ignore_index) continue;
    TORCH_CHECK_INDEX(0 <= label && label < classes_, "target ", label, " at position ",
                      position(indices(row_sizes_, row)), " is out of range for ", classes_, " classes");
    ++counted;
    if (weight != nullptr) denominator_ += weight[label];
  }
  row_count_ = static_cast<double>(counted);
  if (weight == nullptr) denominator_ = row_count_;
}

cpu::CrossEntropyTask HostTarget::complete(const CrossEntropyBatch& batch) const {
  cpu::CrossEntropyTask task{};
  static_cast<CrossEntropyBatch&>(task) = batch;
  task.weight = weight_.defined() ? weight_.const_data_ptr<double>() : nullptr;
  task.total_weight = total_weight_;
  return task;
}

void HostTarget::scales(const at::Tensor& upstream, const LogSumExp& lse, int64_t first, int64_t count,
                        std::vector<double>* loss_scale, std::vector<double>* lse_scale) const {
  loss_scale->resize(count);
  lse_scale->resize(count);
  const bool by_row = options_.reduction == Reduction::kNone;
  const bool nothing = options_.empty_is_zero && row_count_ == 0;
  at::Tensor each;
  double whole = 0, of_lse = 0;
  if (by_row) {
    each = upstream.reshape({-1}).narrow(0, first, count).to(at::kDouble).contiguous();
  } else if (!nothing) {
    const double above = number_in(upstream);
    whole = options_.reduction == Reduction::kMean ? above / denominator_ : above;
    of_lse = options_.reduction == Reduction::kMean ? above / row_count_ : above;
  }
  for (int64_t row = 0; row < count; ++row) {
    const double above = by_row ? each.const_data_ptr<double>()[row] : 0;
    (*loss_scale)[row] = by_row ? above : whole;
    (*lse_scale)[row] = options_.z_loss == 0 || !is_counted(first + row)
                            ? 0
                            : 2 * options_.z_loss * lse.of(first + row) * (by_row ? above : of_lse);
  }
}

std::pair<at::Tensor, at::Tensor> HostTarget::reduce(const std::vector<double>& loss, const LogSumExp& lse,
                                                     c10::IntArrayRef shape, const at::TensorOptions& options) const {
  const bool has_z = options_.z_loss != 0;
  const auto z_of = [&](int64_t row) { return is_counted(row) ? options_.z_loss * lse.of(row) * lse.of(row) : 0; };
  if (options_.reduction == Reduction::kNone) {
    at::Tensor each = at::empty({rows_}, at::kDouble), z = at::empty({has_z ? rows_ : 0}, at::kDouble);
    for (int64_t row = 0; row < rows_; ++row) {
      if (has_z) z.mutable_data_ptr<double>()[row] = z_of(row);
      each.mutable_data_ptr<double>()[row] = loss[row] + (has_z ? z_of(row) : 0);
    }
    return {each.to(options).reshape(shape), has_z ? z.to(options).reshape(shape) : z.to(options)};
  }
  double sum = 0, z_sum = 0;
  for (int64_t row = 0; row < rows_; ++row) sum += loss[row];
  if (has_z)
    for (int64_t row = 0; row < rows_; ++row) z_sum += z_of(row);
  if (options_.reduction == Reduction::kMean && !(options_.empty_is_zero && row_count_ == 0)) {
    sum /= denominator_;
    z_sum /= row_count_;
  }
  const c10::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  return {tensor_of(sum + z_sum, dtype), has_z ? tensor_of(z_sum, dtype) : at::detail::empty_cpu({0}, dtype)};
}

}  // namespace trainopt::aten
