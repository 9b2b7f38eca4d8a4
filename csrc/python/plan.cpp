#include "python/plan.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <utility>

#include "torch/cuda_device.h"
#include "torch/inspect.h"

namespace trainopt::python {
namespace {

// Elements from which on the interpreter is let go during the step. Below, a step takes less than the milliseconds for
// which Python itself lets no other thread run, and keeping many tensors' memory would take a tenth of its time.
constexpr int64_t kStepReleaseElements = 1 << 21;
// How far ahead of the comparison memory is asked for, in parameters: a parameter's is as much as can be under way.
constexpr int64_t kSnapshotsAhead = 1;
// Parameters below which one thread compares them all before another has been woken.
constexpr int64_t kFewTensors = 64;

// While Python code is asked, another step of the optimizer makes a plan of its own.
class Running {
 public:
  explicit Running(bool* flag) : flag_(flag) { *flag_ = true; }
  ~Running() { *flag_ = false; }

 private:
  bool* flag_;
};

bool has_index(const Indices& ascending, int64_t index) {
  return !ascending.empty() && std::binary_search(ascending.begin(), ascending.end(), index);
}

void sort(Indices* indices) {
  std::sort(indices->begin(), indices->end());
  indices->erase(std::unique(indices->begin(), indices->end()), indices->end());
}

pybind11::object answer_of(const char* status, const Unfinished& unfinished = {}) {
  static PyStructSequence_Field fields[] = {{"status", nullptr},  {"missing", nullptr},  {"rest", nullptr},
                                            {"sharing", nullptr}, {"doubtful", nullptr}, {nullptr, nullptr}};
  static PyStructSequence_Desc description = {"trainopt._C.StepAnswer", "What Plan.step says: see csrc/python/plan.h",
                                              fields, 5};
  static PyTypeObject* const type = PyStructSequence_NewType(&description);
  auto answer = pybind11::reinterpret_steal<pybind11::object>(PyStructSequence_New(type));
  if (!answer) throw pybind11::error_already_set();
  PyStructSequence_SetItem(answer.ptr(), 0, PyUnicode_InternFromString(status));
  Py_ssize_t field = 1;
  for (const Indices* indices : {&unfinished.missing, &unfinished.rest, &unfinished.sharing, &unfinished.doubtful})
    PyStructSequence_SetItem(answer.ptr(), field++, pybind11::cast(*indices).release().ptr());
  return answer;
}

// A number that kernels read where it lies.
at::Tensor number_or_none(const char* name, const pybind11::object& object, at::ScalarType dtype = at::kFloat) {
  if (object.is_none()) return {};
  if (!THPVariable_Check(object.ptr()))
    throw pybind11::type_error(std::string(name) + " must be a tensor or None, not a " +
                               Py_TYPE(object.ptr())->tp_name);
  const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  TORCH_CHECK_VALUE((is_plain_cpu(impl) || is_plain_cuda(impl)) && tensor.scalar_type() == dtype &&
                        tensor.numel() == 1 && has_memory(impl),
                    name, " must be a ", dtype == at::kFloat ? "float32" : "float64",
                    " tensor of one element on the CPU or on a device of the parameters");
  return tensor;
}

}  // namespace

pybind11::object step_is_done() {
  static PyObject* const answer = answer_of("done").release().ptr();
  return pybind11::reinterpret_borrow<pybind11::object>(answer);
}

Plan::GroupForm::GroupForm(const Group& group)
    : count(PySequence_Fast_GET_SIZE(group.params)),
      states_needed(group.states_needed),
      numbers_needed(group.numbers_needed),
      noisy(group.noise != 0),
      cautious(group.cautious != 0),
      stats(group.stats != 0),
      precision(group.precision),
      differentiable(group.differentiable != 0),
      unreadable(group.unreadable != 0),
      clips(group.max_grad_norm != 0),
      clears_gradient(group.clear_gradient != 0) {
  for (const c10::TensorImpl* tensor : group.tensors)
    options.push_back(static_cast<const char*>(storage_of(tensor)->data()) +
                      tensor->storage_offset() * static_cast<int64_t>(tensor->dtype().itemsize()));
}

Plan::Plan(const std::string& rule, uint32_t first_tensor, std::vector<pybind11::str> checked, pybind11::object check)
    : rule_(rule_named(rule)),
      first_tensor_(first_tensor),
      checked_(std::move(checked)),
      check_(std::move(check)),
      batch_(rule_, first_tensor) {
  const auto name = [this](const std::string& text) {
    state_names_.push_back(pybind11::reinterpret_steal<pybind11::str>(PyUnicode_InternFromString(text.c_str())));
  };
  for (int s = 0; s < rule_.state_count; ++s) name(rule_.states[s]);
  name("ema");
  name("master");
  for (int s = 0; s < rule_.state_count; ++s) name(std::string(rule_.states[s]) + "_scale");
  name("step");
  for (int n = 0; n < rule_.number_count; ++n) name(rule_.numbers[n]);
}

// Has Python check the groups in which options are new, until there is none. What it raises of them is raised again by
// the next step, unless they have been changed.
void Plan::check_options(PyObject* groups) {
  if (check_.is_none()) return;
  try {
    // Meanwhile another thread may set an option again; but what sets one at every check is not followed for ever.
    for (int tries = 0; tries < 8 && is_plain_sequence(groups); ++tries) {
      const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(groups));
      can_recall_ = can_recall_ && count == groups_.size();
      groups_.resize(count);
      std::vector<pybind11::object> unchecked;
      for (size_t g = 0; g < count; ++g) {
        PyObject* dict = PySequence_Fast_GET_ITEM(groups, static_cast<Py_ssize_t>(g));
        if (is_plain_dict(dict) && !groups_[g].unchanged(dict) && groups_[g].note(dict, checked_, tries > 0))
          unchecked.push_back(pybind11::reinterpret_borrow<pybind11::object>(dict));
      }
      if (unchecked.empty()) return;
      const Running running(&is_running_);
      for (const pybind11::object& group : unchecked) check_(group);
    }
  } catch (...) {
    for (Group& group : groups_) group.forget_noted();
    throw;
  }
}

// Reads the groups. False where a container answers by code of its own.
bool Plan::refresh(PyObject* groups, PyObject* state) {
  if (!is_plain_sequence(groups) || !is_plain_dict(state)) return false;
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(groups));
  can_recall_ = can_recall_ && count == groups_.size();
  groups_.resize(count);
  for (size_t g = 0; g < count; ++g) {
    PyObject* dict = PySequence_Fast_GET_ITEM(groups, static_cast<Py_ssize_t>(g));
    if (!is_plain_dict(dict)) return can_recall_ = false;
    Group& group = groups_[g];
    // The list may be another object at the same address.
    if (!(group.unchanged(dict) ? is_plain_sequence(group.params) : group.refresh(dict, rule_)))
      return can_recall_ = false;
  }
  return true;
}

bool Plan::lacks_states(const Operands& operands, const Group& group) const {
  const SlotSet average = 1u << rule_.slots().average();
  const SlotSet needed = states_of_one(static_cast<StateSet>(group.states_needed & (average - 1)), rule_.factors,
                                       static_cast<int64_t>(operands.sizes().size())) |
                         (group.states_needed & average);
  for (int s = 0; s <= rule_.slots().average(); ++s)
    if (contains(needed, s) && operands.states[s] == nullptr) return true;
  for (int n = 0; n < group.numbers_needed; ++n)
    if (operands.numbers[n] == nullptr) return true;
  const bool is_16_bit = operands.param->dtype().itemsize() == 2;
  if (group.has_master() && is_16_bit && operands.states[rule_.slots().master()] == nullptr) return true;
  const bool is_random = group.is_random(is_16_bit);
  if ((rule_.counts_steps || is_random || group.averages != 0) && operands.steps == nullptr) return true;
  // A float32 count stops at 2^24, and random numbers that are keyed by it would be the same from then on.
  return is_random && operands.steps->dtype() == caffe2::TypeMeta::Make<float>();
}

// Asks Python of the DTensors' specs that the walk has met for the first time. Whether there were any.
bool Plan::learn() {
  const Running running(&is_running_);
  return specs_.learn();
}

// Looks at everything, as if there had been no step before.
Unfinished Plan::walk(PyObject* state, bool is_scaled, const Indices& new_states, const Indices& stepped) {
  const bool mode = c10::impl::TorchDispatchModeTLS::any_modes_set();
  bool can_recall = stepped.empty(), writes_any_gradient = false;
  can_recall_ = has_dtensors_ = false;  // until all is seen: there may be an error
  Unfinished found;
  batch_.clear();
  entries_.clear();
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(state, &position, &key, &value)) entries_.emplace_back(key, value);
  StateCursor cursor(entries_);
  forms_.resize(groups_.size());
  uint32_t tensor = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    forms_[g] = GroupForm(group);
    const Py_ssize_t count = forms_[g].count;
    const bool writes_gradient = group.writes_gradient(is_scaled);
    writes_any_gradient = writes_any_gradient || writes_gradient;
    bool host_knows = group.on_device[0].tensor == nullptr;
    bool is_doubted = false;
    if (snapshots_.size() < static_cast<size_t>(tensor + count)) snapshots_.resize(tensor + count);
    places_.resize(tensor + count);
    for (Py_ssize_t i = 0; i < count; ++i, ++tensor) {
      PyObject* object = PySequence_Fast_GET_ITEM(group.params, i);
      Snapshot& snapshot = snapshots_[tensor];
      const bool is_known = THPVariable_CheckExact(object) || is_dtensor(object);
      snapshot.set_idle(object);
      places_[tensor] = {object, nullptr, false};
      if (is_known && gradient_of(impl_of(object)) == nullptr) {
        cursor.pass(object);
        continue;
      }
      PyObject* param_state = cursor.find(object);
      places_[tensor] = {object, param_state, true};
      if (has_index(stepped, tensor)) continue;
      for (const c10::TensorImpl* option : group.tensors) batch_.note_read(option, tensor);
      Operands operands;
      const bool is_tensor = THPVariable_Check(object);
      const bool is_stepped =
          is_tensor && snapshot.see(object, param_state, state_names_, rule_, group.slots(rule_), &specs_, &operands);
      if (!is_stepped || mode) {
        if (is_tensor) batch_.note_operands(operands, tensor, writes_gradient);
        snapshot.set_idle(object);
        found.rest.push_back(tensor);
        continue;
      }
      has_dtensors_ = has_dtensors_ || operands.shard != nullptr;
      const bool has_host_numbers = operands.numbers[0] != nullptr && is_plain_cpu(operands.numbers[0]);
      if (!host_knows && (has_host_numbers || !is_plain_cuda(operands.param))) {
        group.read_device_numbers(rule_);
        host_knows = true;
      }
      const bool lacks = lacks_states(operands, group);
      const Path path = lacks ? batch_.announce(operands, group, tensor, writes_gradient)
                              : batch_.add(operands, &group, tensor, has_index(new_states, tensor), writes_gradient);
      if (path == Path::kNoMemory || path == Path::kPending) {
        found.refuse(tensor, path);
      } else if (path != Path::kFused) {
        found.rest.push_back(tensor);
        if (path == Path::kStateValue || (path == Path::kOptions && !is_doubted)) found.doubtful.push_back(tensor);
        is_doubted = is_doubted || path == Path::kOptions;
      } else if (lacks) {
        found.missing.push_back(tensor);
      } else {
        can_recall = snapshot.note(operands, writes_gradient, batch_) && can_recall;
      }
    }
  }
  snapshots_.resize(tensor);
  found.sharing = batch_.sharing();
  if (!found.sharing.empty()) {
    found.rest.insert(found.rest.end(), found.sharing.begin(), found.sharing.end());
    sort(&found.rest);
    const auto shares = [&](int64_t index) { return has_index(found.sharing, index); };
    found.missing.erase(std::remove_if(found.missing.begin(), found.missing.end(), shares), found.missing.end());
  }
  if (rule_.sums_over_all && (!found.rest.empty() || !batch_.is_in_one_place())) {
    // All go one way, in one step.
    found.rest.clear();
    for (uint32_t i = 0; i < tensor; ++i)
      if (places_[i].has_gradient && !has_index(stepped, i)) found.rest.push_back(i);
    found.missing.clear();
    found.sharing.clear();
  }
  // Of a DTensor, the whole's gradient is written to as well, which no snapshot knows.
  can_recall_ = can_recall && found.empty() && !found.refused && !(writes_any_gradient && has_dtensors_);
  is_scaled_ = is_scaled;
  return found;
}

// Whether the groups hold the parameters of the last step, with the same states and the same kinds of options.
bool Plan::same_places(PyObject* state) const {
  Py_ssize_t position = 0;
  PyObject *key, *value;
  if (PyDict_GET_SIZE(state) != static_cast<Py_ssize_t>(entries_.size())) return false;
  for (const auto& entry : entries_)
    if (!PyDict_Next(state, &position, &key, &value) || key != entry.first || value != entry.second) return false;
  const Place* place = places_.data();
  for (size_t g = 0; g < groups_.size(); ++g) {
    const Group& group = groups_[g];
    if (!(GroupForm(group) == forms_[g])) return false;
    if (group.on_device[0].tensor != nullptr && batch_.host_must_know()) return false;
    for (Py_ssize_t i = 0; i < forms_[g].count; ++i, ++place)
      if (PySequence_Fast_GET_ITEM(group.params, i) != place->object) return false;
  }
  return true;
}

// Whether the batch of the last step is this step's too, but for the gradients' memory and the counts.
bool Plan::recall(PyObject* state, bool* all_next) {
  if (!can_recall_ || c10::impl::TorchDispatchModeTLS::any_modes_set() || !same_places(state)) return false;
  if (has_dtensors_)
    for (Snapshot& snapshot : snapshots_)
      if (!snapshot.unwrap()) return false;
  const int64_t count = static_cast<int64_t>(snapshots_.size());
  // A step on devices wakes no other thread: where the cores are busy, as by those that load data, it comes too late.
  const int64_t parts =
      count < kFewTensors || batch_.lies_on_devices() ? 1 : threads_for(batch_.elements + kTensorElements * count);
  std::atomic<bool> all_hold = true, all_are_next = true;
  const auto compare = [&](int64_t first_part, int64_t last_part) {
    const int64_t first = count * first_part / parts, last = count * last_part / parts;
    bool hold = true, are_next = true;
    for (int64_t i = first; hold && i < last; ++i) {
      if (i + kSnapshotsAhead < last) snapshots_[i + kSnapshotsAhead].prefetch();
      hold = snapshots_[i].matches(batch_, &are_next);
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
  const auto looks = [](const Group& group) { return group.skip_nonfinite != 0 || group.max_grad_norm != 0; };
  const auto stands_still = [](const Group& group) {
    return group.lr == 0 && group.unreadable == 0 && group.on_device[0].tensor == nullptr;
  };
  return std::any_of(groups_.begin(), groups_.end(), looks) ||
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

pybind11::object Plan::step(const pybind11::object& groups, const pybind11::object& state, double gradient_scale,
                            Indices new_states, Indices stepped, const pybind11::object& device_scale,
                            const pybind11::object& found_inf, const pybind11::object& gradient_norm,
                            bool gradients_seen) {
  // Two threads in one optimizer's step race for its values, as with any in-place operation, but not for the plan.
  if (is_running_)
    return Plan(rule_.name, first_tensor_, checked_, check_)
        .step(groups, state, gradient_scale, new_states, stepped, device_scale, found_inf, gradient_norm,
              gradients_seen);
  const bool norm_is_tensor = THPVariable_Check(gradient_norm.ptr());
  const GradientScaling scaling{gradient_scale,
                                norm_is_tensor || gradient_norm.is_none() ? 0 : gradient_norm.cast<double>()};
  const DeviceScaling on_device{
      number_or_none("device_scale", device_scale),
      norm_is_tensor ? number_or_none("gradient_norm", gradient_norm, at::kDouble) : at::Tensor(),
      number_or_none("found_inf", found_inf)};
  const bool is_scaled = gradient_scale != 1 || on_device.gradient_scale.defined();
  bool all_next = false;
  batch_.forget_stats();
  sort(&new_states);
  sort(&stepped);
  check_options(groups.ptr());
  if (!refresh(groups.ptr(), state.ptr())) return answer_of("foreign containers");
  if (!gradients_seen && depends_on_gradients(state.ptr())) return answer_of("look at gradients");
  const bool is_recalled =
      is_scaled == is_scaled_ && new_states.empty() && stepped.empty() && recall(state.ptr(), &all_next);
  if (is_recalled) {
    if (!batch_.can_apply(on_device)) return answer_of("ask the host");
    check_capture();
    batch_.prepare_again(scaling, all_next, on_device);
  } else {
    const Unfinished unfinished = walk(state.ptr(), is_scaled, new_states, stepped);
    if (learn())
      return step(groups, state, gradient_scale, new_states, stepped, device_scale, found_inf, gradient_norm,
                  gradients_seen);
    if (const auto& refused = unfinished.refused)
      TORCH_CHECK(false, "parameter ", refused->first, ": ", describe(refused->second));
    const bool can_recall = std::exchange(can_recall_, false);  // only what has been prepared
    if (!batch_.can_apply(on_device) || (on_device.exists() && !unfinished.rest.empty()))
      return answer_of("ask the host");
    check_capture();
    if (!unfinished.empty()) return answer_of("unfinished", unfinished);
    batch_.prepare(scaling, on_device);
    can_recall_ = can_recall;
  }
  // On a GPU's tensors the kernels run when this has returned.
  if (batch_.elements < kStepReleaseElements && !batch_.sums_over_shards()) {
    batch_.run();
  } else {
    run_unlocked();
  }
  if (!is_recalled) specs_.forget_unused();
  return step_is_done();
}

// Another thread may drop a tensor, or give it other memory, while the interpreter is free, or other processes are
// asked for what their shards add to a sum. What the step writes beside elements is written before that: a version
// counter or a step count that goes with its tensor would be written to after its end. The memory of the elements stays
// until the step is done.
void Plan::run_unlocked() {
  is_running_ = true;
  const auto finish = [this](void*) {
    kept_.clear();
    kept_options_.clear();
    is_running_ = false;
  };
  const std::unique_ptr<void, decltype(finish)> finished(this, finish);
  const auto keep = [&](const c10::TensorImpl* tensor) { kept_.push_back(tensor->storage()); };
  for (const Snapshot& snapshot : snapshots_) snapshot.for_each_tensor(keep);
  for (const Group& group : groups_)
    for (const DeviceOption& option : group.on_device)
      if (option.tensor != nullptr) kept_options_.push_back(tensor_from(option.tensor));
  batch_.count();
  const pybind11::gil_scoped_release release;
  batch_.update([this](const auto&... sums) { specs_.add_shards(sums...); });
}

pybind11::list Plan::stats() const {
  pybind11::list found;
  if (is_running_) return found;  // another thread's step is writing them
  for (const auto& [tensor, stats, scale] : batch_.stats())
    found.append(pybind11::make_tuple(
        tensor, pybind11::make_tuple(std::sqrt(stats.gradient) / scale, std::sqrt(stats.param), std::sqrt(stats.update),
                                     stats.largest / scale, stats.nonfinite)));
  for (const aten::ToldOnDevice& told : batch_.stats_on_devices())
    for (size_t i = 0; i < told.tensors.size(); ++i)
      found.append(pybind11::make_tuple(told.tensors[i] - batch_.first_tensor(),
                                        wrap(told.rows.select(0, static_cast<int64_t>(i)))));
  return found;
}

std::optional<std::vector<double>> Plan::sums_over_all() const {
  if (is_running_) return std::nullopt;  // another thread's step is writing them
  const pybind11::gil_scoped_release release;
  return batch_.sums_over_all();
}

std::optional<std::vector<std::string>> Plan::paths(const pybind11::object& groups, const pybind11::object& state) {
  if (is_running_) return Plan(rule_.name, first_tensor_, checked_, check_).paths(groups, state);
  check_options(groups.ptr());
  can_recall_ = false;
  if (!refresh(groups.ptr(), state.ptr())) return std::nullopt;
  walk(state.ptr(), false, {}, {});
  can_recall_ = false;
  if (learn()) return paths(groups, state);
  std::vector<Path> found;
  std::optional<std::pair<c10::Device, bool>> place;  // of the first that is fused: where it lies, and its arithmetic
  bool are_together = true;
  StateCursor cursor(entries_);
  uint32_t tensor = 0;
  const bool mode = c10::impl::TorchDispatchModeTLS::any_modes_set();
  for (const Group& group : groups_) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(group.params); ++i, ++tensor) {
      PyObject* object = PySequence_Fast_GET_ITEM(group.params, i);
      Path path = Path::kSubclass;
      if (mode) {
        path = Path::kMode;
      } else if (THPVariable_Check(object)) {
        Operands operands;
        TensorTask task;
        Entry entry;
        if (Snapshot().see(object, cursor.find(object), state_names_, rule_, group.slots(rule_), &specs_, &operands))
          path = batch_.look(operands, group, group.writes_gradient(false), &task, &entry);
      }
      if (path == Path::kFused && has_index(batch_.sharing(), tensor)) path = Path::kMemory;
      found.push_back(path);
      if (path == Path::kFused) {
        const c10::TensorImpl* param = impl_of(is_dtensor(object) ? local_of(object) : object);
        const bool is_double = is_plain_cuda(param) && param->dtype() == caffe2::TypeMeta::Make<double>();
        if (!place) place.emplace(param->device(), is_double);
        are_together = are_together && *place == std::pair(param->device(), is_double);
      }
    }
  }
  if (learn()) return paths(groups, state);  // of DTensors without a gradient, which no walk looks into
  const auto is_fused = [](Path path) { return path == Path::kFused; };
  are_together = are_together && std::all_of(found.begin(), found.end(), is_fused);
  std::vector<std::string> result;
  for (const Path path : found)
    result.emplace_back(describe(is_fused(path) && rule_.sums_over_all && !are_together ? Path::kTogether : path));
  return result;
}

}  // namespace trainopt::python
