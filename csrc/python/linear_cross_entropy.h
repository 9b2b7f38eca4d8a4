// What linear cross-entropy's operators have in common on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace trainopt::python {

// ValueError for operands that do not fit together.
void check_operands(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// The shape that the logits would have.
c10::DimVector logit_sizes(const at::Tensor& input, const at::Tensor& weight);

using Six = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace trainopt::python
