// A parameter group's hyper-parameters, read from its dict.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/engine.h"

namespace trainopt::python {

class Group {
 public:
  // Reads `dict` again if anything in it changed since the last call: two walks over the same immutable objects, in
  // the same order, mean the same values. KeyError for a missing option of torch's.
  void refresh(PyObject* dict, const cpu::Rule& rule);

  PyObject* params = nullptr;  // the list or tuple itself, borrowed
  double options[kMaxOptions] = {};
  int states_needed = 0;
  bool single_lr = false;  // the learning rate is a float32 tensor
  double lr = 0, weight_decay = 0, l1 = 0, noise = 0;
  uint64_t seed = 0;
  bool maximize = false, l1_proximal = false, differentiable = false;

  cpu::Scalars scalars(const cpu::Rule& rule, double step, bool first, bool wide, double gradient_scale) const;

 private:
  struct Item {
    PyObject* key;           // compared, never followed
    PyObject* value;         // likewise
    pybind11::object owned;  // keeps an immutable value alive, so that its address stays its own
  };
  std::vector<Item> items_;
  bool immutable_ = false;

  bool unchanged(PyObject* dict) const;
};

}  // namespace trainopt::python
