// A parameter group's hyper-parameters, read from its dict.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <vector>

#include "cpu/engine.h"
#include "cuda/engine.h"

namespace trainopt::python {

// A learning rate or an option that is a tensor on a CUDA device.
struct DeviceOption {
  const c10::TensorImpl* tensor = nullptr;  // null: none
  int64_t option = 0;                       // the rule's option that it is, or cuda::DeviceNumber::kLr
};

// What a group says. All fields are eight bytes wide, so that two groups can be compared as they lie in memory.
struct GroupValues : Settings {
  double options[kMaxOptions] = {};
  double differentiable = 0, skip_nonfinite = 0;  // truth values
  double unreadable = 0;  // likewise: there is an option that only torch can judge, and the rest is not to be used
  int64_t states_needed = 0;
  DeviceOption on_device[cuda::kMaxDeviceNumbers];  // what the host has not read, the first first

  bool operator==(const GroupValues& other) const { return std::memcmp(this, &other, sizeof other) == 0; }
  cpu::Scalars scalars(const cpu::Rule& rule, double step, bool first, bool wide, double gradient_scale) const;

  // Leaves a number on its device if it can stay there; false if the host must read it.
  bool leave_on_device(const at::Tensor& number, int64_t option);
  // Reads what lies on a device, and waits for it: for a parameter that lies elsewhere. It stays noted.
  void read_device_numbers(const cpu::Rule& rule);
};

// Whether an object is a dict that answers as dicts do: a subclass may have a __getitem__ of its own.
bool is_plain_dict(PyObject* object);
bool is_plain_sequence(PyObject* object);  // likewise a list or a tuple

class Group : public GroupValues {
 public:
  // Reads `dict`, a plain one, again if anything in it changed since the last call: two walks over the same immutable
  // objects, in the same order, mean the same values. Runs no Python code: what only that could read is `unreadable`.
  // KeyError for a missing option of torch's. False if the dict, or its list of parameters, is of a kind that answers
  // by code of its own.
  bool refresh(PyObject* dict, const cpu::Rule& rule);

  PyObject* params = nullptr;  // the list or tuple itself, borrowed

  // The options that are tensors, whose memory the step reads.
  std::vector<const c10::TensorImpl*> tensors;

 private:
  // What is owned keeps its address to itself. All of it is immutable and of Python's own types, so to let go of it
  // runs nobody's code.
  struct Item {
    pybind11::object key;
    PyObject* value;         // compared, never followed
    pybind11::object owned;  // the value, where it is read
  };
  std::vector<Item> items_;
  bool immutable_ = false;

  bool unchanged(PyObject* dict) const;
};

}  // namespace trainopt::python
