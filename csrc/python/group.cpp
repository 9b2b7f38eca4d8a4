#include "python/group.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <string>

#include "torch/cuda_device.h"
#include "torch/inspect.h"

namespace trainopt::python {
namespace {

[[noreturn]] void raise_python_error() { throw pybind11::error_already_set(); }

[[noreturn]] void raise_type_error(const std::string& message) { throw pybind11::type_error(message); }

// A number of numpy's that is no Python float: its types are not made by Python code, which cannot take their names.
bool is_real_of_numpy(PyObject* value) {
  const PyTypeObject* type = Py_TYPE(value);
  return !PyType_HasFeature(Py_TYPE(value), Py_TPFLAGS_HEAPTYPE) && std::strncmp(type->tp_name, "numpy.", 6) == 0 &&
         std::strstr(type->tp_name, "complex") == nullptr && type->tp_as_number != nullptr &&
         type->tp_as_number->nb_float != nullptr && type->tp_as_sequence == nullptr;
}

// A tensor that the host can read without anybody's looking on.
bool is_readable(const c10::TensorImpl* tensor) {
  return (is_plain_cpu(tensor) || is_plain_cuda(tensor)) && tensor->numel() == 1 &&
         !c10::isComplexType(c10::typeMetaToScalarType(tensor->dtype())) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

double value_in(const at::Tensor& number) {
  check_memory("an option", number.unsafeGetTensorImpl());
  return number.item().toDouble();
}

// What a number says; nothing where it is none, or where only Python code knows.
std::optional<double> number(PyObject* value) {
  if (PyFloat_Check(value)) return PyFloat_AS_DOUBLE(value);
  if (PyLong_Check(value)) {  // or a truth value
    int overflow = 0;
    const long long whole = PyLong_AsLongLongAndOverflow(value, &overflow);
    return overflow == 0 ? std::optional<double>(static_cast<double>(whole)) : std::nullopt;
  }
  if (THPVariable_CheckExact(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    return is_readable(tensor.unsafeGetTensorImpl()) ? std::optional<double>(value_in(tensor)) : std::nullopt;
  }
  return is_real_of_numpy(value) ? std::optional<double>(PyFloat_AsDouble(value)) : std::nullopt;
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
  int element;       // -1: the value itself
  Py_ssize_t count;  // how many elements the rule reads of it: more or fewer in a group are an error of torch's
};

const std::vector<OptionKey>& keys_of(const cpu::Rule& rule) {
  static std::map<const cpu::Rule*, std::vector<OptionKey>> keys;
  std::vector<OptionKey>& found = keys[&rule];
  for (int i = static_cast<int>(found.size()); i < rule.option_count; ++i) {
    const std::string name = rule.options[i];
    const size_t dot = name.find('.');
    found.push_back({key(name.substr(0, dot)), dot == std::string::npos ? -1 : name[dot + 1] - '0', 1});
    for (OptionKey& other : found)  // keys of one name are one object, and their elements follow each other
      if (other.name == found.back().name) other.count = found.back().element + 1;
  }
  return found;
}

// Reads values from a group's dict, whose keys are all strings, and remembers which.
class Reader {
 public:
  Reader(PyObject* dict, Group* group) : dict_(dict), group_(group) {}

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

  // One of torch's options: 0 where only torch can judge it.
  double torchs(PyObject* value) {
    const std::optional<double> found = read(value);
    if (!found) group_->unreadable = 1;
    return found.value_or(0);
  }

  // Likewise, and 0 for one that stays on its device; `option` is its place in the rule.
  double number_or_device(PyObject* value, int64_t option) {
    if (!PyFloat_CheckExact(value) && THPVariable_CheckExact(value)) {
      const at::Tensor& tensor = THPVariable_Unpack(value);
      if (is_readable(tensor.unsafeGetTensorImpl()) && group_->leave_on_device(tensor, option)) {
        group_->tensors.push_back(tensor.unsafeGetTensorImpl());
        return 0;
      }
    }
    return torchs(value);
  }

  bool truth(PyObject* value) { return value != Py_None && torchs(value) != 0; }

  // For trainopt's own options, which a group that torch made does not have.
  double own(PyObject* key, double otherwise) {
    PyObject* value = find(key);
    if (value == nullptr) return otherwise;
    const std::optional<double> found = read(value);
    if (!found) raise_type_error(pybind11::str(key).cast<std::string>() + " must be a number" + not_a(value));
    return *found;
  }

  // Whether there is one of them, other than None.
  bool is_given(PyObject* key) {
    PyObject* value = find(key);
    return value != nullptr && value != Py_None;
  }

  bool clears_gradient(PyObject* key) {
    PyObject* value = find(key);
    if (value == nullptr || value == Py_None) return false;
    if (!PyUnicode_CheckExact(value) || PyUnicode_CompareWithASCIIString(value, "in_step") != 0)
      raise_type_error("zero_grad must be None or 'in_step'" + not_a(value));
    return true;
  }

  Precision precision(PyObject* key) {
    PyObject* value = find(key);
    if (value == nullptr || value == Py_None) return Precision::kNative;
    static constexpr const char* kNames[] = {"native", "master", "master24", "stochastic"};
    for (int i = 0; i < 4; ++i)
      if (PyUnicode_CheckExact(value) && PyUnicode_CompareWithASCIIString(value, kNames[i]) == 0)
        return static_cast<Precision>(i);
    raise_type_error("precision must be 'native', 'master', 'master24' or 'stochastic'" + not_a(value));
  }

  uint64_t seed(PyObject* key) {
    PyObject* value = find(key);
    if (value == nullptr) return 0;
    if (!PyLong_Check(value) && !(is_real_of_numpy(value) && PyIndex_Check(value)))
      raise_type_error("seed must be an integer" + not_a(value));
    return PyLong_AsUnsignedLongLongMask(value);
  }

  // The rule's option `index`.
  double option(const cpu::Rule& rule, const OptionKey& key, int index) {
    if (contains(rule.true_options, index)) return own(key.name, 1);
    PyObject* value = require(key.name);
    if (key.element >= 0) {
      if (!is_plain_sequence(value) || PySequence_Fast_GET_SIZE(value) != key.count) {
        group_->unreadable = 1;
        return 0;
      }
      value = PySequence_Fast_GET_ITEM(value, key.element);
    }
    if (value == Py_None && contains(rule.options_or_none, index)) return std::numeric_limits<double>::quiet_NaN();
    return number_or_device(value, index);
  }

  bool has_read(PyObject* value) const { return std::find(values_.begin(), values_.end(), value) != values_.end(); }

 private:
  PyObject* dict_;
  Group* group_;
  std::vector<PyObject*> values_;

  static std::string not_a(PyObject* value) { return std::string(", not a ") + Py_TYPE(value)->tp_name; }

  std::optional<double> read(PyObject* value) {
    const std::optional<double> found = number(value);
    if (found && THPVariable_CheckExact(value))
      group_->tensors.push_back(THPVariable_Unpack(value).unsafeGetTensorImpl());
    return found;
  }
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

// Other keys could have a hash and an __eq__ of their own.
bool has_plain_keys(PyObject* dict) {
  Py_ssize_t position = 0;
  PyObject *name, *value;
  while (PyDict_Next(dict, &position, &name, &value))
    if (!PyUnicode_CheckExact(name)) return false;
  return true;
}

}  // namespace

bool is_plain_dict(PyObject* object) {
  return PyDict_CheckExact(object) || (PyDict_Check(object) && Py_TYPE(object)->tp_as_mapping->mp_subscript ==
                                                                   PyDict_Type.tp_as_mapping->mp_subscript);
}

bool is_plain_sequence(PyObject* object) {
  return PyList_CheckExact(object) || PyTuple_CheckExact(object) ||
         (PyList_Check(object) && Py_TYPE(object)->tp_iter == PyList_Type.tp_iter) ||
         (PyTuple_Check(object) && Py_TYPE(object)->tp_iter == PyTuple_Type.tp_iter);
}

// Whether the same keys have the same objects for values, one key's (null: none) aside.
bool Group::same_but_for(PyObject* key, PyObject* dict) const {
  if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(items_.size())) return false;
  Py_ssize_t position = 0;
  PyObject *name, *value;
  for (const Item& item : items_)
    if (!PyDict_Next(dict, &position, &name, &value) || name != item.key.ptr() || (value != item.value && name != key))
      return false;
  return true;
}

bool Group::unchanged(PyObject* dict) const { return immutable_ && same_but_for(nullptr, dict); }

bool Group::note(PyObject* dict, const std::vector<pybind11::str>& names, bool is_again) {
  static PyObject* const lr = key("lr");
  if (!noted_.empty() && !noted_mutable_ && same_but_for(lr, dict)) return false;  // as a schedule changes it
  if (!has_plain_keys(dict)) return false;
  noted_.resize(names.size());
  noted_mutable_ = false;
  bool is_new = false;
  for (size_t i = 0; i < names.size(); ++i) {
    PyObject* value = PyDict_GetItemWithError(dict, names[i].ptr());
    if (value == nullptr && PyErr_Occurred()) raise_python_error();
    const bool may_be_owned = value != nullptr && is_immutable(value), is_mutable = value != nullptr && !may_be_owned;
    noted_mutable_ = noted_mutable_ || is_mutable;
    if (value == noted_[i].value && (is_again || !is_mutable)) continue;
    is_new = true;
    noted_[i] = {value, pybind11::reinterpret_borrow<pybind11::object>(may_be_owned ? value : nullptr)};
  }
  return is_new;
}

bool Group::refresh(PyObject* dict, const cpu::Rule& rule) {
  immutable_ = false;  // until all is read: a value may raise
  if (!has_plain_keys(dict)) return false;
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
    PyObject* max_grad_norm = key("max_grad_norm");
    PyObject* zero_grad = key("zero_grad");
    PyObject* ema_decay = key("ema_decay");
    PyObject* ema_warmup = key("ema_warmup");
    PyObject* cautious = key("cautious");
    PyObject* cautious_weight_decay = key("cautious_weight_decay");
    PyObject* precision = key("precision");
    PyObject* stats = key("stats");
    PyObject* params = key("params");
  } keys;
  Reader reader(dict, this);
  const std::vector<OptionKey>& rule_keys = keys_of(rule);
  std::fill(std::begin(on_device), std::end(on_device), DeviceOption());
  tensors.clear();
  unreadable = 0;
  for (int i = 0; i < rule.option_count; ++i) options[i] = reader.option(rule, rule_keys[i], i);
  if (needs_device_numbers(rule)) read_device_numbers(rule);
  if (!rule.takes(options)) unreadable = 1;
  averages = reader.is_given(keys.ema_decay);
  ema_decay = averages != 0 ? reader.own(keys.ema_decay, 0) : 0;
  ema_warmup = reader.own(keys.ema_warmup, 0) != 0;
  states_needed = rule.states_needed(options) | (averages != 0 ? 1 << rule.state_count : 0);
  numbers_needed = rule.numbers_needed(options);
  PyObject* lr_value = rule.needs_lr ? reader.require(keys.lr) : reader.find(keys.lr);
  if (lr_value == nullptr) unreadable = 1;  // torch knows whether it can do without
  lr = lr_value == nullptr ? 0 : reader.number_or_device(lr_value, cuda::DeviceNumber::kLr);
  lr_is_float32 = lr_value != nullptr && !PyFloat_CheckExact(lr_value) && THPVariable_CheckExact(lr_value) &&
                  THPVariable_Unpack(lr_value).scalar_type() == at::kFloat;
  weight_decay = rule.decay(options) == Decay::kNone ? 0 : reader.torchs(reader.require(keys.weight_decay));
  maximize = reader.truth(reader.require(keys.maximize));
  PyObject* graph = rule.has_differentiable ? reader.require(keys.differentiable) : reader.find(keys.differentiable);
  differentiable = graph != nullptr && reader.truth(graph);
  l1 = reader.own(keys.l1, 0);
  l1_proximal = reader.own(keys.l1_proximal, 0) != 0;
  noise = reader.own(keys.noise, 0);
  skip_nonfinite = reader.own(keys.skip_nonfinite, 0) != 0;
  max_grad_norm = reader.is_given(keys.max_grad_norm) ? reader.own(keys.max_grad_norm, 0) : 0;
  clear_gradient = reader.clears_gradient(keys.zero_grad);
  cautious = reader.own(keys.cautious, 0) != 0;
  cautious_weight_decay = reader.own(keys.cautious_weight_decay, 0) != 0;
  precision = reader.precision(keys.precision);
  round_at_random = precision == Precision::kStochastic;
  stats = reader.own(keys.stats, 0) != 0;
  seed = reader.seed(keys.seed);

  items_.clear();
  bool immutable = true;
  Py_ssize_t position = 0;
  PyObject *name, *value;
  while (PyDict_Next(dict, &position, &name, &value)) {
    const bool matters = reader.has_read(value), may_be_owned = matters && is_immutable(value);
    immutable = immutable && matters == may_be_owned;
    items_.push_back({pybind11::reinterpret_borrow<pybind11::object>(name), value,
                      pybind11::reinterpret_borrow<pybind11::object>(may_be_owned ? value : Py_None)});
  }
  params = Reader(dict, this).require(keys.params);
  immutable_ = immutable;
  return is_plain_sequence(params);
}

bool is_number(const pybind11::handle& value) { return number(value.ptr()).has_value(); }

const cpu::Rule& rule_named(const std::string& name) {
  const cpu::Rule* rule = cpu::find_rule(name.c_str());
  if (rule == nullptr) throw pybind11::value_error("there is no rule '" + name + "'");
  return *rule;
}

namespace {

Group group_of(const cpu::Rule& rule, const pybind11::dict& dict) {
  Group group;
  group.refresh(dict.ptr(), rule);
  return group;
}

}  // namespace

std::vector<std::string> states_needed(const std::string& rule_name, const pybind11::dict& dict, int64_t dimensions) {
  const cpu::Rule& rule = rule_named(rule_name);
  const Group group = group_of(rule, dict);
  const StateSet needed = states_of_one(static_cast<StateSet>(group.states_needed), rule.factors, dimensions);
  std::vector<std::string> names;
  for (int s = 0; s < rule.state_count; ++s)
    if (contains(needed, s)) names.emplace_back(rule.states[s]);
  return names;
}

std::vector<std::string> numbers_needed(const std::string& rule_name, const pybind11::dict& dict) {
  const cpu::Rule& rule = rule_named(rule_name);
  return {rule.numbers, rule.numbers + group_of(rule, dict).numbers_needed};
}

std::string decay_of(const std::string& rule_name, const pybind11::dict& dict) {
  const cpu::Rule& rule = rule_named(rule_name);
  static constexpr const char* kNames[] = {"gradient", "parameter", "update", "none"};
  return kNames[static_cast<int>(rule.decay(group_of(rule, dict).options))];
}

}  // namespace trainopt::python
