// What the engines can take of a step: each parameter's tensors as they are now.
#include <ATen/MemoryOverlap.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <vector>

#include "core/code8.h"
#include "torch/inspect.h"
#include "torch/layout.h"
#include "torch/optim/batch.h"

namespace trainopt::aten {
namespace {

bool is_there(const c10::TensorImpl* tensor) {
  return tensor == nullptr || !(is_plain_cpu(tensor) || is_plain_cuda(tensor)) || has_memory(tensor);
}

// torch refuses to write to what was made in inference mode outside of that mode.
bool is_writable(const c10::TensorImpl* tensor) {
  return counter_of(tensor) != nullptr || c10::InferenceMode::is_enabled();
}

// The numbers of a state in 8 bits, with the scales of its blocks beside it. False for anything else.
bool read_codes(const c10::TensorImpl* codes, const c10::TensorImpl* scale, bool is_unsigned, TensorView* out) {
  if (scale == nullptr || codes->dtype() != caffe2::TypeMeta::Make<uint8_t>() ||
      scale->dtype() != caffe2::TypeMeta::Make<float>() || !scale->is_contiguous() ||
      scale->numel() != scales_of(codes->numel()))
    return false;
  check_memory("a tensor", codes);
  check_memory("a tensor", scale);
  const DType dtype = is_unsigned ? DType::kUnsigned8 : DType::kSigned8;
  *out = {data_of(codes, dtype, true), nullptr, dtype, data_of(scale, DType::kFloat32, true)};
  return true;
}

// What a 16-bit parameter lacks of a float32, beside the view of it. False if it is not what the precision calls for.
bool read_master(const c10::TensorImpl* master, Precision precision, TensorView* param) {
  const bool is_half = param->dtype == DType::kFloat16;
  const bool is_exact = precision == Precision::kMaster;
  const caffe2::TypeMeta dtype = is_half    ? caffe2::TypeMeta::Make<float>()
                                 : is_exact ? caffe2::TypeMeta::Make<int16_t>()
                                            : caffe2::TypeMeta::Make<int8_t>();
  if (master->dtype() != dtype || (is_half && !is_exact)) return false;
  check_memory("a tensor", master);
  c10::StorageImpl* storage = storage_of(master);
  const auto itemsize = static_cast<int64_t>(dtype.itemsize());
  param->beside = static_cast<char*>(storage->mutable_data()) + master->storage_offset() * itemsize;
  param->dtype = is_half ? DType::kMasterCopy : is_exact ? DType::kMaster16 : DType::kMaster24;
  return true;
}

}  // namespace

bool is_factor_of(c10::IntArrayRef sizes, const c10::TensorImpl* state, bool of_rows) {
  const auto dims = static_cast<int64_t>(sizes.size()), summed = of_rows ? dims - 1 : dims - 2;
  if (dims < 2 || state->dim() != dims || !state->is_contiguous()) return false;
  for (int64_t d = 0; d < dims; ++d)
    if (state->size(d) != (d == summed ? 1 : sizes[static_cast<size_t>(d)])) return false;
  return true;
}

Path Batch::look(const Operands& operands, const GroupValues& group, bool writes_gradient, TensorTask* task,
                 Entry* entry) {
  const c10::TensorImpl* param = operands.param;
  const c10::TensorImpl* gradient = operands.gradient;
  if (!is_there(param) || !is_there(gradient) || !is_there(operands.steps)) return Path::kNoMemory;
  for (const c10::TensorImpl* state : operands.states)
    if (!is_there(state)) return Path::kNoMemory;
  for (const c10::TensorImpl* number : operands.numbers)
    if (!is_there(number)) return Path::kNoMemory;
  if (group.differentiable != 0) return Path::kDifferentiable;
  if (group.unreadable != 0) return Path::kOptions;
  if (operands.shard != nullptr && operands.shard->is_pending) return Path::kPending;
  if (!operands.placements_match) return Path::kPlacement;
  const bool on_cuda = is_plain_cuda(param);
  if (!on_cuda && !is_plain_cpu(param)) return Path::kDevice;
  const auto is_beside = [&](const c10::TensorImpl* tensor) {
    return on_cuda ? is_plain_cuda(tensor) && tensor->device() == param->device() : is_plain_cpu(tensor);
  };
  if (!read_view(param, true, &task->param)) return Path::kDtype;
  if (!param->is_contiguous() && !param->is_non_overlapping_and_dense()) return Path::kMemory;
  VersionCounter** written = entry->written;
  bool writable = true;
  const auto writes = [&](const c10::TensorImpl* tensor) {
    if (VersionCounter* counter = counter_of(tensor)) {
      *written++ = counter;
    } else {
      writable = writable && is_writable(tensor);
    }
  };
  writes(param);
  for (const c10::TensorImpl* outer : operands.outers) writable = writable && is_writable(outer);
  task->numel = param->numel();
  const c10::IntArrayRef sizes = operands.sizes();
  task->numel_of_whole = c10::multiply_integers(sizes);
  bool in_order = true;

  if (gradient != nullptr) {
    if (!is_beside(gradient) || !read_view(gradient, writes_gradient, &task->gradient) ||
        !are_equal(gradient->sizes(), param->sizes()))
      return Path::kGradient;
    if (writes_gradient) {
      if (!gradient->is_non_overlapping_and_dense() &&
          at::has_internal_overlap(const_cast<c10::TensorImpl*>(gradient)) != at::MemOverlap::No)
        return Path::kMemory;
      writes(gradient);
      if (operands.outer_gradient != nullptr) writable = writable && is_writable(operands.outer_gradient);
    }
    in_order = same_order_in_memory(param, gradient);
  }

  if (!operands.states_are_known) return Path::kStateValue;
  if (!operands.states_are_tensors) return Path::kStateForm;
  const Slots slots = rule_.slots();
  const bool param_is_16_bit = is_16_bit(task->param.dtype);
  const bool is_elsewhere = operands.shard != nullptr && operands.shard->is_elsewhere;
  const auto dims = static_cast<int64_t>(sizes.size());
  const bool is_factored = rule_.factors != 0 && dims > 1 && !is_elsewhere;
  const StateSet of_it = states_of_one(static_cast<StateSet>(~0u), rule_.factors, dims);
  bool in_two_parts = false;
  for (int s = 0; s <= slots.average(); ++s) {
    TensorView& view = task->state[s];
    view = {};
    const c10::TensorImpl* state = operands.states[s];
    if (state == nullptr || (s < slots.states && !contains(of_it, s))) continue;
    if (contains(rule_.factors, s)) {
      const bool has_shape = is_elsewhere || is_factor_of(sizes, state, s == first_of(rule_.factors));
      if (!is_beside(state) || !has_shape || state->requires_grad()) return Path::kStateForm;
      writes(state);
      continue;
    }
    const c10::TensorImpl* scale = s < slots.states ? operands.states[slots.scale(s)] : nullptr;
    const bool has_codes = read_codes(state, scale, contains(rule_.unsigned_states, s), &view);
    if (has_codes && task->param.dtype == DType::kFloat64) return Path::kStateForm;  // float64 arithmetic has no codes
    if (!is_beside(state) || !(has_codes || read_view(state, true, &view)) || state->requires_grad() ||
        !are_equal(state->sizes(), param->sizes()) || (has_codes && !is_beside(scale)))
      return Path::kStateForm;
    const bool same_order = same_order_in_memory(param, state);
    if (!same_order && (has_codes || !state->is_non_overlapping_and_dense())) return Path::kMemory;
    in_order = in_order && same_order;
    in_two_parts = in_two_parts || has_codes;
    writes(state);
    if (has_codes) writes(scale);
  }
  if (const c10::TensorImpl* master = operands.states[slots.master()]; master != nullptr && param_is_16_bit) {
    if (!is_beside(master) || !read_master(master, group.precision, &task->param) || master->requires_grad() ||
        !are_equal(master->sizes(), param->sizes()))
      return Path::kStateForm;
    if (!same_order_in_memory(param, master)) return Path::kMemory;
    in_two_parts = true;
    writes(master);
  }
  entry->steps = entry->device_steps = nullptr;
  entry->step = 0;
  if (const c10::TensorImpl* steps = operands.steps) {
    TensorView view;
    const bool on_host = is_plain_cpu(steps);
    if ((!on_host && !is_beside(steps)) || !read_view(steps, true, &view) || steps->numel() != 1 ||
        size_of(view.dtype) == 2)
      return Path::kStateForm;
    (on_host ? entry->steps : entry->device_steps) = view.data;
    entry->steps_are_double = view.dtype == DType::kFloat64;
    if (on_host) {
      entry->step = entry->next_count();
      if (!(entry->step >= 1)) return Path::kStateValue;
    }
    writes(steps);
  }
  if (!look_at_numbers(operands, group, &entry->numbers)) return Path::kStateForm;
  for (const c10::TensorImpl* number : operands.numbers)
    if (number != nullptr) writes(number);
  *written = nullptr;
  if (!writable) return Path::kInference;

  task->shard = nullptr;
  const bool is_random = group.is_random(param_is_16_bit);
  if (is_random && operands.shard != nullptr && !is_elsewhere) {
    if (!operands.shard->is_block) return Path::kPlacement;
    if (!lay_shard(*operands.shard, param->sizes(), &shard_layouts_, &task->shard)) return Path::kMemory;
  }

  if (is_factored) {
    const Path path = factor(operands, task);
    if (path != Path::kFused) return path;
  }
  // Random numbers belong to the logical element, whatever the memory format; and so do rows and columns.
  const bool logical_order = is_factored ? !(in_order && param->is_contiguous()) : is_random && !param->is_contiguous();
  if (in_order && !logical_order) return Path::kFused;
  if (in_two_parts && logical_order) return Path::kMemory;
  std::vector<Arranged> arranged{{param, &task->param}};
  if (gradient != nullptr) arranged.push_back({gradient, &task->gradient});
  for (int s = 0; s <= slots.average(); ++s)
    if (operands.states[s] != nullptr && task->state[s].data != nullptr && task->state[s].dtype != DType::kFactored)
      arranged.push_back({operands.states[s], &task->state[s]});
  return arrange(arranged, logical_order, &layouts_) ? Path::kFused : Path::kMemory;
}

namespace {

FactoredShape stack_of(c10::IntArrayRef sizes) {
  const size_t dims = sizes.size();
  return {c10::multiply_integers(sizes.slice(0, dims - 2)), sizes[dims - 2], sizes[dims - 1]};
}

// Which part of the whole's stack of matrices a shard is. False if its matrices do not lie beside each other in the
// whole: of the dimensions before the last two, one is cut that comes after another of more than one. All processes
// must find the same, so nothing is asked that differs among them.
bool block_of(const Shard& shard, FactoredBlock* block) {
  if (!shard.is_block) return false;
  block->whole = stack_of(shard.sizes);
  block->matrix = 0;
  bool is_outermost = true;
  const size_t dims = shard.sizes.size();
  for (size_t d = 0; d + 2 < dims; ++d) {
    const bool is_cut = std::find(shard.cuts.begin(), shard.cuts.end(), d) != shard.cuts.end();
    if (is_cut && !is_outermost) return false;
    is_outermost = is_outermost && shard.sizes[d] == 1;
    block->matrix = block->matrix * shard.sizes[d] + shard.offset[d];
  }
  block->row = shard.offset[dims - 2];
  block->column = shard.offset[dims - 1];
  return true;
}

}  // namespace

// Lets the task see its second moments as the product of two averages: kFused then. There is nothing to see where they
// are still to be made, or there are no elements.
Path Batch::factor(const Operands& operands, TensorTask* task) {
  const c10::IntArrayRef sizes = operands.param->sizes();
  FactoredBlock block;
  if (operands.shard != nullptr && !block_of(*operands.shard, &block)) return Path::kFactors;
  const int first = first_of(rule_.factors);
  const c10::TensorImpl *rows_of = operands.states[first], *columns_of = operands.states[first + 1];
  if (rows_of == nullptr || columns_of == nullptr) return Path::kFused;
  TensorView averages[2];
  if (!read_view(rows_of, true, &averages[0]) || !read_view(columns_of, true, &averages[1])) return Path::kDtype;
  if (task->whole_numel() == 0) return Path::kFused;
  factored_.emplace_back(stack_of(sizes), averages[0], averages[1], operands.shard == nullptr ? nullptr : &block);
  task->state[first] = {&factored_.back(), nullptr, DType::kFactored};
  return Path::kFused;
}

// False if the numbers are not in a form that the engines take. One that is missing is still to be made.
bool Batch::look_at_numbers(const Operands& operands, const GroupValues& group, HeldNumbers* numbers) const {
  *numbers = {};
  if (rule_.number_count == 0) return true;
  HeldNumbers held;
  held.count = rule_.number_count;
  const c10::TensorImpl* first = operands.numbers[0];
  for (int n = 0; n < held.count; ++n) {
    const c10::TensorImpl* number = n < group.numbers_needed ? operands.numbers[n] : first;
    if (number == nullptr || first == nullptr) return true;
    const bool on_host = is_plain_cpu(number);
    TensorView view;
    if (!on_host && !(is_plain_cuda(number) && number->device() == operands.param->device())) return false;
    if (!read_view(number, true, &view) || number->numel() != 1 || size_of(view.dtype) == 2) return false;
    if (number->device() != first->device() || number->dtype() != first->dtype()) return false;
    held.data[n] = view.data;
    held.values.are_float32 = view.dtype == DType::kFloat32;
  }
  (is_plain_cpu(first) ? held.on_host : held.on_device) = true;
  if (held.on_host) held.read();
  *numbers = held;
  if (held.on_device) return true;
  // What the device finds out, the count of steps or a sum, moves numbers that lie there.
  const bool is_known = operands.steps == nullptr || is_plain_cpu(operands.steps);
  return is_plain_cpu(operands.param) || (is_known && rule_.sum_count == 0);
}

}  // namespace trainopt::aten
