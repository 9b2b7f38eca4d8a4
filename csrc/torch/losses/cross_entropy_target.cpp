#include "torch/losses/cross_entropy_target.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

namespace trainopt::aten {
namespace {

Rows rows_in(const at::Tensor& tensor, int64_t stride, int64_t class_stride) {
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
  const at::Tensor transposed = input.t().contiguous().t();
  return {transposed, rows_in(transposed, 0, transposed.stride(1)), inner};
}

at::Tensor empty_lse(int64_t rows, const at::TensorOptions& options) {
  if (options.device().is_cpu()) return at::detail::empty_cpu({2, rows}, at::kDouble);  // past the dispatcher
  return at::empty({2, rows}, options.dtype(at::kDouble));
}

LogSumExp lse_in(const at::Tensor& tensor, int64_t rows) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kDouble && tensor.is_contiguous() && tensor.dim() == 2 &&
                        tensor.size(0) == 2 && tensor.size(1) == rows,
                    "lse must be what the forward pass returned: contiguous, float64, of shape [2, ", rows,
                    "], and not ", tensor.scalar_type(), " of shape ", tensor.sizes());
  double* data = const_cast<double*>(tensor.const_data_ptr<double>());
  return {data, data + rows};
}

namespace {

// An error of the kind that torch raises: ValueError for a batch of another size, RuntimeError for any other shape.
void check_shape(const at::Tensor& target, c10::IntArrayRef input, bool is_right, const char* what,
                 c10::IntArrayRef wanted) {
  const bool is_batch = input.size() > 1 && (target.dim() == 0 || target.size(0) != input[0]);
  TORCH_CHECK_VALUE(is_right || !is_batch, "input has shape ", input, ", and a target of ", what, " must have shape ",
                    wanted, ", not ", target.sizes());
  TORCH_CHECK(is_right, "input has shape ", input, ", and a target of ", what, " must have shape ", wanted, ", not ",
              target.sizes());
}

}  // namespace

Logits Logits::of_matrix(const at::Tensor& matrix) { return by_row(matrix, 1); }

CrossEntropyTarget::CrossEntropyTarget(c10::IntArrayRef input_sizes, int64_t class_dim, const at::Tensor& target,
                                       const std::optional<at::Tensor>& class_weight, c10::ScalarType weight_dtype,
                                       const CrossEntropyOptions& options)
    : options_(options),
      row_sizes_(input_sizes.begin(), input_sizes.end()),
      classes_(input_sizes[class_dim]),
      class_dim_(class_dim) {
  row_sizes_.erase(row_sizes_.begin() + class_dim);
  rows_ = c10::multiply_integers(row_sizes_);
  if (class_weight.has_value() && class_weight->defined()) {
    TORCH_CHECK(class_weight->dim() == 1 && class_weight->numel() == classes_, "weight has shape ",
                class_weight->sizes(), ", but there are ", classes_, " classes: expected shape [", classes_, "]");
    weight_ = class_weight->to(weight_dtype).contiguous();
  }
  if (target.is_floating_point()) {
    check_shape(target, input_sizes, target.sizes().equals(input_sizes), "probabilities", input_sizes);
    const bool classes_last = class_dim + 1 == target.dim();
    probabilities_ = classes_last ? target.reshape({rows_, classes_}) : target;
    if (classes_last) class_dim_ = 1;
    return;
  }
  check_shape(target, input_sizes, target.sizes().equals(row_sizes_), "classes", row_sizes_);
  labels_ = target.scalar_type() == at::kLong && target.is_contiguous() ? target : target.to(at::kLong).contiguous();
}

CrossEntropyBatch CrossEntropyTarget::batch(const Logits& logits) const {
  CrossEntropyBatch batch = without_rows();
  batch.inner = logits.inner;
  batch.logits = logits.rows;
  if (labels_.defined()) {
    batch.labels = labels_.const_data_ptr<int64_t>();
  } else {
    const Logits matching = Logits::of(probabilities_, class_dim_, logits.inner);
    alike_ = matching.tensor;
    batch.probabilities = matching.rows;
  }
  return batch;
}

CrossEntropyBatch CrossEntropyTarget::chunk(const at::Tensor& logits, int64_t first) const {
  CrossEntropyBatch batch = without_rows();
  batch.inner = 1;
  batch.logits = by_row(logits, 1).rows;
  if (labels_.defined()) {
    batch.labels = labels_.const_data_ptr<int64_t>() + first;
  } else {
    const Logits matching = by_row(probabilities_.narrow(0, first, logits.size(0)), 1);
    alike_ = matching.tensor;
    batch.probabilities = matching.rows;
  }
  return batch;
}

CrossEntropyBatch CrossEntropyTarget::without_rows() const {
  CrossEntropyBatch batch{};
  batch.classes = classes_;
  static_cast<CrossEntropyOptions&>(batch) = options_;
  return batch;
}

std::string position(c10::IntArrayRef indices) {
  std::string text;
  for (const int64_t index : indices) text += (text.empty() ? "" : ", ") + std::to_string(index);
  return "(" + text + ")";
}

}  // namespace trainopt::aten
