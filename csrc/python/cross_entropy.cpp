#include "python/cross_entropy.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>

namespace trainopt::python {
namespace {

constexpr int64_t kGrain = 65536;  // logits that a thread should at least have to do

// "(1, 2)" for element `index` of a row-major array.
std::string position(c10::IntArrayRef sizes, int64_t index) {
  std::string text;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    text = std::to_string(index % sizes[d]) + (text.empty() ? "" : ", ") + text;
    index /= sizes[d];
  }
  return "(" + text + ")";
}

c10::DimVector without(c10::IntArrayRef sizes, int64_t dim) {
  c10::DimVector result(sizes.begin(), sizes.end());
  result.erase(result.begin() + dim);
  return result;
}

}  // namespace

namespace {

cpu::Rows rows_in(const at::Tensor& tensor, int64_t stride, int64_t class_stride) {
  const TensorView view = view_of(tensor);
  return {view.data, stride, class_stride, view.dtype};
}

// Row by row, with a row's classes side by side; for a tensor that does not lie so, of a copy.
Logits by_row(const at::Tensor& input, int64_t class_dim) {
  if (class_dim == 1 && input.dim() == 2 && input.stride(1) == 1) return {input, rows_in(input, input.stride(0), 1), 1};
  const int64_t classes = input.size(class_dim);
  const at::Tensor last = input.movedim(class_dim, -1);
  at::Tensor rows = last.reshape({classes == 0 ? 0 : last.numel() / classes, classes});
  if (classes > 1 && rows.stride(1) != 1) rows = rows.contiguous();
  return {rows, rows_in(rows, rows.stride(0), 1), 1};
}

// Class by class, with all rows of an element of the batch side by side; for a tensor that does not lie so, of a copy.
Logits by_class(const at::Tensor& input) {
  int64_t inner = 1;
  bool runs = true;
  for (int64_t d = input.dim() - 1; d > 1; inner *= input.size(d), --d)
    runs = runs && (input.stride(d) == inner || input.size(d) == 1);
  const at::Tensor tensor = runs ? input : input.contiguous();
  return {tensor, rows_in(tensor, tensor.stride(0), tensor.stride(1)), inner};
}

}  // namespace

Logits Logits::of(const at::Tensor& input, int64_t class_dim) {
  if (input.dim() > 2 && input.stride(1) != 1 && class_dim == 1) {
    Logits found = by_class(input);
    if (found.inner > 1) return found;
  }
  // A transposed matrix: all its rows side by side.
  if (input.dim() == 2 && class_dim == 1 && input.stride(0) == 1 && input.stride(1) > 1 && input.size(0) > 1)
    return {input, rows_in(input, 0, input.stride(1)), input.size(0)};
  return by_row(input, class_dim);
}

Logits Logits::of(const at::Tensor& input, int64_t class_dim, int64_t inner) {
  Logits found = of(input, class_dim);
  if (found.inner == inner) return found;
  if (inner == 1) return by_row(input, class_dim);
  if (input.dim() > 2) return by_class(input.contiguous());
  const at::Tensor turned = input.t().contiguous().t();
  return {turned, rows_in(turned, 0, turned.stride(1)), inner};
}

void for_each_row(int64_t rows, int64_t classes, const std::function<void(int64_t, int64_t)>& use) {
  at::parallel_for(0, rows, std::max<int64_t>(kGrain / std::max<int64_t>(classes, 1), 1), use);
}

CrossEntropyTarget::CrossEntropyTarget(c10::IntArrayRef input_sizes, int64_t class_dim, const at::Tensor& target,
                                       const std::optional<at::Tensor>& class_weight,
                                       const CrossEntropyOptions& options)
    : options_(options), classes_(input_sizes[class_dim]), class_dim_(class_dim) {
  const c10::DimVector row_sizes = without(input_sizes, class_dim);
  rows_ = c10::multiply_integers(row_sizes);
  if (class_weight.has_value() && class_weight->defined()) {
    TORCH_CHECK_VALUE(class_weight->dim() == 1 && class_weight->numel() == classes_, "weight has shape ",
                      class_weight->sizes(), ", but there are ", classes_, " classes: expected shape [", classes_, "]");
    weight_ = class_weight->to(at::kDouble).contiguous();
  }
  total_weight_ = weight_.defined() ? weight_.sum().item<double>() : static_cast<double>(classes_);
  if (target.is_floating_point()) {
    TORCH_CHECK_VALUE(target.sizes().equals(input_sizes), "input has shape ", input_sizes,
                      ", and a target of probabilities must have the same, not ", target.sizes());
    const bool classes_last = class_dim + 1 == target.dim();
    probabilities_ = classes_last ? target.reshape({rows_, classes_}) : target;
    if (classes_last) class_dim_ = 1;
    denominator_ = row_count_ = static_cast<double>(rows_);
    return;
  }
  TORCH_CHECK_VALUE(target.sizes().equals(row_sizes), "input has shape ", input_sizes,
                    ", and a target of classes must have shape ", c10::IntArrayRef(row_sizes), ", not ",
                    target.sizes());
  labels_ = target.scalar_type() == at::kLong && target.is_contiguous() ? target : target.to(at::kLong).contiguous();
  const int64_t* labels = labels_.const_data_ptr<int64_t>();
  const double* weight = weight_.defined() ? weight_.const_data_ptr<double>() : nullptr;
  int64_t counted = 0;
  denominator_ = 0;
  for (int64_t row = 0; row < rows_; ++row) {
    const int64_t label = labels[row];
    if (label == options_.ignore_index) continue;
    TORCH_CHECK_INDEX(0 <= label && label < classes_, "target ", label, " at position ", position(row_sizes, row),
                      " is out of range for ", classes_, " classes");
    ++counted;
    if (weight != nullptr) denominator_ += weight[label];
  }
  row_count_ = static_cast<double>(counted);
  if (weight == nullptr) denominator_ = row_count_;
}

cpu::CrossEntropyTask CrossEntropyTarget::task(const Logits& logits) {
  cpu::CrossEntropyTask task = bare_task();
  task.inner = logits.inner;
  task.logits = logits.rows;
  if (labels_.defined()) {
    task.labels = labels_.const_data_ptr<int64_t>();
  } else {
    const Logits alike = Logits::of(probabilities_, class_dim_, logits.inner);
    alike_ = alike.tensor;
    task.probabilities = alike.rows;
  }
  return task;
}

cpu::CrossEntropyTask CrossEntropyTarget::chunk_task(const at::Tensor& logits, int64_t first) const {
  cpu::CrossEntropyTask task = bare_task();
  task.inner = 1;
  task.logits = by_row(logits, 1).rows;
  if (labels_.defined()) {
    task.labels = labels_.const_data_ptr<int64_t>() + first;
  } else {
    task.probabilities = by_row(probabilities_.narrow(0, first, logits.size(0)), 1).rows;
  }
  return task;
}

cpu::CrossEntropyTask CrossEntropyTarget::bare_task() const {
  cpu::CrossEntropyTask task{};
  task.classes = classes_;
  task.weight = weight_.defined() ? weight_.const_data_ptr<double>() : nullptr;
  task.total_weight = total_weight_;
  task.ignore_index = options_.ignore_index;
  task.smoothing = options_.label_smoothing;
  task.softcap = options_.softcap;
  return task;
}

void CrossEntropyTarget::scales(const at::Tensor& upstream, const double* lse, int64_t first, int64_t count,
                                std::vector<double>* loss_scale, std::vector<double>* lse_scale) const {
  loss_scale->resize(count);
  lse_scale->resize(count);
  const bool by_row = options_.reduction == kNone;
  const bool nothing = options_.empty_is_zero && row_count_ == 0;
  at::Tensor each;
  double whole = 0, of_lse = 0;
  if (by_row) {
    each = upstream.reshape({-1}).narrow(0, first, count).to(at::kDouble).contiguous();
  } else if (!nothing) {
    const double above = number_in(upstream);
    whole = options_.reduction == kMean ? above / denominator_ : above;
    of_lse = options_.reduction == kMean ? above / row_count_ : above;
  }
  for (int64_t row = 0; row < count; ++row) {
    const double above = by_row ? each.const_data_ptr<double>()[row] : 0;
    (*loss_scale)[row] = by_row ? above : whole;
    (*lse_scale)[row] = options_.z_loss == 0 || !is_counted(first + row)
                            ? 0
                            : 2 * options_.z_loss * lse[first + row] * (by_row ? above : of_lse);
  }
}

std::pair<at::Tensor, at::Tensor> CrossEntropyTarget::reduce(const std::vector<double>& loss, const double* lse,
                                                             c10::IntArrayRef shape,
                                                             const at::TensorOptions& options) const {
  const bool has_z = options_.z_loss != 0;
  const auto z_of = [&](int64_t row) { return is_counted(row) ? options_.z_loss * lse[row] * lse[row] : 0; };
  if (options_.reduction == kNone) {
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
  if (options_.reduction == kMean && !(options_.empty_is_zero && row_count_ == 0)) {
    sum /= denominator_;
    z_sum /= row_count_;
  }
  const c10::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  return {tensor_of(sum + z_sum, dtype), has_z ? tensor_of(z_sum, dtype) : at::detail::empty_cpu({0}, dtype)};
}

}  // namespace trainopt::python
