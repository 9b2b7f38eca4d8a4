#include "python/plan.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>

#include "python/cuda_device.h"
#include "python/tensors.h"

namespace trainopt::python {
namespace {

// Elements from which on the interpreter is let go during the step. Below, a step takes less than the milliseconds for
// which Python itself lets no other thread run, and keeping many tensors' memory would take a tenth of its time.
constexpr int64_t kReleaseElements = 1 << 21;
// How far ahead of the comparison memory is asked for, in parameters.
constexpr int64_t kSightingsAhead = 4;
// Parameters below which one thread compares them all before another has been woken.
constexpr int64_t kFewTensors = 64;

// Finds each parameter's entry in torch's state dict. The dict's order is nearly always that of the parameters, so the
// next entry is looked at before anything is hashed.
class StateCursor {
 public:
  explicit StateCursor(PyObject* dict) : dict_(dict) { advance(); }

  PyObject* find(PyObject* param) {
    if (PyObject* found = pass(param)) return found;
    if (PyDict_GET_SIZE(dict_) == 0) return nullptr;
    PyObject* found = PyDict_GetItemWithError(dict_, param);
    if (found == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
    return found;
  }

  // Moves on if the next entry is this parameter's; its value then.
  PyObject* pass(PyObject* param) {
    if (param != key_) return nullptr;
    PyObject* found = value_;
    advance();
    return found;
  }

 private:
  PyObject* dict_;
  Py_ssize_t position_ = 0;
  PyObject* key_ = nullptr;
  PyObject* value_ = nullptr;

  void advance() {
    if (!PyDict_Next(dict_, &position_, &key_, &value_)) key_ = value_ = nullptr;
  }
};

bool contains(const Indices& ascending, int64_t index) {
  return !ascending.empty() && std::binary_search(ascending.begin(), ascending.end(), index);
}

const cpu::Rule& rule_named(const std::string& name) {
  const cpu::Rule* rule = cpu::find_rule(name.c_str());
  if (rule == nullptr) throw pybind11::value_error("there is no rule '" + name + "'");
  return *rule;
}

at::Tensor tensor_or_none(const pybind11::object& object) {
  return object.is_none() ? at::Tensor() : THPVariable_Unpack(object.ptr());
}

PyObject* dict_of(PyObject* groups, size_t index) {
  PyObject* dict = PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(index));
  if (!PyDict_Check(dict)) throw pybind11::type_error("a parameter group must be a dict");
  return dict;
}

}  // namespace

Plan::Plan(const std::string& rule) : rule_(rule_named(rule)), batch_(rule_) {
  for (int i = 0; i <= rule_.state_count; ++i) {
    PyObject* name = PyUnicode_InternFromString(i < rule_.state_count ? rule_.states[i] : "step");
    state_names_.push_back(pybind11::reinterpret_steal<pybind11::str>(name));
  }
}

bool Plan::lacks_states(const Operands& operands, const Group& group) const {
  const auto found = std::count_if(std::begin(operands.states), std::end(operands.states),
                                   [](const c10::TensorImpl* state) { return state != nullptr; });
  const bool needs_steps = rule_.counts_steps || group.noise != 0;
  return found != group.states_needed || (needs_steps && operands.steps == nullptr);
}

// Looks at everything, as if there had been no step before.
void Plan::walk(PyObject* groups, PyObject* state, bool writes_gradient, const Indices& fresh, const Indices& torchs,
                Indices* missing, Indices* rest) {
  const bool mode = c10::impl::TorchDispatchModeTLS::any_modes_set();
  batch_.clear();
  groups_.resize(PyList_GET_SIZE(groups));
  forms_.resize(groups_.size());
  can_recall_ = !writes_gradient && torchs.empty();
  StateCursor cursor(state);
  uint32_t tensor = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    group.refresh(dict_of(groups, g), rule_);
    forms_[g] = GroupForm(group);
    const Py_ssize_t count = forms_[g].count;
    bool host_knows = group.on_device[0].tensor == nullptr;
    if (sightings_.size() < static_cast<size_t>(tensor + count)) sightings_.resize(tensor + count);
    places_.resize(tensor + count);
    for (Py_ssize_t i = 0; i < count; ++i, ++tensor) {
      PyObject* object = PySequence_Fast_GET_ITEM(group.params, i);
      Sighting& sighting = sightings_[tensor];
      const bool is_tensor = THPVariable_CheckExact(object);
      sighting.see_idle(object);
      places_[tensor] = {object, nullptr, false};
      if (is_tensor && !has_gradient(object)) {
        cursor.pass(object);
        continue;
      }
      PyObject* param_state = cursor.find(object);
      places_[tensor] = {object, param_state, true};
      if (contains(torchs, tensor)) continue;
      if (!is_tensor || mode) {
        rest->push_back(tensor);
        continue;
      }
      Operands operands;
      sighting.see(object, param_state, state_names_, group.states_needed, &operands);
      if (!host_knows && !is_plain_cuda(operands.param)) {
        group.read_device_numbers();
        host_knows = true;
      }
      const bool lacks = lacks_states(operands, group);
      const Path path = lacks ? batch_.announce(operands, group, tensor, writes_gradient)
                              : batch_.add(operands, &group, tensor, contains(fresh, tensor), writes_gradient);
      if (path != Path::kFused) {
        rest->push_back(tensor);
      } else if (lacks) {
        missing->push_back(tensor);
      } else {
        can_recall_ = sighting.note(operands, batch_) && can_recall_;
      }
    }
  }
  sightings_.resize(tensor);
  const Indices& sharing = batch_.sharing();
  if (!sharing.empty()) {
    for (const int64_t index : sharing)
      if (!contains(torchs, index)) rest->push_back(index);
    std::sort(rest->begin(), rest->end());
    const auto shares = [&](int64_t index) { return contains(sharing, index); };
    missing->erase(std::remove_if(missing->begin(), missing->end(), shares), missing->end());
  }
  can_recall_ = can_recall_ && missing->empty() && rest->empty();
}

// Whether the groups hold the parameters of the last step, with the same states and the same kinds of options.
bool Plan::same_places(PyObject* groups, PyObject* state) {
  if (static_cast<size_t>(PyList_GET_SIZE(groups)) != groups_.size()) return false;
  StateCursor cursor(state);
  const Place* place = places_.data();
  for (size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    group.refresh(dict_of(groups, g), rule_);
    if (!(GroupForm(group) == forms_[g]) || group.on_device[0].tensor != nullptr) return false;
    for (Py_ssize_t i = 0; i < forms_[g].count; ++i, ++place) {
      PyObject* object = PySequence_Fast_GET_ITEM(group.params, i);
      if (object != place->object) return false;
      PyObject* param_state = place->has_gradient ? cursor.find(object) : (cursor.pass(object), nullptr);
      if (param_state != place->state) return false;
    }
  }
  return true;
}

// Whether the batch of the last step is this step's too, but for the gradients' memory and the counts.
bool Plan::recall(PyObject* groups, PyObject* state, bool* all_next) {
  if (!can_recall_ || c10::impl::TorchDispatchModeTLS::any_modes_set() || !same_places(groups, state)) return false;
  const int64_t count = static_cast<int64_t>(sightings_.size());
  const int64_t parts = count < kFewTensors ? 1 : threads_for(batch_.elements + kTensorElements * count);
  std::atomic<bool> all_hold = true, all_are_next = true;
  const auto compare = [&](int64_t first_part, int64_t last_part) {
    const int64_t first = count * first_part / parts, last = count * last_part / parts;
    bool hold = true, are_next = true;
    for (int64_t i = first; hold && i < last; ++i) {
      if (i + kSightingsAhead < last) sightings_[i + kSightingsAhead].prefetch();
      hold = sightings_[i].still_holds(batch_, &are_next);
    }
    if (!hold) all_hold = false;
    if (!are_next) all_are_next = false;
  };
  if (parts == 1) {
    compare(0, 1);
  } else {
    at::parallel_for(0, parts, 1, compare);
  }
  *all_next = all_are_next;
  return all_hold;
}

// Whether it depends on the gradients' elements what this step is.
bool Plan::depends_on_gradients(PyObject* state) const {
  const auto skips = [](const Group& group) { return group.skip_nonfinite != 0; };
  const auto stands_still = [](const Group& group) { return group.lr == 0 && group.on_device[0].tensor == nullptr; };
  return std::any_of(groups_.begin(), groups_.end(), skips) ||
         (PyDict_GET_SIZE(state) == 0 && std::all_of(groups_.begin(), groups_.end(), stands_still));
}

// A graph that is captured without a parameter's gradient would never step that parameter.
void Plan::check_capture() const {
  if (batch_.cuda.empty() || !batch_.cuda.is_captured()) return;
  for (size_t i = 0; i < places_.size(); ++i)
    TORCH_CHECK(places_[i].has_gradient || !THPVariable_Unpack(places_[i].object).requires_grad(), "parameter ", i,
                " has no gradient while the step is captured into a CUDA graph, which would never step it: give it one,"
                " or requires_grad=False");
}

pybind11::object Plan::step(pybind11::list groups, pybind11::dict state, double gradient_scale, const Indices& fresh,
                            const Indices& torchs, const pybind11::object& device_scale,
                            const pybind11::object& found_inf, bool were_seen) {
  // Two threads in one optimizer's step race for its values, as with any in-place operation, but not for the plan.
  if (is_running_)
    return Plan(rule_.name).step(groups, state, gradient_scale, fresh, torchs, device_scale, found_inf, were_seen);
  const DeviceScaling scaling{tensor_or_none(device_scale), tensor_or_none(found_inf)};
  const bool writes_gradient = gradient_scale != 1 || scaling.gradient_scale.defined();
  bool all_next = false;
  if (!writes_gradient && fresh.empty() && torchs.empty() && recall(groups.ptr(), state.ptr(), &all_next)) {
    if (!were_seen && depends_on_gradients(state.ptr())) return pybind11::bool_(true);
    if (scaling.exists()) return pybind11::bool_(false);
    batch_.prepare_again(gradient_scale, all_next);
  } else {
    Indices missing, rest;
    walk(groups.ptr(), state.ptr(), writes_gradient, fresh, torchs, &missing, &rest);
    const bool can_recall = std::exchange(can_recall_, false);  // only what has been prepared
    if (!were_seen && depends_on_gradients(state.ptr())) return pybind11::bool_(true);
    if (scaling.exists() && (!batch_.is_for_devices_alone() || !rest.empty())) return pybind11::bool_(false);
    check_capture();
    if (!missing.empty() || !rest.empty()) return pybind11::make_tuple(missing, rest);
    batch_.prepare(gradient_scale, scaling);
    can_recall_ = can_recall;
  }
  if (batch_.elements < kReleaseElements && batch_.cuda.empty()) {
    batch_.run();
  } else {
    run_unlocked();
  }
  return pybind11::none();
}

// Another thread may drop a tensor, or give it other memory, while the interpreter is free: this memory stays until the
// step is done.
void Plan::run_unlocked() {
  is_running_ = true;
  const auto finish = [this](void*) {
    kept_.clear();
    is_running_ = false;
  };
  const std::unique_ptr<void, decltype(finish)> finished(this, finish);
  const auto keep = [&](const c10::TensorImpl* tensor) { kept_.push_back(tensor->storage()); };
  for (const Sighting& sighting : sightings_) sighting.for_each_tensor(keep);
  pybind11::gil_scoped_release release;
  batch_.run();
}

std::vector<std::string> Plan::paths(pybind11::list groups, pybind11::dict state) {
  Indices missing, rest;
  walk(groups.ptr(), state.ptr(), false, {}, {}, &missing, &rest);
  can_recall_ = false;
  std::vector<std::string> result;
  StateCursor cursor(state.ptr());
  uint32_t tensor = 0;
  const bool mode = c10::impl::TorchDispatchModeTLS::any_modes_set();
  for (const Group& group : groups_) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(group.params); ++i, ++tensor) {
      PyObject* object = PySequence_Fast_GET_ITEM(group.params, i);
      Path path = Path::kSubclass;
      if (mode) {
        path = Path::kMode;
      } else if (THPVariable_CheckExact(object)) {
        Operands operands;
        Task task;
        Entry entry;
        Sighting().see(object, cursor.find(object), state_names_, group.states_needed, &operands);
        path = batch_.look(operands, group, false, &task, &entry);
      }
      if (path == Path::kFused && contains(batch_.sharing(), tensor)) path = Path::kMemory;
      result.emplace_back(describe(path));
    }
  }
  return result;
}

}  // namespace trainopt::python
