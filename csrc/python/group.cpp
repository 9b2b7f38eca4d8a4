#include "python/group.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <map>
#include <string>

#include "python/cuda_device.h"
#include "python/tensors.h"

namespace trainopt::python {
namespace {

[[noreturn]] void raise_python_error() { throw pybind11::error_already_set(); }

double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (value == Py_None || value == Py_False) return 0;
  if (value == Py_True) return 1;
  if (!PyLong_CheckExact(value) && THPVariable_Check(value)) return THPVariable_Unpack(value).item().toDouble();
  const double result = PyFloat_AsDouble(value);
  if (result == -1 && PyErr_Occurred()) raise_python_error();
  return result;
}

// Likewise, and 0 for one that stays on its device.
double number_or_device(PyObject* value, int64_t option, GroupValues* group) {
  if (!PyFloat_CheckExact(value) && THPVariable_CheckExact(value) &&
      group->leave_on_device(THPVariable_Unpack(value), option))
    return 0;
  return number(value);
}

// A key of the group's dict; it lives as long as the interpreter.
PyObject* key(const std::string& name) {
  PyObject* interned = PyUnicode_InternFromString(name.c_str());
  if (interned == nullptr) raise_python_error();
  return interned;
}

// Where a rule's option is read: "betas.1" is element 1 of the group's "betas".
struct OptionKey {
  PyObject* name;
  int element;  // -1: the value itself
};

const std::vector<OptionKey>& keys_of(const cpu::Rule& rule) {
  static std::map<const cpu::Rule*, std::vector<OptionKey>> keys;
  std::vector<OptionKey>& found = keys[&rule];
  for (int i = static_cast<int>(found.size()); i < rule.option_count; ++i) {
    const std::string name = rule.options[i];
    const size_t dot = name.find('.');
    found.push_back({key(name.substr(0, dot)), dot == std::string::npos ? -1 : name[dot + 1] - '0'});
  }
  return found;
}

// Reads values from a group's dict, and remembers which.
class Reader {
 public:
  explicit Reader(PyObject* dict) : dict_(dict) {}

  PyObject* find(PyObject* key) {
    PyObject* value = PyDict_GetItemWithError(dict_, key);
    if (value == nullptr && PyErr_Occurred()) raise_python_error();
    values_.push_back(value);
    return value;
  }

  PyObject* require(PyObject* key) {
    PyObject* value = find(key);
    if (value == nullptr) {
      PyErr_SetObject(PyExc_KeyError, key);
      raise_python_error();
    }
    return value;
  }

  // For trainopt's own options, which a group that torch made does not have.
  double option(PyObject* key, double otherwise) {
    PyObject* value = find(key);
    return value == nullptr ? otherwise : number(value);
  }

  // The rule's option `index`, which may stay on its device.
  double option(const OptionKey& key, int index, GroupValues* group) {
    static PyObject* const kBiasCorrection = trainopt::python::key("bias_correction");
    if (key.name == kBiasCorrection) return option(key.name, 1);
    PyObject* value = require(key.name);
    if (key.element < 0) return number_or_device(value, index, group);
    const auto item = pybind11::reinterpret_steal<pybind11::object>(PySequence_GetItem(value, key.element));
    if (!item) raise_python_error();
    return number_or_device(item.ptr(), index, group);
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

}  // namespace

bool Group::unchanged(PyObject* dict) const {
  if (!immutable_ || PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(items_.size())) return false;
  Py_ssize_t position = 0;
  PyObject *name, *value;
  for (const Item& item : items_)
    if (!PyDict_Next(dict, &position, &name, &value) || name != item.key || value != item.value) return false;
  return true;
}

void Group::refresh(PyObject* dict, const cpu::Rule& rule) {
  if (unchanged(dict)) return;
  immutable_ = false;  // until all is read: a value may raise
  static const struct {
    PyObject* lr = key("lr");
    PyObject* weight_decay = key("weight_decay");
    PyObject* maximize = key("maximize");
    PyObject* differentiable = key("differentiable");
    PyObject* l1 = key("l1");
    PyObject* l1_proximal = key("l1_proximal");
    PyObject* noise = key("noise");
    PyObject* seed = key("seed");
    PyObject* skip_nonfinite = key("skip_nonfinite");
    PyObject* params = key("params");
  } keys;
  Reader reader(dict);
  const std::vector<OptionKey>& rule_keys = keys_of(rule);
  std::fill(std::begin(on_device), std::end(on_device), DeviceOption());
  for (int i = 0; i < rule.option_count; ++i) options[i] = reader.option(rule_keys[i], i, this);
  states_needed = rule.states_needed(options);
  PyObject* lr_value = reader.require(keys.lr);
  lr = number_or_device(lr_value, cuda::DeviceNumber::kLr, this);
  single_lr = !PyFloat_CheckExact(lr_value) && THPVariable_Check(lr_value) &&
              THPVariable_Unpack(lr_value).scalar_type() == at::kFloat;
  weight_decay = number(reader.require(keys.weight_decay));
  maximize = number(reader.require(keys.maximize)) != 0;
  differentiable = number(reader.require(keys.differentiable)) != 0;
  l1 = reader.option(keys.l1, 0);
  l1_proximal = reader.option(keys.l1_proximal, 0) != 0;
  noise = reader.option(keys.noise, 0);
  skip_nonfinite = reader.option(keys.skip_nonfinite, 0) != 0;
  PyObject* seed_value = reader.find(keys.seed);
  seed = seed_value == nullptr ? 0 : PyLong_AsUnsignedLongLongMask(seed_value);
  if (PyErr_Occurred()) raise_python_error();

  items_.clear();
  bool immutable = true;
  Py_ssize_t position = 0;
  PyObject *name, *value;
  while (PyDict_Next(dict, &position, &name, &value)) {
    const bool matters = reader.has_read(value);
    immutable = immutable && (!matters || is_immutable(value));
    items_.push_back({name, value, pybind11::reinterpret_borrow<pybind11::object>(matters ? value : Py_None)});
  }
  params = Reader(dict).require(keys.params);
  if (!PyList_Check(params) && !PyTuple_Check(params))
    throw pybind11::type_error("a parameter group's 'params' must be a list or a tuple");
  immutable_ = immutable;
}

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

void GroupValues::read_device_numbers() {
  for (const DeviceOption& place : on_device) {
    if (place.tensor == nullptr) return;
    const at::Tensor number = tensor_from(place.tensor);
    const double value = number.item().toDouble();
    if (place.option == cuda::DeviceNumber::kLr) {
      lr = value;
    } else {
      options[place.option] = value;
    }
  }
}

cpu::Scalars GroupValues::scalars(const cpu::Rule& rule, double step, bool first, bool wide,
                                  double gradient_scale) const {
  cpu::Scalars result;
  const Moment now{lr, single_lr != 0, step, first};
  const Decay decay = rule.decay(options);
  if (wide) {
    result.stages64 = prepare_stages<double>(*this, now, decay, gradient_scale);
  } else {
    result.stages32 = prepare_stages<float>(*this, now, decay, gradient_scale);
  }
  rule.prepare(options, now, wide, &result);
  return result;
}

}  // namespace trainopt::python
