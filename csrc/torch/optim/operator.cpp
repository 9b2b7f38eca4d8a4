// The optimizer step as an operator of torch's dispatcher: what a compiler can keep in its graph.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "torch/cuda_device.h"
#include "torch/inspect.h"
#include "torch/optim/batch.h"

namespace trainopt::aten {
namespace {

bool is_number(const at::Tensor& tensor) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  return (is_plain_cpu(impl) || is_plain_cuda(impl)) && !tensor.is_complex() && has_memory(impl);
}

constexpr const char* kSchema =
    "optimizer_step_(str rule, Tensor(a!)[] params, Tensor[] gradients, Tensor(b!)[] states, Tensor(c!)[] steps, "
    "Tensor lr, float[] options, float weight_decay=0., bool maximize=False, float l1=0., bool l1_proximal=False) -> "
    "()";

// What the lists must be, whatever the tensors are.
const cpu::Rule& check(std::string_view name, at::TensorList params, at::TensorList gradients, at::TensorList states,
                       at::TensorList steps, const at::Tensor& lr, c10::ArrayRef<double> options) {
  const cpu::Rule* rule = cpu::find_rule(std::string(name).c_str());
  TORCH_CHECK_VALUE(rule != nullptr, "optimizer_step_: there is no rule '", name, "'");
  TORCH_CHECK_VALUE(rule->number_count == 0, "optimizer_step_: ", name,
                    " has states that are numbers, of which the"
                    " operator knows none");
  TORCH_CHECK_VALUE(!rule->sums_over_all, "optimizer_step_: the step of ", name,
                    " depends on the parameters of all groups, of which the operator knows those of one");
  TORCH_CHECK_VALUE(rule->factors == 0, "optimizer_step_: ", name,
                    " has averages over rows and columns, of which the operator knows none");
  TORCH_CHECK_VALUE(options.size() == static_cast<size_t>(rule->option_count), "optimizer_step_: options: ", name,
                    " has ", rule->option_count, ", not ", options.size());
  TORCH_CHECK_VALUE(rule->takes(options.data()), "optimizer_step_: options: ", options, " is beyond the range of ",
                    name);
  const size_t count = params.size(), needed = count * count_of(rule->states_needed(options.data()));
  TORCH_CHECK_VALUE(gradients.size() == count, "optimizer_step_: gradients: ", gradients.size(), " for ", count,
                    " params");
  TORCH_CHECK_VALUE(states.size() == needed, "optimizer_step_: states: ", states.size(),
                    " where these options call for ", needed);
  TORCH_CHECK_VALUE(steps.size() == count || (steps.empty() && !rule->counts_steps),
                    "optimizer_step_: steps: ", steps.size(), " for ", count, " params");
  TORCH_CHECK_VALUE(lr.defined() && lr.numel() == 1, "optimizer_step_: lr has ", lr.defined() ? lr.numel() : 0,
                    " elements, not 1");
  const auto check_shape = [&](const char* what, const at::Tensor& tensor, size_t i) {
    TORCH_CHECK_VALUE(tensor.sizes() == params[i].sizes(), "optimizer_step_: ", what, " of params[", i, "] has shape ",
                      tensor.sizes(), ", not ", params[i].sizes());
  };
  for (size_t i = 0; i < count; ++i) {
    check_shape("the gradient", gradients[i], i);
    for (size_t s = i; s < needed; s += count) check_shape("a state", states[s], i);
    if (!steps.empty())
      TORCH_CHECK_VALUE(steps[i].numel() == 1, "optimizer_step_: the step count of params[", i, "] has ",
                        steps[i].numel(), " elements, not 1");
  }
  return *rule;
}

void optimizer_step_(std::string_view name, at::TensorList params, at::TensorList gradients, at::TensorList states,
                     at::TensorList steps, const at::Tensor& lr, c10::ArrayRef<double> options, double weight_decay,
                     bool maximize, double l1, bool l1_proximal) {
  const cpu::Rule& rule = check(name, params, gradients, states, steps, lr, options);
  TORCH_CHECK_VALUE(is_number(lr), "optimizer_step_: lr must be a real number on the CPU or on the params' device");
  GroupValues group;
  std::copy(options.begin(), options.end(), group.options);
  group.states_needed = rule.states_needed(group.options);
  if (!group.leave_on_device(lr, cuda::DeviceNumber::kLr)) group.lr = lr.item().toDouble();
  const auto is_elsewhere = [](const at::Tensor& param) { return !is_plain_cuda(param.unsafeGetTensorImpl()); };
  if (std::any_of(params.begin(), params.end(), is_elsewhere)) group.read_device_numbers(rule);
  group.lr_is_float32 = lr.scalar_type() == at::kFloat;
  group.weight_decay = weight_decay;
  group.maximize = maximize;
  group.l1 = l1;
  group.l1_proximal = l1_proximal;

  const size_t count = params.size();
  Batch batch(rule);
  const auto add = [&](size_t i) {
    Operands operands;
    operands.param = params[i].unsafeGetTensorImpl();
    operands.gradient = gradients[i].unsafeGetTensorImpl();
    if (!steps.empty()) operands.steps = steps[i].unsafeGetTensorImpl();
    size_t at = i;  // the states that these options call for, one after the other, each of all parameters
    for (int s = 0; s < rule.state_count; ++s) {
      if (!contains(group.states_needed, s)) continue;
      operands.states[s] = states[at].unsafeGetTensorImpl();
      at += count;
    }
    const Path path = batch.add(operands, &group, static_cast<uint32_t>(i), false, false);
    TORCH_CHECK(path != Path::kNoMemory, "optimizer_step_: params[", i, "]: ", describe(path));
    TORCH_CHECK_VALUE(path == Path::kFused, "optimizer_step_: params[", i, "]: ", describe(path));
    batch.note_read(lr.unsafeGetTensorImpl(), static_cast<uint32_t>(i));
  };
  const auto run = [&] {
    batch.prepare({});
    batch.run();
  };
  batch.clear();
  for (size_t i = 0; i < count; ++i) add(i);
  if (batch.sharing().empty()) return run();
  // One after the other, each from what the last one left.
  const auto alone = [&](size_t i) {
    batch.clear();
    add(i);
    TORCH_CHECK_VALUE(batch.sharing().empty(), "optimizer_step_: params[", i, "]: ", describe(Path::kMemory));
  };
  for (size_t i = 0; i < count; ++i) alone(i);
  for (size_t i = 0; i < count; ++i) {
    alone(i);
    run();
  }
}

void optimizer_step_meta_(std::string_view name, at::TensorList params, at::TensorList gradients, at::TensorList states,
                          at::TensorList steps, const at::Tensor& lr, c10::ArrayRef<double> options, double, bool,
                          double, bool) {
  check(name, params, gradients, states, steps, lr, options);
  // The dispatcher comes here if a single tensor is on meta, and nothing would be stepped.
  const auto is_elsewhere = [](const at::Tensor& tensor) { return !tensor.is_meta(); };
  for (const at::TensorList tensors : {params, gradients, states})
    TORCH_CHECK_VALUE(std::none_of(tensors.begin(), tensors.end(), is_elsewhere),
                      "optimizer_step_: some of the tensors are on meta, and some are not");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trainopt, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(trainopt, CPU, m) { m.impl("optimizer_step_", optimizer_step_); }
#if defined(TRAINOPT_WITH_CUDA)
TORCH_LIBRARY_IMPL(trainopt, TRAINOPT_CUDA_KEY, m) { m.impl("optimizer_step_", optimizer_step_); }
#endif
TORCH_LIBRARY_IMPL(trainopt, Meta, m) { m.impl("optimizer_step_", optimizer_step_meta_); }

}  // namespace trainopt::aten
