// A parameter group's hyper-parameters, as the engines need them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>

#include "cpu/engine.h"
#include "cuda/engine.h"

namespace trainopt::aten {

// A learning rate or an option that is a tensor on a CUDA device.
struct DeviceOption {
  const c10::TensorImpl* tensor = nullptr;  // null: none
  int64_t option = 0;                       // the rule's option that it is, or cuda::DeviceNumber::kLr
};

// What the gradients of a step carry, where the host knows it.
struct GradientScaling {
  double scale = 1;  // gradients are divided by it, and written back unless it is 1 or they are clipped
  double norm = 0;   // of the gradients with their scale, for groups that clip
};

// How a group's 16-bit parameters are stored.
enum class Precision : int64_t { kNative, kMaster, kMaster24, kStochastic };

// What a group says. All fields are eight bytes is_float64, so that two groups can be compared as they lie in memory.
struct GroupValues : Settings {
  double options[kMaxOptions] = {};
  double differentiable = 0, skip_nonfinite = 0, stats = 0;  // truth values
  double unreadable = 0;       // likewise: there is an option that only torch can judge, and the rest is not to be used
  int64_t states_needed = 0;   // a SlotSet
  int64_t numbers_needed = 0;  // how many of the rule's, from the first on
  Precision precision = Precision::kNative;
  DeviceOption on_device[cuda::kMaxDeviceNumbers];  // what the host has not read, the first first

  // Whether a 16-bit parameter has beside it what it lacks of a float32.
  bool has_master() const { return precision == Precision::kMaster || precision == Precision::kMaster24; }
  // Whether the step of a parameter of 16 bits, or of more, takes random numbers.
  bool is_random(bool is_16_bit) const { return noise != 0 || (round_at_random != 0 && is_16_bit); }
  // The slots that matter: those needed, and what completes them where they are stored in two parts.
  SlotSet slots(const cpu::Rule& rule) const;
  bool operator==(const GroupValues& other) const { return std::memcmp(this, &other, sizeof other) == 0; }
  // `numbers` are moved on, of a rule that has any.
  cpu::Scalars scalars(const cpu::Rule& rule, double step, bool first, bool is_float64, const GradientScaling& scaling,
                       Numbers* numbers) const;

  // Leaves a number on its device if it can stay there; false if the host must read it.
  bool leave_on_device(const at::Tensor& number, int64_t option);
  // Whether the host goes by numbers that lie on a device: for what it does between two launches, or to know which
  // states there are and where the decay belongs.
  bool needs_device_numbers(const cpu::Rule& rule) const;
  // Reads what lies on a device, and waits for it: for a parameter that lies elsewhere. It stays noted.
  void read_device_numbers(const cpu::Rule& rule);
};

}  // namespace trainopt::aten
