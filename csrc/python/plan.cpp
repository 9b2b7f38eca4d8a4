#include "python/plan.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>

#include "python/tensors.h"

namespace trainopt::python {
namespace {

// Blocks that a thread should at least have to do: less is not worth waking it.
constexpr int64_t kGrainBlocks = 48;
// From as many blocks on the work is shared out in pieces of so many.
constexpr int64_t kShareBlocks = 1 << 14;
constexpr int64_t kPieceBlocks = 1 << 7;
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

bool same_name(PyObject* key, const pybind11::str& name) {
  return key == name.ptr() || (PyUnicode_CheckExact(key) && PyUnicode_Compare(key, name.ptr()) == 0);
}

bool same_order_in_memory(const at::Tensor& a, const at::Tensor& b) {
  return (a.is_contiguous() && b.is_contiguous()) || a.strides() == b.strides();
}

bool is_dense(const at::Tensor& tensor) { return tensor.unsafeGetTensorImpl()->is_non_overlapping_and_dense(); }

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
    case Path::kMemory: return "memory that overlaps itself, or that another parameter or state shares";
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

// What the engine would do with one parameter. Fills `entry` for Path::kFused; `missing` says that states must be made.
Path Plan::look(const Group& group, PyObject* object, PyObject* param_state, bool writes_gradient, Entry* entry,
                bool* missing) {
  if (!THPVariable_CheckExact(object)) return Path::kSubclass;
  if (group.differentiable) return Path::kDifferentiable;
  const at::Tensor& param = THPVariable_Unpack(object);
  if (!is_plain_cpu(param.unsafeGetTensorImpl())) return Path::kDevice;
  DType dtype;
  if (!read_dtype(param.unsafeGetTensorImpl(), &dtype)) return Path::kDtype;
  if (!is_dense(param)) return Path::kMemory;
  entry->param = &param;
  entry->wide = dtype == DType::kFloat64;

  const at::Tensor& gradient = gradient_of(param);
  entry->gradient = &gradient;
  if (gradient.defined()) {
    DType gradient_dtype;
    if (!is_plain_cpu(gradient.unsafeGetTensorImpl()) ||
        !read_dtype(gradient.unsafeGetTensorImpl(), &gradient_dtype) || gradient.sizes() != param.sizes())
      return Path::kGradient;
    if (writes_gradient && !is_dense(gradient) && at::has_internal_overlap(gradient) != at::MemOverlap::No)
      return Path::kMemory;
  }

  const bool needs_steps = rule_->counts_steps || group.noise != 0;
  entry->steps = nullptr;
  for (const at::Tensor*& state : entry->state) state = nullptr;
  int found = 0;
  if (param_state != nullptr) {
    if (!PyDict_Check(param_state)) return Path::kStateForm;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(param_state, &position, &key, &value)) {
      int which = 0;
      while (which <= rule_->state_count && !same_name(key, state_names_[which])) ++which;
      const bool is_step = which == rule_->state_count;
      if (value == Py_None || which > rule_->state_count || (!is_step && which >= group.states_needed)) continue;
      if (!THPVariable_CheckExact(value)) return Path::kStateForm;
      const at::Tensor& state = THPVariable_Unpack(value);
      DType state_dtype;
      if (!is_plain_cpu(state.unsafeGetTensorImpl()) || !read_dtype(state.unsafeGetTensorImpl(), &state_dtype))
        return Path::kStateForm;
      if (is_step) {
        if (state.numel() != 1 || (state_dtype != DType::kFloat32 && state_dtype != DType::kFloat64))
          return Path::kStateForm;
        entry->steps = &state;
      } else {
        if (state.sizes() != param.sizes() || state.requires_grad()) return Path::kStateForm;
        if (!is_dense(state)) return Path::kMemory;
        entry->state[which] = &state;
        ++found;
      }
    }
  }
  *missing = found != group.states_needed || (needs_steps && entry->steps == nullptr);
  return Path::kFused;
}

void Plan::walk(PyObject* groups, PyObject* state, bool writes_gradient, const Indices& fresh, const Indices& torchs,
                Indices* missing, Indices* rest) {
  const bool mode = c10::impl::TorchDispatchModeTLS::any_modes_set();
  entries_.clear();
  written_.clear();
  groups_.resize(PyList_GET_SIZE(groups));
  StateCursor cursor(state);
  uint32_t tensor = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* dict = PyList_GET_ITEM(groups, g);
    if (!PyDict_Check(dict)) throw pybind11::type_error("a parameter group must be a dict");
    Group& group = groups_[g];
    group.refresh(dict, *rule_);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(group.params); ++i, ++tensor) {
      PyObject* object = PyList_GET_ITEM(group.params, i);
      if (THPVariable_CheckExact(object) && !gradient_of(THPVariable_Unpack(object)).defined()) {
        cursor.pass(object);
        continue;
      }
      PyObject* param_state = cursor.find(object);
      if (holds(torchs, tensor)) continue;
      Entry entry;
      bool is_missing = false;
      const Path path = mode ? Path::kMode : look(group, object, param_state, writes_gradient, &entry, &is_missing);
      if (path != Path::kFused) {
        rest->push_back(tensor);
        continue;
      }
      if (is_missing) {
        missing->push_back(tensor);
        continue;
      }
      entry.group = static_cast<int32_t>(g);
      entry.tensor = tensor;
      entry.first = holds(fresh, tensor);
      const auto writes = [&](const at::Tensor& t) {
        const char* begin = static_cast<const char*>(t.unsafeGetTensorImpl()->data());
        written_.push_back({begin, begin + t.unsafeGetTensorImpl()->numel() * t.element_size(), tensor});
      };
      writes(*entry.param);
      for (int s = 0; s < rule_->state_count; ++s)
        if (entry.state[s] != nullptr) writes(*entry.state[s]);
      entries_.push_back(entry);
    }
  }
  find_sharing();
  if (sharing_.empty()) return;
  const auto shares = [&](const Entry& entry) {
    return std::find(sharing_.begin(), sharing_.end(), entry.tensor) != sharing_.end();
  };
  for (const Entry& entry : entries_)
    if (shares(entry)) rest->push_back(entry.tensor);
  entries_.erase(std::remove_if(entries_.begin(), entries_.end(), shares), entries_.end());
  std::sort(rest->begin(), rest->end());
}

// Parameters that are written in the same place must be stepped one after the other, which is torch's way, not the
// engine's. The check sorts all written memory, so it is made only when that has moved since the last step.
void Plan::find_sharing() {
  const auto same = [](const Span& a, const Span& b) { return a.begin == b.begin && a.end == b.end; };
  if (std::equal(written_.begin(), written_.end(), written_before_.begin(), written_before_.end(), same)) return;
  written_before_ = written_;
  sharing_.clear();
  std::sort(written_.begin(), written_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const Span* last = nullptr;  // of the spans so far, the one that reaches furthest
  for (const Span& span : written_) {
    if (span.begin == span.end) continue;
    if (last != nullptr && span.begin < last->end) {
      sharing_.push_back(span.tensor);
      sharing_.push_back(last->tensor);
    }
    if (last == nullptr || span.end > last->end) last = &span;
  }
}

// Layouts of the task's tensors in one common order of elements: the parameter's order in memory, or the logical one.
// False if that takes more dimensions than the engine has.
bool Plan::arrange(const Entry& entry, bool logical_order, cpu::Task* task) {
  struct Operand {
    const at::Tensor* tensor;
    TensorView* view;
    std::vector<int64_t> strides;
  };
  std::vector<Operand> operands{{entry.param, &task->param, {}}, {entry.gradient, &task->gradient, {}}};
  for (int s = 0; s < rule_->state_count; ++s)
    if (entry.state[s] != nullptr) operands.push_back({entry.state[s], &task->state[s], {}});

  std::vector<int64_t> order(entry.param->dim());
  for (size_t d = 0; d < order.size(); ++d) order[d] = static_cast<int64_t>(d);
  if (!logical_order)
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return entry.param->stride(a) > entry.param->stride(b); });

  std::vector<int64_t> sizes;
  for (const int64_t d : order) {
    const int64_t size = entry.param->size(d);
    if (size == 1) continue;
    const bool joins = !sizes.empty() && std::all_of(operands.begin(), operands.end(), [&](const Operand& operand) {
      return operand.strides.back() == size * operand.tensor->stride(d);
    });
    if (joins) {
      sizes.back() *= size;
      for (Operand& operand : operands) operand.strides.back() = operand.tensor->stride(d);
    } else {
      sizes.push_back(size);
      for (Operand& operand : operands) operand.strides.push_back(operand.tensor->stride(d));
    }
  }
  if (sizes.size() > kMaxDims) return false;
  for (const Operand& operand : operands) {
    int64_t run = 1;
    bool dense = true;
    for (size_t d = sizes.size(); d-- > 0; run *= sizes[d]) dense = dense && operand.strides[d] == run;
    if (dense) continue;
    Layout layout{static_cast<int>(sizes.size()), {}, {}};
    std::copy(sizes.begin(), sizes.end(), layout.sizes);
    std::copy(operand.strides.begin(), operand.strides.end(), layout.strides);
    layouts_.push_back(layout);
    operand.view->layout = &layouts_.back();
  }
  return true;
}

// Counts the step of every entry and lays out the engine's work.
void Plan::build(double gradient_scale) {
  layouts_.clear();
  scalars_.clear();
  for (int wide = 0; wide < 2; ++wide) {
    tasks_[wide].clear();
    task_scalars_[wide].clear();
    starts_[wide].assign(1, 0);
  }
  struct {
    int32_t group = -1;
    double step = 0;
    bool first = false, wide = false;
  } last;
  for (const Entry& entry : entries_) {
    const Group& group = groups_[entry.group];
    double step = 0;
    if (entry.steps != nullptr) {
      bump_version(*entry.steps);
      void* count = writable(*entry.steps);
      step = entry.steps->scalar_type() == at::kDouble ? (*static_cast<double*>(count) += 1)
                                                       : (*static_cast<float*>(count) += 1);
    }
    const int64_t numel = entry.param->unsafeGetTensorImpl()->numel();
    if (numel == 0) continue;
    const bool first = entry.first || step == 1;
    if (last.group != entry.group || last.step != step || last.first != first || last.wide != entry.wide) {
      scalars_.push_back(group.scalars(*rule_, step, first, entry.wide, gradient_scale));
      last = {entry.group, step, first, entry.wide};
    }
    cpu::Task task;
    task.numel = numel;
    task.tensor = entry.tensor;
    task.step = static_cast<uint32_t>(step);
    const auto view = [&](const at::Tensor& tensor) {
      TensorView result;
      read_dtype(tensor.unsafeGetTensorImpl(), &result.dtype);
      result.data = writable(tensor);
      return result;
    };
    bool ordered = same_order_in_memory(*entry.param, *entry.gradient);
    bump_version(*entry.param);
    task.param = view(*entry.param);
    if (gradient_scale != 1) {
      bump_version(*entry.gradient);
      task.gradient = view(*entry.gradient);
    } else {
      read_dtype(entry.gradient->unsafeGetTensorImpl(), &task.gradient.dtype);
      task.gradient.data = const_cast<void*>(entry.gradient->const_data_ptr());
    }
    for (int s = 0; s < rule_->state_count; ++s) {
      if (entry.state[s] == nullptr) continue;
      bump_version(*entry.state[s]);
      task.state[s] = view(*entry.state[s]);
      ordered = ordered && same_order_in_memory(*entry.param, *entry.state[s]);
    }
    // Noise belongs to the logical element, whatever the memory format.
    const bool logical = group.noise != 0 && !entry.param->is_contiguous();
    if (!ordered || logical) arrange(entry, logical, &task);
    std::vector<int64_t>& starts = starts_[entry.wide];
    tasks_[entry.wide].push_back(task);
    task_scalars_[entry.wide].push_back(scalars_.size() - 1);
    starts.push_back(starts.back() + cpu::blocks_of(numel));
  }
  for (int wide = 0; wide < 2; ++wide)
    for (size_t t = 0; t < tasks_[wide].size(); ++t) tasks_[wide][t].scalars = &scalars_[task_scalars_[wide][t]];
}

void Plan::execute() {
  for (int wide = 0; wide < 2; ++wide) {
    if (tasks_[wide].empty()) continue;
    const cpu::Run run{tasks_[wide].data(), starts_[wide].data(), tasks_[wide].size(), rule_, wide == 1};
    const int64_t blocks = starts_[wide].back();
    if (blocks < kShareBlocks) {
      // A thread has the same blocks in every step, so that its cache does.
      at::parallel_for(0, blocks, kGrainBlocks, [&](int64_t first, int64_t last) { cpu::run_blocks(run, first, last); });
    } else {
      // More than caches hold: whoever is free takes the next piece, so that no core that is slow or busy is waited for.
      std::atomic<int64_t> next{0};
      at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
        for (int64_t first; (first = next.fetch_add(kPieceBlocks)) < blocks;)
          cpu::run_blocks(run, first, std::min(first + kPieceBlocks, blocks));
      });
    }
  }
}

pybind11::object Plan::step(pybind11::list groups, pybind11::dict state, double gradient_scale, const Indices& fresh,
                            const Indices& torchs) {
  Indices missing, rest;
  walk(groups.ptr(), state.ptr(), gradient_scale != 1, fresh, torchs, &missing, &rest);
  if (!missing.empty() || !rest.empty()) return pybind11::make_tuple(missing, rest);
  build(gradient_scale);
  int64_t elements = 0;
  for (const auto& starts : starts_) elements += starts.back() * cpu::kBlock;
  if (elements < kReleaseElements) {
    execute();
    return pybind11::none();
  }
  // Another thread may drop a tensor while the interpreter is free: its memory stays until the step is done.
  std::vector<at::Tensor> kept;
  kept.reserve(entries_.size() * (2 + rule_->state_count));
  for (const Entry& entry : entries_) {
    kept.push_back(*entry.param);
    kept.push_back(*entry.gradient);
    for (int s = 0; s < rule_->state_count; ++s)
      if (entry.state[s] != nullptr) kept.push_back(*entry.state[s]);
  }
  {
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
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(group.params); ++i, ++tensor) {
      PyObject* object = PyList_GET_ITEM(group.params, i);
      Entry entry;
      bool is_missing = false;
      Path path = mode ? Path::kMode : look(group, object, cursor.find(object), false, &entry, &is_missing);
      if (path == Path::kFused && std::find(sharing_.begin(), sharing_.end(), tensor) != sharing_.end())
        path = Path::kMemory;
      result.emplace_back(describe(path));
    }
  }
  return result;
}

}  // namespace trainopt::python
