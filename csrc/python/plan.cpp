#include "python/plan.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <memory>
#include <numeric>

#include "python/tensors.h"

namespace trainopt::python {
namespace {

// Elements that a thread should at least have to do: less is not worth waking it.
constexpr int64_t kGrainElements = 48 * 1024;
// Elements from which on the interpreter is let go during the step.
constexpr int64_t kReleaseElements = 1 << 17;

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

// Which of the names a key is, or their number. Keys are nearly always the very strings, interned; those of an
// unpickled state need not be.
int find_name(const std::vector<pybind11::str>& names, PyObject* key) {
  const int count = static_cast<int>(names.size());
  for (int i = 0; i < count; ++i)
    if (key == names[i].ptr()) return i;
  if (PyUnicode_CheckExact(key) && !PyUnicode_CHECK_INTERNED(key))
    for (int i = 0; i < count; ++i)
      if (PyUnicode_Compare(key, names[i].ptr()) == 0) return i;
  return count;
}

// As ==, for the few dimensions that there are.
bool are_equal(c10::IntArrayRef a, c10::IntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i]) return false;
  return true;
}

// Whether the elements of `tensor` lie in memory in the order of `param`'s.
bool same_order_in_memory(const at::Tensor& param, bool param_is_contiguous, const at::Tensor& tensor) {
  return (param_is_contiguous && tensor.is_contiguous()) || are_equal(param.strides(), tensor.strides());
}

const char* end_of(const TensorView& view, int64_t numel) {
  return static_cast<const char*>(view.data) + numel * size_of(view.dtype);
}

// Whether a gradient's memory, which may have gaps or repeat itself, is clear of a dense view's.
bool is_clear_of(const at::Tensor& gradient, const TensorView& gradient_view, const TensorView& view, int64_t numel) {
  const char* begin = static_cast<const char*>(gradient_view.data);
  const char* end = end_of(gradient_view, numel);
  if (!is_dense(gradient)) {
    const c10::Storage& storage = gradient.unsafeGetTensorImpl()->unsafe_storage();
    begin = static_cast<const char*>(storage.data());
    end = begin + storage.nbytes();
  }
  return end <= static_cast<const char*>(view.data) || end_of(view, numel) <= begin;
}

bool holds(const Indices& ascending, int64_t index) {
  return !ascending.empty() && std::binary_search(ascending.begin(), ascending.end(), index);
}

const at::Tensor& gradient_of(const at::Tensor& param) { return param.unsafeGetTensorImpl()->grad(); }

}  // namespace

const char* describe(Path path) {
  switch (path) {
    case Path::kFused: return "";
    case Path::kSubclass: return "a tensor subclass, which may do its own thing with an in-place operation";
    case Path::kDifferentiable: return "differentiable=True";
    case Path::kDevice: return "not a plain dense CPU tensor";
    case Path::kDtype: return "not float32, float64, bfloat16 or float16";
    case Path::kGradient: return "a gradient that is sparse, lazily computed, or of another device, dtype or shape";
    case Path::kStateForm: return "a state of another device, layout or shape than the parameter";
    case Path::kMemory:
      return "memory that is not dense, that another parameter or state shares, or of over 8 dimensions";
    case Path::kMode: return "a torch dispatch mode is active";
  }
  return "";
}

Plan::Plan(const std::string& rule) : rule_(cpu::find_rule(rule.c_str())) {
  if (rule_ == nullptr) throw pybind11::value_error("there is no rule '" + rule + "'");
  for (int i = 0; i <= rule_->state_count; ++i) {
    PyObject* name = PyUnicode_InternFromString(i < rule_->state_count ? rule_->states[i] : "step");
    state_names_.push_back(pybind11::reinterpret_steal<pybind11::str>(name));
  }
}

// What the engine would do with one parameter. For Path::kFused it fills the task and the entry; `missing` says that
// states must be made first.
Path Plan::look(const Group& group, PyObject* object, PyObject* param_state, bool writes_gradient, cpu::Task* task,
                Entry* entry, bool* missing) {
  if (!THPVariable_CheckExact(object)) return Path::kSubclass;
  if (group.differentiable != 0) return Path::kDifferentiable;
  const at::Tensor& param = THPVariable_Unpack(object);
  if (!is_plain_cpu(param)) return Path::kDevice;
  if (!read_view(param, true, &task->param)) return Path::kDtype;
  const bool contiguous = param.is_contiguous();
  if (!contiguous && !is_dense(param)) return Path::kMemory;
  written_tensors_.push_back(param.unsafeGetTensorImpl());
  task->numel = param.unsafeGetTensorImpl()->numel();
  bool in_order = true;

  const at::Tensor& gradient = gradient_of(param);
  if (gradient.defined()) {
    if (!is_plain_cpu(gradient) || !read_view(gradient, writes_gradient, &task->gradient) ||
        !are_equal(gradient.sizes(), param.sizes()))
      return Path::kGradient;
    if (writes_gradient && !is_dense(gradient) && at::has_internal_overlap(gradient) != at::MemOverlap::No)
      return Path::kMemory;
    (writes_gradient ? written_tensors_ : read_tensors_).push_back(gradient.unsafeGetTensorImpl());
    in_order = same_order_in_memory(param, contiguous, gradient);
  }

  const bool needs_steps = rule_->counts_steps || group.noise != 0;
  const at::Tensor* states[kMaxStates] = {};
  for (TensorView& view : task->state) view.data = nullptr;
  entry->steps = nullptr;
  TensorView steps;
  int found = 0;
  if (param_state != nullptr) {
    if (!PyDict_Check(param_state)) return Path::kStateForm;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(param_state, &position, &key, &value)) {
      const int which = find_name(state_names_, key);
      const bool is_step = which == rule_->state_count;
      if (value == Py_None || which > rule_->state_count || (!is_step && which >= group.states_needed)) continue;
      if (!THPVariable_CheckExact(value)) return Path::kStateForm;
      const at::Tensor& state = THPVariable_Unpack(value);
      c10::TensorImpl* impl = state.unsafeGetTensorImpl();
      TensorView& view = is_step ? steps : task->state[which];
      if (!is_plain_cpu(state) || !read_view(state, true, &view)) return Path::kStateForm;
      if (is_step) {
        if (impl->numel() != 1 || size_of(view.dtype) == 2) return Path::kStateForm;
        entry->steps = view.data;
        entry->steps_are_double = view.dtype == DType::kFloat64;
      } else {
        if (impl->requires_grad() || !are_equal(state.sizes(), param.sizes())) return Path::kStateForm;
        const bool same_order = same_order_in_memory(param, contiguous, state);
        if (!same_order && !is_dense(state)) return Path::kMemory;
        in_order = in_order && same_order;
        states[which] = &state;
        ++found;
      }
      written_tensors_.push_back(impl);
    }
  }
  if (gradient.defined()) {
    bool clear = is_clear_of(gradient, task->gradient, task->param, task->numel);
    for (int s = 0; s < kMaxStates; ++s)
      if (states[s] != nullptr) clear = clear && is_clear_of(gradient, task->gradient, task->state[s], task->numel);
    if (!clear) return Path::kMemory;
  }
  *missing = found != group.states_needed || (needs_steps && entry->steps == nullptr);
  // Noise belongs to the logical element, whatever the memory format.
  const bool logical_order = group.noise != 0 && !contiguous;
  if (in_order && !logical_order) return Path::kFused;
  std::vector<std::pair<const at::Tensor*, TensorView*>> operands{{&param, &task->param}};
  if (gradient.defined()) operands.emplace_back(&gradient, &task->gradient);
  for (int s = 0; s < kMaxStates; ++s)
    if (states[s] != nullptr) operands.emplace_back(states[s], &task->state[s]);
  return arrange(param, operands, logical_order) ? Path::kFused : Path::kMemory;
}

// Gives the tensors layouts in one common order of elements: the parameter's order in memory, or the logical one. False
// if that takes more dimensions than the engine has.
bool Plan::arrange(const at::Tensor& param, const std::vector<std::pair<const at::Tensor*, TensorView*>>& operands,
                   bool logical_order) {
  std::vector<int64_t> order(param.dim());
  std::iota(order.begin(), order.end(), 0);
  if (!logical_order)
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return param.stride(a) > param.stride(b); });

  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> strides(operands.size());
  for (const int64_t d : order) {
    const int64_t size = param.size(d);
    if (size == 1) continue;
    bool joins = !sizes.empty();
    for (size_t i = 0; joins && i < operands.size(); ++i)
      joins = strides[i].back() == size * operands[i].first->stride(d);
    if (joins) {
      sizes.back() *= size;
      for (size_t i = 0; i < operands.size(); ++i) strides[i].back() = operands[i].first->stride(d);
    } else {
      sizes.push_back(size);
      for (size_t i = 0; i < operands.size(); ++i) strides[i].push_back(operands[i].first->stride(d));
    }
  }
  if (sizes.size() > kMaxDims) return false;
  for (size_t i = 0; i < operands.size(); ++i) {
    int64_t run = 1;
    bool dense = true;
    for (size_t d = sizes.size(); d-- > 0; run *= sizes[d]) dense = dense && strides[i][d] == run;
    if (dense) continue;
    Layout layout{static_cast<int>(sizes.size()), {}, {}};
    std::copy(sizes.begin(), sizes.end(), layout.sizes);
    std::copy(strides[i].begin(), strides[i].end(), layout.strides);
    layouts_.push_back(layout);
    operands[i].second->layout = &layouts_.back();
  }
  return true;
}

void Plan::walk(PyObject* groups, PyObject* state, bool writes_gradient, const Indices& fresh, const Indices& torchs,
                Indices* missing, Indices* rest) {
  const bool mode = c10::impl::TorchDispatchModeTLS::any_modes_set();
  entries_.clear();
  written_tensors_.clear();
  read_tensors_.clear();
  layouts_.clear();
  elements_ = 0;
  for (int wide = 0; wide < 2; ++wide) {
    tasks_[wide].clear();
    starts_[wide].assign(1, 0);
  }
  groups_.resize(PyList_GET_SIZE(groups));
  StateCursor cursor(state);
  uint32_t tensor = 0;
  size_t spans = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* dict = PyList_GET_ITEM(groups, g);
    if (!PyDict_Check(dict)) throw pybind11::type_error("a parameter group must be a dict");
    Group& group = groups_[g];
    group.refresh(dict, *rule_);
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(group.params);
    for (Py_ssize_t i = 0; i < count; ++i, ++tensor) {
      PyObject* object = PySequence_Fast_GET_ITEM(group.params, i);
      const bool is_tensor = THPVariable_CheckExact(object);
      if (is_tensor && !gradient_of(THPVariable_Unpack(object)).defined()) {
        cursor.pass(object);
        continue;
      }
      PyObject* param_state = cursor.find(object);
      if (holds(torchs, tensor)) continue;
      const bool wide = is_tensor && THPVariable_Unpack(object).scalar_type() == at::kDouble;
      cpu::Task& task = tasks_[wide].emplace_back();
      Entry& entry = entries_.emplace_back();
      bool is_missing = false;
      const Path path =
          mode ? Path::kMode : look(group, object, param_state, writes_gradient, &task, &entry, &is_missing);
      const auto writes = [&](const TensorView& view) {
        const char* begin = static_cast<const char*>(view.data);
        const char* end = end_of(view, task.numel);
        if (spans == written_.size()) written_.push_back({});
        Span& span = written_[spans++];
        if (span.begin == begin && span.end == end && span.tensor == tensor) return;
        span = {begin, end, tensor};
        sharing_is_known_ = false;
      };
      if (path != Path::kFused || is_missing) {
        if (path == Path::kFused) writes(task.param);
        (path == Path::kFused ? missing : rest)->push_back(tensor);
        tasks_[wide].pop_back();
        entries_.pop_back();
        continue;
      }
      entry.group = static_cast<int32_t>(g);
      entry.first = holds(fresh, tensor);
      entry.wide = wide;
      entry.task = static_cast<int64_t>(tasks_[wide].size()) - 1;
      if (task.numel == 0) {
        tasks_[wide].pop_back();
        entry.task = -1;
        continue;
      }
      writes(task.param);
      for (int s = 0; s < group.states_needed; ++s) writes(task.state[s]);
      if (writes_gradient) writes(task.gradient);
      task.tensor = tensor;
      elements_ += task.numel;
      starts_[wide].push_back(starts_[wide].back() + cpu::blocks_of(task.numel));
    }
  }
  if (!sharing_is_known_ || spans != written_.size()) {
    written_.resize(spans);
    find_sharing();
    sharing_is_known_ = true;
  }
  if (sharing_.empty()) return;
  for (const int64_t index : sharing_)
    if (!holds(torchs, index)) rest->push_back(index);
  std::sort(rest->begin(), rest->end());
  const auto shares = [&](int64_t index) { return holds(sharing_, index); };
  missing->erase(std::remove_if(missing->begin(), missing->end(), shares), missing->end());
}

// Parameters that are written in the same place must be stepped one after the other, which is torch's way, not the
// engine's. The check sorts all written memory, so it is made only when that has moved since the last step.
void Plan::find_sharing() {
  sharing_.clear();
  std::vector<Span> sorted = written_;
  std::sort(sorted.begin(), sorted.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t i = 1, furthest = 0; i < sorted.size(); ++i) {
    if (sorted[i].begin < sorted[furthest].end && sorted[i].begin != sorted[i].end) {
      sharing_.push_back(sorted[i].tensor);
      sharing_.push_back(sorted[furthest].tensor);
    }
    if (sorted[i].end > sorted[furthest].end) furthest = i;
  }
  std::sort(sharing_.begin(), sharing_.end());
  sharing_.erase(std::unique(sharing_.begin(), sharing_.end()), sharing_.end());
}

// From here on the step is certain: counts it, tells autograd, and gives every task its scalars.
void Plan::commit(double gradient_scale) {
  for (c10::TensorImpl* tensor : written_tensors_)
    if (!tensor->is_inference()) tensor->bump_version();
  scalars_.clear();
  for (std::vector<size_t>& indices : task_scalars_) indices.clear();
  const auto same_values = [&](int32_t a, int32_t b) { return a == b || groups_[a] == groups_[b]; };
  const Entry* last = nullptr;
  double last_step = 0;
  for (Entry& entry : entries_) {
    double step = 0;
    if (entry.steps != nullptr)
      step =
          entry.steps_are_double ? (*static_cast<double*>(entry.steps) += 1) : (*static_cast<float*>(entry.steps) += 1);
    if (entry.task < 0) continue;
    entry.first = entry.first || step == 1;
    if (last == nullptr || !same_values(last->group, entry.group) || last_step != step || last->first != entry.first ||
        last->wide != entry.wide) {
      scalars_.push_back(groups_[entry.group].scalars(*rule_, step, entry.first, entry.wide, gradient_scale));
      last = &entry;
      last_step = step;
    }
    tasks_[entry.wide][entry.task].step = static_cast<uint32_t>(step);
    task_scalars_[entry.wide].push_back(scalars_.size() - 1);
  }
  for (int wide = 0; wide < 2; ++wide)
    for (size_t t = 0; t < tasks_[wide].size(); ++t) tasks_[wide][t].scalars = &scalars_[task_scalars_[wide][t]];
}

void Plan::execute() {
  for (int wide = 0; wide < 2; ++wide) {
    if (tasks_[wide].empty()) continue;
    const cpu::Run run{tasks_[wide].data(), starts_[wide].data(), tasks_[wide].size(), rule_, wide == 1};
    const int64_t blocks = starts_[wide].back();
    if (elements_ < 2 * kGrainElements) {
      cpu::run_blocks(run, 0, blocks);
    } else {
      // Equal shares: a thread has the same blocks in every step, and so does its cache.
      const int64_t grain = std::max<int64_t>(blocks * kGrainElements / elements_, 1);
      at::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) { cpu::run_blocks(run, first, last); });
    }
  }
}

pybind11::object Plan::step(pybind11::list groups, pybind11::dict state, double gradient_scale, const Indices& fresh,
                            const Indices& torchs) {
  // Two threads in one optimizer's step race for its values, as with any in-place operation, but not for the plan.
  if (is_running_) return Plan(rule_->name).step(groups, state, gradient_scale, fresh, torchs);
  Indices missing, rest;
  walk(groups.ptr(), state.ptr(), gradient_scale != 1, fresh, torchs, &missing, &rest);
  if (!missing.empty() || !rest.empty()) return pybind11::make_tuple(missing, rest);
  commit(gradient_scale);
  if (elements_ < kReleaseElements) {
    execute();
    return pybind11::none();
  }
  // Another thread may drop a tensor, or give it other memory, while the interpreter is free: this memory stays until
  // the step is done.
  std::vector<c10::Storage> kept;
  kept.reserve(written_tensors_.size() + read_tensors_.size());
  for (const auto* tensors : {&written_tensors_, &read_tensors_})
    for (const c10::TensorImpl* tensor : *tensors) kept.push_back(tensor->storage());
  {
    is_running_ = true;
    const auto done = [this](void*) { is_running_ = false; };
    const std::unique_ptr<void, decltype(done)> running(this, done);
    pybind11::gil_scoped_release release;
    execute();
  }
  return pybind11::none();
}

std::vector<std::string> Plan::paths(pybind11::list groups, pybind11::dict state) {
  Indices missing, rest;
  walk(groups.ptr(), state.ptr(), false, {}, {}, &missing, &rest);
  std::vector<std::string> result;
  StateCursor cursor(state.ptr());
  uint32_t tensor = 0;
  const bool mode = c10::impl::TorchDispatchModeTLS::any_modes_set();
  for (const Group& group : groups_) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(group.params); ++i, ++tensor) {
      PyObject* object = PySequence_Fast_GET_ITEM(group.params, i);
      cpu::Task task;
      Entry entry;
      bool is_missing = false;
      Path path = mode ? Path::kMode : look(group, object, cursor.find(object), false, &task, &entry, &is_missing);
      if (path == Path::kFused && holds(sharing_, tensor)) path = Path::kMemory;
      result.emplace_back(describe(path));
    }
  }
  return result;
}

}  // namespace trainopt::python
