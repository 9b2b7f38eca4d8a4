// What every loss operator asks of its tensors before an engine reads their memory: torch.ops hands over whatever it is
// given, tensors of several devices, sparse ones, and ones whose storage has been taken away among them.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

#include "losses/reduction.h"

namespace trainopt::aten {

// A tensor of an operator, under its name in the schema; null where an optional one is absent.
struct LossArgument {
  const char* name;
  const at::Tensor* tensor;
  bool may_be_classes = false;

  LossArgument(const char* of, const at::Tensor& given) : name(of), tensor(&given) {}
  LossArgument(const char* of, const std::optional<at::Tensor>& given)
      : name(of), tensor(given.has_value() && given->defined() ? &*given : nullptr) {}

  static LossArgument classes_or_probabilities(const at::Tensor& target) {
    LossArgument result("target", target);
    result.may_be_classes = true;
    return result;
  }
};

// RuntimeError, as torch's operators raise it, unless all are dense tensors of one device, of a floating type that the
// engines read (or of classes), in memory that is there.
void check_arguments(std::initializer_list<LossArgument> arguments);

// A reduction by its number in a schema; ValueError for a number that torch has for none.
Reduction reduction_of(int64_t number);

// ValueError for an upstream gradient that does not have the shape of the loss, which is `shape` if it is not reduced.
void check_upstream(const at::Tensor& upstream, c10::IntArrayRef shape, Reduction reduction);

}  // namespace trainopt::aten
