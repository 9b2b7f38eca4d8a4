#include "python/sighting.h"

#include <torch/csrc/autograd/python_variable.h>

#include "python/tensors.h"

namespace trainopt::python {
namespace {

const c10::TensorImpl* impl_of(PyObject* tensor) { return THPVariable_Unpack(tensor).unsafeGetTensorImpl(); }

// Null if there is none.
const c10::TensorImpl* gradient_of(const c10::TensorImpl* param) {
  const auto* meta =
      static_cast<const torch::autograd::AutogradMeta*>(const_cast<c10::TensorImpl*>(param)->autograd_meta());
  return meta != nullptr && meta->grad_.defined() ? meta->grad_.unsafeGetTensorImpl() : nullptr;
}

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

const void* memory_of(const c10::TensorImpl* tensor, bool writes) {
  c10::StorageImpl* storage = storage_of(tensor);
  return static_cast<const char*>(writes ? storage->mutable_data() : storage->data()) +
         tensor->storage_offset() * static_cast<int64_t>(tensor->dtype().itemsize());
}

SeenTensor seen(const c10::TensorImpl* tensor, const void* data) {
  return {tensor, storage_of(tensor), counter_of(tensor), data, tensor->dtype()};
}

// Whether a tensor that the step writes is the one it was, of its type, with its memory and its version counter.
bool is_same(const c10::TensorImpl* tensor, const SeenTensor& then) {
  return tensor == then.impl && is_plain_cpu(tensor) && tensor->dtype() == then.dtype &&
         counter_of(tensor) == then.version && memory_of(tensor, true) == then.data;
}

bool same_elements(const c10::TensorImpl* param, const c10::TensorImpl* tensor) {
  return are_equal(param->sizes(), tensor->sizes()) && same_order_in_memory(param, tensor);
}

// A tensor's metadata lies in up to four lines of the cache, its storage's in two.
void prefetch_lines(const void* address, int lines) {
  for (int line = 0; line < lines; ++line) __builtin_prefetch(static_cast<const char*>(address) + 64 * line);
}

void prefetch_tensor(const SeenTensor& tensor) {
  prefetch_lines(tensor.impl, 4);
  prefetch_lines(tensor.storage, 2);
  prefetch_lines(tensor.version, 1);
}

}  // namespace

bool has_gradient(PyObject* param) { return gradient_of(impl_of(param)) != nullptr; }

void Sighting::see_idle(PyObject* param) {
  object_ = param;
  gradient_.impl = nullptr;
}

bool Sighting::see(PyObject* param, PyObject* state, const std::vector<pybind11::str>& names, int64_t states_needed,
                   Operands* operands) {
  object_ = param;
  state_ = state;
  item_count_ = 0;
  operands->param = impl_of(param);
  operands->gradient = gradient_of(operands->param);
  if (state == nullptr) return true;
  if (!PyDict_Check(state)) return operands->states_are_tensors = false;
  const int step_name = static_cast<int>(names.size()) - 1;
  bool comparable = true;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(state, &position, &key, &value)) {
    int name = find_name(names, key);
    if (value == Py_None || name > step_name || (name < step_name && name >= states_needed)) {
      name = kIgnored;
    } else if (!THPVariable_CheckExact(value)) {
      return operands->states_are_tensors = false;
    } else {
      (name == step_name ? operands->steps : operands->states[name]) = impl_of(value);
    }
    if (item_count_ == kMaxItems) {
      comparable = false;
      continue;
    }
    Item& item = items_[item_count_++];
    item.key = pybind11::reinterpret_borrow<pybind11::object>(key);
    item.value = value;
    item.name = name;
  }
  return comparable;
}

bool Sighting::note(const Operands& operands, const Batch& batch) {
  entry_ = static_cast<int64_t>(batch.entries.size()) - 1;
  const Entry& entry = batch.entries.back();
  const cpu::Task* task = entry.task < 0 ? nullptr : &batch.tasks[entry.wide][entry.task];
  param_ = seen(operands.param, memory_of(operands.param, true));
  gradient_ = seen(operands.gradient, memory_of(operands.gradient, false));
  meta_ = const_cast<c10::TensorImpl*>(operands.param)->autograd_meta();
  numel_ = operands.param->numel();
  contiguous_ = operands.param->is_contiguous();
  bool comparable = task != nullptr && task->param.layout == nullptr && task->gradient.layout == nullptr;
  for (int i = 0; i < item_count_; ++i) {
    Item& item = items_[i];
    if (item.name == kIgnored) continue;
    const c10::TensorImpl* tensor = impl_of(item.value);
    item.tensor = seen(tensor, memory_of(tensor, true));
    if (tensor != operands.steps) comparable = comparable && task->state[item.name].layout == nullptr;
  }
  return comparable;
}

void Sighting::prefetch() const {
  prefetch_lines(object_, 1);
  prefetch_lines(state_, 1);
  prefetch_tensor(param_);
  prefetch_tensor(gradient_);
  if (meta_ != nullptr) prefetch_lines(&static_cast<const torch::autograd::AutogradMeta*>(meta_)->grad_, 1);
  for (int i = 0; i < item_count_; ++i) {
    if (items_[i].name == kIgnored) continue;
    prefetch_lines(items_[i].value, 1);
    prefetch_tensor(items_[i].tensor);
  }
}

bool Sighting::still_holds(Batch& batch) {
  if (!THPVariable_CheckExact(object_)) return false;
  const c10::TensorImpl* param = impl_of(object_);
  const c10::TensorImpl* gradient = gradient_of(param);
  if (gradient == nullptr || !has_gradient()) return gradient == gradient_.impl;
  Entry& entry = batch.entries[entry_];
  entry.first = false;
  return is_same(param, param_) && param->numel() == numel_ && param->is_contiguous() == contiguous_ &&
         param->is_non_overlapping_and_dense() &&
         gradient_holds(param, gradient, batch.tasks[entry.wide][entry.task]) && items_hold(param, entry);
}

bool Sighting::gradient_holds(const c10::TensorImpl* param, const c10::TensorImpl* gradient, cpu::Task& task) {
  if (!is_plain_cpu(gradient) || gradient->dtype() != gradient_.dtype || !same_elements(param, gradient)) return false;
  const void* data = memory_of(gradient, false);
  if (gradient != gradient_.impl) gradient_ = seen(gradient, data);
  if (data == task.gradient.data) return true;
  task.gradient.data = const_cast<void*>(data);
  bool clear = is_clear_of(gradient, task.gradient, task.param, numel_);
  for (const TensorView& state : task.state)
    clear = clear && (state.data == nullptr || is_clear_of(gradient, task.gradient, state, numel_));
  return clear;
}

bool Sighting::items_hold(const c10::TensorImpl* param, Entry& entry) const {
  if (state_ == nullptr) return true;
  if (!PyDict_Check(state_) || PyDict_GET_SIZE(state_) != item_count_) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (int i = 0; i < item_count_; ++i) {
    const Item& item = items_[i];
    if (!PyDict_Next(state_, &position, &key, &value) || key != item.key.ptr() || value != item.value) return false;
    if (item.name == kIgnored) continue;
    if (!THPVariable_CheckExact(value)) return false;
    const c10::TensorImpl* tensor = impl_of(value);
    if (!is_same(tensor, item.tensor)) return false;
    if (item.tensor.data == entry.steps) {
      if (tensor->numel() != 1) return false;
      entry.step = next_count(entry.steps, entry.steps_are_double);
    } else if (tensor->requires_grad() || !same_elements(param, tensor)) {
      return false;
    }
  }
  return true;
}

}  // namespace trainopt::python
