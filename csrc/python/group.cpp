#include "python/group.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <string>

namespace trainopt::python {
namespace {

[[noreturn]] void raise_python_error() { throw pybind11::error_already_set(); }

double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (value == Py_None) return 0;
  if (THPVariable_Check(value)) return THPVariable_Unpack(value).item().toDouble();
  const double result = PyFloat_AsDouble(value);
  if (result == -1 && PyErr_Occurred()) raise_python_error();
  return result;
}

// Reads values from a group's dict, and remembers which.
class Reader {
 public:
  explicit Reader(PyObject* dict) : dict_(dict) {}

  PyObject* find(const char* key) {
    PyObject* value = PyDict_GetItemWithError(dict_, pybind11::str(key).ptr());
    if (value == nullptr && PyErr_Occurred()) raise_python_error();
    values_.push_back(value);
    return value;
  }

  PyObject* require(const char* key) {
    PyObject* value = find(key);
    if (value == nullptr) throw pybind11::key_error(key);
    return value;
  }

  double option(const char* key) { return number(require(key)); }

  // For trainopt's own options, which a group that torch made does not have.
  double option(const char* key, double otherwise) {
    PyObject* value = find(key);
    return value == nullptr ? otherwise : number(value);
  }

  // "betas.1" is element 1 of the group's "betas".
  double rule_option(const char* name) {
    const std::string full(name);
    const size_t dot = full.find('.');
    if (dot == std::string::npos) return full == "bias_correction" ? option(name, 1) : option(name);
    PyObject* pair = require(full.substr(0, dot).c_str());
    const auto item = pybind11::reinterpret_steal<pybind11::object>(PySequence_GetItem(pair, full[dot + 1] - '0'));
    if (!item) raise_python_error();
    return number(item.ptr());
  }

  bool has_read(PyObject* value) const { return std::find(values_.begin(), values_.end(), value) != values_.end(); }

 private:
  PyObject* dict_;
  std::vector<PyObject*> values_;
};

bool is_immutable(PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i)
      if (!is_immutable(PyTuple_GET_ITEM(value, i))) return false;
    return true;
  }
  return value == Py_None || PyFloat_CheckExact(value) || PyBool_Check(value) || PyLong_CheckExact(value) ||
         PyUnicode_CheckExact(value);
}

template <class S>
void fill(cpu::Stages<S>& stages, const Group& group, const Moment& now, Decay decay, double gradient_scale) {
  const bool coupled = decay == Decay::kGradient;
  stages.scaled = stages.write_gradient = gradient_scale != 1;
  stages.negate = group.maximize;
  stages.decay_gradient = group.weight_decay != 0 && coupled;
  stages.l1_gradient = group.l1 != 0 && !group.l1_proximal;
  stages.l1_proximal = group.l1 != 0 && group.l1_proximal;
  stages.noisy = group.noise != 0;
  stages.gradient_scale = static_cast<S>(gradient_scale);
  stages.weight_decay = static_cast<S>(group.weight_decay);
  stages.keep = coupled ? S(1) : static_cast<S>(now.rounded(1 - now.rounded(now.lr * now.rounded(group.weight_decay))));
  stages.l1 = static_cast<S>(group.l1);
  stages.threshold = static_cast<S>(group.lr * group.l1);
  stages.noise = static_cast<S>(group.noise);
  stages.seed = group.seed;
}

}  // namespace

bool Group::unchanged(PyObject* dict) const {
  if (!immutable_ || PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(items_.size())) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (const Item& item : items_)
    if (!PyDict_Next(dict, &position, &key, &value) || key != item.key || value != item.value) return false;
  return true;
}

void Group::refresh(PyObject* dict, const cpu::Rule& rule) {
  if (unchanged(dict)) return;
  immutable_ = false;  // until all is read: a value may raise
  Reader reader(dict);
  for (int i = 0; i < rule.option_count; ++i) options[i] = reader.rule_option(rule.options[i]);
  states_needed = rule.states_needed(options);
  PyObject* lr_value = reader.require("lr");
  lr = number(lr_value);
  single_lr = THPVariable_Check(lr_value) && THPVariable_Unpack(lr_value).scalar_type() == at::kFloat;
  weight_decay = reader.option("weight_decay");
  maximize = reader.option("maximize") != 0;
  differentiable = reader.option("differentiable") != 0;
  l1 = reader.option("l1", 0);
  l1_proximal = reader.option("l1_proximal", 0) != 0;
  noise = reader.option("noise", 0);
  PyObject* seed_value = reader.find("seed");
  seed = seed_value == nullptr ? 0 : PyLong_AsUnsignedLongLongMask(seed_value);
  if (PyErr_Occurred()) raise_python_error();

  items_.clear();
  bool immutable = true;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(dict, &position, &key, &value)) {
    const bool matters = reader.has_read(value);
    immutable = immutable && (!matters || is_immutable(value));
    items_.push_back({key, value, pybind11::reinterpret_borrow<pybind11::object>(matters ? value : Py_None)});
  }
  params = Reader(dict).require("params");
  if (!PyList_Check(params) && !PyTuple_Check(params))
    throw pybind11::type_error("a parameter group's 'params' must be a list or a tuple");
  immutable_ = immutable;
}

cpu::Scalars Group::scalars(const cpu::Rule& rule, double step, bool first, bool wide, double gradient_scale) const {
  cpu::Scalars result;
  const Moment now{lr, single_lr, step, first};
  if (wide) {
    fill(result.stages64, *this, now, rule.decay(options), gradient_scale);
  } else {
    fill(result.stages32, *this, now, rule.decay(options), gradient_scale);
  }
  rule.prepare(options, now, wide, &result);
  return result;
}

}  // namespace trainopt::python
