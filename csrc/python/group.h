// A parameter group's hyper-parameters, read from its dict.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "torch/optim/group_values.h"

namespace trainopt::python {

using namespace aten;  // the layer below, which knows tensors and no Python

// Whether an object is a dict that answers as dicts do: a subclass may have a __getitem__ of its own.
bool is_plain_dict(PyObject* object);
bool is_plain_sequence(PyObject* object);  // likewise a list or a tuple

class Group : public GroupValues {
 public:
  // Reads `dict`, a plain one. Runs no Python code: what only that could read is `unreadable`. KeyError for a missing
  // option of torch's. False if the dict, or its list of parameters, is of a kind that answers by code of its own.
  bool refresh(PyObject* dict, const cpu::Rule& rule);

  // Whether there is nothing to read, for `dict`, a plain one, says what it said last: two walks over the same
  // immutable objects, in the same order, mean the same values.
  bool unchanged(PyObject* dict) const;
  // Whether one of the options of these names is another object than when this was asked last; or one that can change
  // in place, unless this is asked again in the same step. Runs no Python code.
  bool note(PyObject* dict, const std::vector<pybind11::str>& names, bool is_again);
  void forget_noted() { noted_.clear(); }

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
  struct Noted {
    PyObject* value = nullptr;
    pybind11::object owned;  // the value, where it is immutable
  };
  std::vector<Noted> noted_;  // by name
  bool noted_mutable_ = false;
  bool immutable_ = false;

  bool same_but_for(PyObject* key, PyObject* dict) const;
};

// Whether an option's value is a number, of Python's, of numpy's or in a tensor.
bool is_number(const pybind11::handle& value);

// ValueError if there is none.
const cpu::Rule& rule_named(const std::string& name);

// The names of the rule's states that a group's options call for.
std::vector<std::string> states_needed(const std::string& rule, const pybind11::dict& group, int64_t dimensions);

// Likewise of its numbers.
std::vector<std::string> numbers_needed(const std::string& rule, const pybind11::dict& group);

// Where the weight decay of a group belongs: "gradient", "parameter" or "update".
std::string decay_of(const std::string& rule, const pybind11::dict& group);

}  // namespace trainopt::python
