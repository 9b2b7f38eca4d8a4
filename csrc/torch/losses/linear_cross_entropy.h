// What linear cross-entropy's operators have in common on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace trainopt::aten {

// RuntimeError or ValueError for what no engine may see (loss_arguments.h), ValueError for operands that do not fit
// together; and for what backward is given beside them.
void check_operands(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
                    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& class_weight,
                    int64_t reduction);
void check_backward(const at::Tensor& upstream, const at::Tensor& input, const at::Tensor& lse, int64_t reduction);

// The shape that the logits would have.
c10::DimVector logit_sizes(const at::Tensor& input, const at::Tensor& weight);

using Six = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace trainopt::aten
