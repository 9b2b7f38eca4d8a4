#include "device/fallback.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <cfloat>
#include <cmath>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "arena.h"
#include "device/streams.h"
#include "queue.h"

namespace simt {
namespace {

// A value with its tensors, and its devices of our kind, replaced.
template <class Replace>
c10::IValue replaced(const c10::IValue& value, c10::DeviceType device, const Replace& replace) {
  const auto of_optional = [&](const std::optional<at::Tensor>& t) {
    return t.has_value() && t->defined() ? std::optional<at::Tensor>(replace(*t)) : t;
  };
  if (value.isTensor()) return of_optional(value.toTensor());
  if (value.isDevice() && value.toDevice().type() == kDeviceType) return c10::Device(device);
  if (value.isTensorList()) {
    c10::List<at::Tensor> result;
    for (const at::Tensor& t : value.toTensorVector()) result.push_back(t.defined() ? replace(t) : t);
    return result;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> result;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector()) result.push_back(of_optional(t));
    return result;
  }
  return value;
}

// A number of the program's own stays one: it has a say of its own in what types are promoted to.
at::Tensor meta_of(const at::Tensor& t) {
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) return t;
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta).pinned_memory(false));
}

// Memory of the device as the CPU's kernels see it, and a copy of what the host may change.
at::Tensor cpu_of(const at::Tensor& t) {
  if (t.device().type() == kDeviceType) return on_host(t);
  at::Tensor copy = t.clone();
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) copy.unsafeGetTensorImpl()->set_wrapped_number(true);
  return copy;
}

// For each result, the argument that it is, if it is one; nothing if some result is neither that nor a new tensor.
std::optional<std::vector<int>> origins_of(const c10::FunctionSchema& schema) {
  std::vector<int> origins;
  for (const c10::Argument& result : schema.returns()) {
    if (result.type()->kind() != c10::TypeKind::TensorType) return std::nullopt;
    int origin = -1;
    if (const c10::AliasInfo* alias = result.alias_info(); alias != nullptr) {
      for (size_t a = 0; a < schema.arguments().size() && alias->isWrite(); ++a) {
        const c10::AliasInfo* other = schema.arguments()[a].alias_info();
        if (other != nullptr && other->isWrite() && other->beforeSets() == alias->beforeSets())
          origin = static_cast<int>(a);
      }
      if (origin < 0) return std::nullopt;
    }
    origins.push_back(origin);
  }
  return origins;
}

// The CPU's kernels may give an `out` other sizes on the way, which memory of ours cannot take.
bool is_out(const c10::Argument& argument) {
  return argument.is_out() && argument.type()->kind() == c10::TypeKind::TensorType;
}

bool is_written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

// Whether the CPU's kernel can work on them: what it writes is on the device, and nothing is anywhere else.
bool can_be_seen(const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> arguments) {
  bool good = true;
  for (size_t a = 0; a < arguments.size(); ++a) {
    replaced(arguments[a], at::kCPU, [&](const at::Tensor& t) {
      const bool is_ours = t.device().type() == kDeviceType;
      good = good && t.layout() == at::kStrided && !t.is_conj() && !t.is_neg() &&
             (is_ours || (t.is_cpu() && !is_written(schema.arguments()[a])));
      return t;
    });
  }
  return good;
}

// Whether a type holds a number, as far as all types of its kind do.
bool holds(c10::ScalarType type, double number) {
  if (c10::isIntegralType(type, /*includeBool=*/true)) return std::fabs(number) <= 127;
  const double most = type == at::kHalf ? 65504 : type == at::kDouble ? DBL_MAX : 3e38;
  return !std::isfinite(number) || std::fabs(number) <= most;
}

// Whether each tensor's type holds each number that is given beside them. Where not, torch refuses the call on the
// host, and meta kernels do not look at it.
bool can_hold(const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> arguments) {
  for (size_t a = 0; a < arguments.size(); ++a) {
    const c10::IValue& number = arguments[a];
    if (schema.arguments()[a].type()->kind() != c10::TypeKind::NumberType || !number.isScalar()) continue;
    if (number.toScalar().isComplex()) return false;
    for (const c10::IValue& value : arguments)
      if (value.isTensor() && value.toTensor().defined() &&
          !holds(value.toTensor().scalar_type(), number.toScalar().toDouble()))
        return false;
  }
  return true;
}

// Gives an operator to the stream, if what it returns can be told without its results, by its meta kernel: the results
// are put in place of the arguments then. False if it has to be computed at once.
bool defer(const c10::OperatorHandle& op, std::vector<c10::IValue>* stack, const void* stream) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t count = schema.arguments().size();
  const c10::ArrayRef<c10::IValue> arguments(stack->data() + stack->size() - count, count);
  const std::optional<std::vector<int>> origins = origins_of(schema);
  if (!origins.has_value() || !op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU) ||
      !can_be_seen(schema, arguments) || !can_hold(schema, arguments))
    return false;
  bool makes_new = false, writes = false;
  for (const int origin : *origins) makes_new = makes_new || origin < 0;
  for (const c10::Argument& argument : schema.arguments()) writes = writes || is_written(argument);
  if (!makes_new && !writes) return false;

  const Plain plain;
  std::vector<c10::IValue> metas, results;
  for (const c10::IValue& value : arguments) metas.push_back(replaced(value, at::kMeta, meta_of));
  results = metas;
  try {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &results);
    for (size_t a = 0; a < count; ++a) {  // what is written may have been resized
      if (!is_written(schema.arguments()[a]) || !metas[a].isTensor() || !metas[a].toTensor().defined()) continue;
      const at::Tensor& wanted = metas[a].toTensor();
      const at::Tensor& given = arguments[a].toTensor();
      if (given.sizes() != wanted.sizes()) given.resize_(wanted.sizes());
    }
  } catch (const c10::NotImplementedError&) {
    if (makes_new) return false;
    results.clear();
  } catch (const std::exception&) {
    return false;  // computed at once, the error is the CPU's
  }

  std::vector<c10::IValue> seen, given;
  std::vector<std::pair<size_t, at::Tensor>> made;
  for (const c10::IValue& value : arguments) seen.push_back(replaced(value, at::kCPU, cpu_of));
  for (size_t r = 0; r < origins->size(); ++r) {
    if (const int origin = (*origins)[r]; origin >= 0) {
      given.push_back(arguments[static_cast<size_t>(origin)]);
      continue;
    }
    const at::Tensor& meta = results[r].toTensor();
    if (!meta.defined()) {
      given.emplace_back(at::Tensor());
      continue;
    }
    at::Tensor there = at::empty_strided(meta.sizes(), meta.strides(),
                                         at::TensorOptions(device_of_stream(stream)).dtype(meta.scalar_type()));
    made.emplace_back(r, on_host(there));
    given.emplace_back(std::move(there));
  }
  enqueue(stream, [op, seen, made] {
    const Plain within;
    std::vector<c10::IValue> work = seen, outs;
    for (size_t a = 0; a < seen.size(); ++a)
      if (is_out(op.schema().arguments()[a])) work[a] = at::empty({0}, seen[a].toTensor().options());
    outs = work;
    try {
      op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &work);
    } catch (const std::exception& error) {
      throw std::runtime_error(op.schema().operator_name().name + ": " + error.what());
    }
    for (size_t a = 0; a < seen.size(); ++a)
      if (is_out(op.schema().arguments()[a])) seen[a].toTensor().copy_(outs[a].toTensor());
    for (const auto& [place, memory] : made) memory.copy_(work[place].toTensor());
  });
  stack->resize(stack->size() - count);
  stack->insert(stack->end(), given.begin(), given.end());
  return true;
}

// As CUDA has it, these hand values or sizes to the host.
bool hands_to_host(const std::string& name) {
  static const std::set<std::string> all = {"aten::equal",   "aten::is_nonzero", "aten::nonzero", "aten::masked_select",
                                            "aten::_unique", "aten::_unique2",   "aten::bincount"};
  return all.count(name) != 0;
}

// Random numbers are the CPU's generator's, which is asked in the order of the program.
bool draws(const c10::OperatorHandle& op) { return op.hasTag(at::Tag::nondeterministic_seeded); }

// The device of an operator's tensors, or that which it asks for.
c10::Device device_of_call(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  for (size_t i = stack.size() - op.schema().arguments().size(); i < stack.size(); ++i) {
    const c10::IValue& value = stack[i];
    std::vector<at::Tensor> tensors;
    if (value.isTensor()) tensors = {value.toTensor()};
    if (value.isTensorList()) tensors = value.toTensorVector();
    if (value.isOptionalTensorList())
      for (const auto& t : value.toOptionalTensorVector()) tensors.push_back(t.value_or(at::Tensor()));
    for (const at::Tensor& t : tensors)
      if (t.defined() && t.device().type() == kDeviceType) return t.device();
    if (value.isDevice() && value.toDevice().type() == kDeviceType && value.toDevice().has_index())
      return value.toDevice();
  }
  return device_of(current_device());
}

// By the CPU's kernels: when the stream comes to it, or at once, if nobody knows what it returns.
void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().operator_name().name;
  const c10::DeviceGuard on(device_of_call(op, *stack));
  const void* const stream = current_stream_of(on.current_device());
  if (hands_to_host(name)) {
    synchronise(name, stream);
  } else if ((!draws(op) || is_capturing(stream)) && defer(op, stack, stream)) {
    return;
  }
  if (is_capturing(stream)) forbid_while_capturing("the emulated device cannot capture " + name);
  finish_stream(stream);
  const WithinFallback copies_do_not_count;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

}  // namespace

at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.device().type() != kDeviceType) return tensor;
  at::Tensor view = at::from_blob(tensor.numel() == 0 ? nullptr : host_address(tensor.const_data_ptr()), tensor.sizes(),
                                  tensor.strides(), tensor.options().device(at::kCPU));
  if (tensor.is_conj()) view = view.conj();
  return tensor.is_neg() ? view._neg_view() : view;
}

}  // namespace simt
