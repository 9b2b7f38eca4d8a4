// What the operators of the pointwise losses share on every device: tensors in, the task of an engine out.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <deque>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "cpu/losses.h"
#include "losses/pointwise_task.h"
#include "losses/reduction.h"

namespace trainopt::aten {

using OptionalTensor = std::optional<at::Tensor>;

// ValueError if there is none of that name.
const cpu::PointwiseLoss& find_pointwise_loss(std::string_view name);

// Of input and of target, in the shape of the loss; undefined where it is not wanted.
using PointwiseGradients = std::array<at::Tensor, 2>;

// The tensors of a task in the shape that they broadcast to, and in one order of elements: for more dimensions than an
// engine has, as contiguous copies.
class PointwiseOperands {
 public:
  // RuntimeError or ValueError for what no engine may see (loss_arguments.h).
  PointwiseOperands(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                    const OptionalTensor& positive, int64_t reduction, double parameter);

  PointwiseTask task{};
  const c10::ScalarType dtype;  // of the loss
  const Reduction reduction;
  // Whether the arithmetic is float64: float32 does not have every beta and delta.
  bool is_float64() const;

  // Fresh memory for what is to be written.
  at::Tensor add_value();
  PointwiseGradients add_gradients(std::array<bool, 2> wanted);

  // False if the gradient from above is one number for all elements, which the caller must read.
  bool add_upstream(const at::Tensor& upstream);

  // Once all have been added: fills in the task's views.
  void arrange();

  // What was written, as it goes out: the losses; the gradients in the shapes of input and target, an empty tensor for
  // one that is not wanted.
  at::Tensor finished(const at::Tensor& value) const { return in_order_of(input_, value); }
  std::tuple<at::Tensor, at::Tensor> summed(const PointwiseGradients&) const;

 private:
  const at::Tensor input_, target_;
  at::DimVector shape_;
  bool copies_;
  std::deque<at::Tensor> tensors_;
  std::vector<TensorView*> views_;
  std::deque<Layout> layouts_;

  at::Tensor memory_for(const at::Tensor& operand, c10::ScalarType type) const;
  at::Tensor in_order_of(const at::Tensor& operand, const at::Tensor& result) const;
  void add(const at::Tensor& tensor, TensorView* view);
};

}  // namespace trainopt::aten
