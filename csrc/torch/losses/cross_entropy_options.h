// How cross-entropy's options stand in the operators' schemas: one by one, after all other arguments. Everything below
// the registration hands them on in one struct, and only this file takes them apart.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>
#include <utility>

#include "losses/cross_entropy_options.h"
#include "torch/losses/arguments.h"

namespace trainopt::aten {

// The end of a schema. A new option comes last, with a default, so that programs that were exported before still load.
#define TRAINOPT_CROSS_ENTROPY_OPTIONS                                                                        \
  "int reduction, int ignore_index, float label_smoothing, float z_loss, float softcap, bool empty_is_zero, " \
  "float temperature=1."

// ValueError for an option out of its range, with its name and value.
void check_options(const CrossEntropyOptions& options);

// An operator whose C++ function is Result(const CrossEntropyOptions&, Rest...).
template <class Function>
class CrossEntropyOperator;

template <class Result, class... Rest>
class CrossEntropyOperator<Result(const CrossEntropyOptions&, Rest...)> {
 public:
  // A function of the options in one piece, as the dispatcher calls it.
  template <Result (*kFunction)(const CrossEntropyOptions&, Rest...)>
  static Result unpack(Rest... rest, int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss,
                       double softcap, bool empty_is_zero, double temperature) {
    const CrossEntropyOptions options{reduction_of(reduction), ignore_index, label_smoothing, z_loss, softcap,
                                      empty_is_zero,           temperature};
    check_options(options);
    return kFunction(options, std::forward<Rest>(rest)...);
  }

  // The operator of that name, called with the options in one piece.
  explicit CrossEntropyOperator(const char* name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>()) {}

  Result operator()(const CrossEntropyOptions& of, Rest... rest) const {
    return handle_.call(std::forward<Rest>(rest)..., static_cast<int64_t>(of.reduction), of.ignore_index, of.smoothing,
                        of.z_loss, of.softcap, of.empty_is_zero, of.temperature);
  }

 private:
  using Schema = Result(Rest..., int64_t, int64_t, double, double, double, bool, double);
  c10::TypedOperatorHandle<Schema> handle_;
};

// For m.impl: a function of CrossEntropyOptions under the operator's schema.
#define TRAINOPT_UNPACK_OPTIONS(function) \
  (&::trainopt::aten::CrossEntropyOperator<decltype(function)>::template unpack<function>)

// The operators that others call.
using CrossEntropyForward = CrossEntropyOperator<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const CrossEntropyOptions&, const at::Tensor& input, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, bool inplace_backward)>;
const CrossEntropyForward& cross_entropy_operator();

}  // namespace trainopt::aten
