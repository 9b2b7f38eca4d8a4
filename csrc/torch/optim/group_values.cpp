#include "torch/optim/group_values.h"

#include <algorithm>
#include <iterator>

#include "torch/cuda_device.h"
#include "torch/inspect.h"

namespace trainopt::aten {

bool GroupValues::leave_on_device(const at::Tensor& number, int64_t option) {
  const bool is_float = number.scalar_type() == at::kFloat || number.scalar_type() == at::kDouble;
  if (!is_plain_cuda(number.unsafeGetTensorImpl()) || !is_float || number.numel() != 1) return false;
  for (DeviceOption& place : on_device) {
    if (place.tensor != nullptr) continue;
    place = {number.unsafeGetTensorImpl(), option};
    return true;
  }
  return false;
}

bool GroupValues::needs_device_numbers(const cpu::Rule& rule) const {
  if (on_device[0].tensor == nullptr) return false;
  if (rule.sums_over_all) return true;
  // As yet those numbers are 0 here: would another one change anything?
  double others[kMaxOptions];
  std::copy(std::begin(options), std::end(options), others);
  for (const DeviceOption& place : on_device)
    if (place.tensor != nullptr && place.option != cuda::DeviceNumber::kLr) others[place.option] = 1;
  return rule.states_needed(others) != rule.states_needed(options) ||
         rule.numbers_needed(others) != rule.numbers_needed(options) || rule.decay(others) != rule.decay(options);
}

void GroupValues::read_device_numbers(const cpu::Rule& rule) {
  for (const DeviceOption& place : on_device) {
    if (place.tensor == nullptr) break;
    const at::Tensor number = tensor_from(place.tensor);
    const double value = number.item().toDouble();
    if (place.option == cuda::DeviceNumber::kLr) {
      lr = value;
    } else {
      options[place.option] = value;
    }
  }
  if (!rule.takes(options)) unreadable = 1;
}

SlotSet GroupValues::slots(const cpu::Rule& rule) const {
  SlotSet found = static_cast<SlotSet>(states_needed);
  if (has_master()) found |= 1u << rule.slots().master();
  for (int s = 0; s < rule.state_count; ++s)
    if (contains(found, s)) found |= 1u << rule.slots().scale(s);
  return found;
}

cpu::Scalars GroupValues::scalars(const cpu::Rule& rule, double step, bool first, bool is_float64,
                                  const GradientScaling& scaling, Numbers* numbers) const {
  cpu::Scalars result;
  const StepInfo info{lr * rule.rate(options), lr_is_float32 != 0, weight_decay, step, first};
  const Decay decay = rule.decay(options);
  if (is_float64) {
    result.stages64 = prepare_stages<double>(*this, info, decay, scaling.scale, scaling.norm);
  } else {
    result.stages32 = prepare_stages<float>(*this, info, decay, scaling.scale, scaling.norm);
  }
  rule.prepare(options, info, is_float64, &result, numbers);
  return result;
}

}  // namespace trainopt::aten
