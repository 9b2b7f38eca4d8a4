#include "python/snapshot.h"

#include <torch/csrc/autograd/python_variable.h>

#include "core/code8.h"
#include "torch/inspect.h"

namespace trainopt::python {

const c10::TensorImpl* impl_of(PyObject* tensor) { return THPVariable_Unpack(tensor).unsafeGetTensorImpl(); }

namespace {

// Which of the names a key, a string, is, or their number. Keys are nearly always the very strings, interned; those of
// an unpickled state need not be.
int find_name(const std::vector<pybind11::str>& names, PyObject* key) {
  const int count = static_cast<int>(names.size());
  for (int i = 0; i < count; ++i)
    if (key == names[i].ptr()) return i;
  if (!PyUnicode_CHECK_INTERNED(key))
    for (int i = 0; i < count; ++i)
      if (PyUnicode_Compare(key, names[i].ptr()) == 0) return i;
  return count;
}

// Where a tensor's storage begins; a lazily copied one is given memory of its own if it is to be written.
TRAINOPT_FUNCTION const void* storage_data(const c10::TensorImpl* tensor, bool writes) {
  c10::StorageImpl* storage = storage_of(tensor);
  return writes ? storage->mutable_data() : storage->data();
}

SeenTensor seen(const c10::TensorImpl* tensor, bool writes) {
  return {tensor,
          storage_of(tensor),
          counter_of(tensor),
          storage_data(tensor, writes),
          storage_of(tensor)->nbytes(),
          tensor->storage_offset(),
          tensor->dtype()};
}

TRAINOPT_FUNCTION bool same_memory(const c10::TensorImpl* tensor, const SeenTensor& then, bool writes) {
  return storage_data(tensor, writes) == then.storage_data && storage_of(tensor)->nbytes() == then.storage_bytes &&
         tensor->storage_offset() == then.storage_offset;
}

// Whether the engines may take a tensor; of the same device as `param`, which they may take.
TRAINOPT_FUNCTION bool is_plain(const c10::TensorImpl* tensor) { return is_plain_cpu(tensor) || is_plain_cuda(tensor); }
TRAINOPT_FUNCTION bool is_plain_beside(const c10::TensorImpl* param, const c10::TensorImpl* tensor) {
  return is_plain_cpu(param) ? is_plain_cpu(tensor) : is_plain_cuda(tensor) && tensor->device() == param->device();
}

// Whether a tensor that the step writes is the one it was, of its type, with its memory and its version counter.
TRAINOPT_FUNCTION bool is_same(const c10::TensorImpl* tensor, const SeenTensor& then) {
  return tensor == then.impl && is_plain(tensor) && tensor->dtype() == then.dtype &&
         counter_of(tensor) == then.version && same_memory(tensor, then, true);
}

// Whether two tensors of a step have the same sizes, and their elements the same order in memory.
TRAINOPT_FUNCTION bool same_elements(const c10::TensorImpl* param, const c10::TensorImpl* tensor) {
  return are_equal(param->sizes(), tensor->sizes()) &&
         (are_equal(param->strides(), tensor->strides()) || same_order_in_memory(param, tensor));
}

void prefetch_line(const void* address) { __builtin_prefetch(address); }

// A tensor's metadata lies in three or four lines of the cache: the first and the last are asked for, and the first of
// its storage. To ask for all that is read took a seventh longer: there are only so many lines under way at one time.
void prefetch_tensor(const SeenTensor& tensor) {
  const char* impl = reinterpret_cast<const char*>(tensor.impl);
  prefetch_line(impl + 16);
  prefetch_line(impl + sizeof(c10::TensorImpl) - 32);
  prefetch_line(tensor.storage);
}

}  // namespace

inline bool Snapshot::is_in_dtensor(size_t i) const {
  const Role role = items_[i].role;
  return distributed_ != nullptr && role != Role::kCount && role != Role::kNumber && role != Role::kIgnored;
}

inline const c10::TensorImpl* Snapshot::tensor_of(size_t i) const {
  return is_in_dtensor(i) ? distributed_->items[i].local : impl_of(items_[i].value);
}

void Snapshot::set_idle(PyObject* param) {
  object_ = param;
  gradient_.impl = nullptr;
  distributed_ = nullptr;
}

// A DTensor is to be stepped as the tensor in it, if the gradient and the states lie as the parameter does.
bool Snapshot::see_param(PyObject* param, Specs* specs, Operands* operands) {
  operands->param = impl_of(param);
  operands->gradient = gradient_of(operands->param);
  if (THPVariable_CheckExact(param)) return true;
  const Leaf leaf = leaf_of(param, specs);
  if (leaf.local == nullptr) return false;
  distributed_ = std::make_unique<Distributed>();
  distributed_->param = {spec_of(param), counter_of(leaf.outer), leaf.local};
  operands->param = leaf.local;
  operands->shard = leaf.shard;
  operands->outers.push_back(leaf.outer);
  if (operands->gradient == nullptr) return true;
  PyObject* gradient = operands->gradient->pyobj_slot()->load_pyobj();
  const Leaf found = leaf_of(gradient, specs);
  operands->placements_match = have_same_placements(leaf, found);
  if (!operands->placements_match) return true;
  distributed_->gradient = {spec_of(gradient), nullptr, found.local};
  operands->gradient = found.local;
  operands->outer_gradient = found.outer;
  return true;
}

// Whether a state of a DTensor is spread as it must be: as the parameter is, and the scales of codes likewise, which
// are fewer. Every process has the averages over rows and columns whole.
bool Snapshot::lies_as_it_should(const Leaf& leaf, Role role, const Operands& operands) {
  if (leaf.shard == nullptr) return false;
  if (role == Role::kState) return have_same_placements({nullptr, operands.outers[0], operands.shard}, leaf);
  return role == Role::kScale ? leaf.shard->kind == operands.shard->kind : leaf.shard->is_replica();
}

// The tensor in a value of the state dict, whose item is the next; null if the engine does not take it.
const c10::TensorImpl* Snapshot::see_state(PyObject* value, Role role, Specs* specs, Operands* operands) {
  operands->states_are_known = THPVariable_Check(value);
  const bool is_plain = role == Role::kCount || role == Role::kNumber;
  if (distributed_ == nullptr || is_plain) {
    operands->states_are_tensors = THPVariable_CheckExact(value);
    return operands->states_are_tensors ? impl_of(value) : nullptr;
  }
  const Leaf leaf = leaf_of(value, specs);
  operands->placements_match = operands->placements_match && lies_as_it_should(leaf, role, *operands);
  operands->states_are_tensors = leaf.local != nullptr && !leaf.outer->requires_grad();
  if (!operands->states_are_tensors) return nullptr;
  distributed_->items.resize(items_.size() + 1);
  distributed_->items.back() = {spec_of(value), counter_of(leaf.outer), leaf.local};
  operands->outers.push_back(leaf.outer);
  return leaf.local;
}

bool Snapshot::see(PyObject* param, PyObject* state, const std::vector<pybind11::str>& names, const cpu::Rule& rule,
                   SlotSet wanted, Specs* specs, Operands* operands) {
  set_idle(param);
  state_ = state;
  items_.clear();
  const bool is_known = see_param(param, specs, operands);
  if (state == nullptr) return is_known;
  operands->states_are_tensors = is_plain_dict(state);
  if (!operands->states_are_tensors) return is_known;
  const int count_name = rule.slots().count(), first_scale = rule.slots().scale(0);
  const int past_names = static_cast<int>(names.size());
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(state, &position, &key, &value)) {
    operands->states_are_tensors = PyUnicode_CheckExact(key);  // else a key that may equal any
    if (!operands->states_are_tensors) break;
    const int name = find_name(names, key);
    Role role = Role::kIgnored;
    const bool is_of_one = name >= count_name && name < past_names;
    if (value != Py_None && (is_of_one || (name < count_name && contains(wanted, name)))) {
      role = name > count_name                ? Role::kNumber
             : name == count_name             ? Role::kCount
             : name >= first_scale            ? Role::kScale
             : !contains(rule.factors, name)  ? Role::kState
             : name == first_of(rule.factors) ? Role::kRows
                                              : Role::kColumns;
      const c10::TensorImpl* tensor = see_state(value, role, specs, operands);
      if (tensor == nullptr) break;
      (name > count_name    ? operands->numbers[name - count_name - 1]
       : name == count_name ? operands->steps
                            : operands->states[name]) = tensor;
    }
    items_.push_back({pybind11::reinterpret_borrow<pybind11::object>(key), value, role, {}});
  }
  if (distributed_ != nullptr) distributed_->items.resize(items_.size());
  return is_known;
}

bool Snapshot::note(const Operands& operands, bool writes_gradient, Batch& batch) {
  entry_ = static_cast<int64_t>(batch.entries.size()) - 1;
  param_ = seen(operands.param, true);
  gradient_is_written_ = writes_gradient;
  gradient_ = seen(operands.gradient, writes_gradient);
  meta_ = autograd_meta_of(operands.param);
  numel_ = operands.param->numel();
  contiguous_ = operands.param->is_contiguous();
  // Else it was made in inference mode, and may be written to only there.
  bool is_counted = param_.version != nullptr && (!writes_gradient || gradient_.version != nullptr);
  for (size_t i = 0; i < items_.size(); ++i) {
    if (items_[i].role == Role::kIgnored) continue;
    items_[i].tensor = seen(tensor_of(i), true);
    is_counted = is_counted && items_[i].tensor.version != nullptr;
  }
  for (const c10::TensorImpl* outer : operands.outers) is_counted = is_counted && counter_of(outer) != nullptr;
  if (!is_counted) return false;
  const TensorTask* task = batch.task_of(batch.entries.back());
  if (task == nullptr) return true;
  bool is_simple = task->param.layout == nullptr && task->gradient.layout == nullptr;
  for (const TensorView& state : task->state)
    is_simple = is_simple && (state.data == nullptr || state.layout == nullptr);
  return is_simple;
}

void Snapshot::prefetch() const {
  prefetch_line(object_);
  prefetch_line(state_);
  prefetch_tensor(param_);
  prefetch_tensor(gradient_);
  if (meta_ != nullptr) prefetch_line(&meta_->grad_);
  for (const Item& item : items_) {
    prefetch_line(item.value);
    prefetch_tensor(item.tensor);
  }
}

// Only types, slots and counters are looked at, and the specs' addresses, which `Specs` keeps for them.
bool Snapshot::look_into_dtensors() {
  const auto look = [](PyObject* object, Outer* outer) {
    if (!is_dtensor(object) || spec_of(object) != outer->spec) return false;
    if (outer->version != nullptr && counter_of(impl_of(object)) != outer->version) return false;
    PyObject* local = local_of(object);
    if (local == nullptr || !THPVariable_CheckExact(local)) return false;
    outer->local = impl_of(local);
    return true;
  };
  if (!look(object_, &distributed_->param)) return false;
  const c10::TensorImpl* gradient = gradient_of(impl_of(object_));
  if (gradient == nullptr || !look(gradient->pyobj_slot()->load_pyobj(), &distributed_->gradient)) return false;
  if (state_ == nullptr) return true;
  if (!is_plain_dict(state_) || PyDict_GET_SIZE(state_) != static_cast<Py_ssize_t>(items_.size())) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (size_t i = 0; i < items_.size(); ++i)
    if (!PyDict_Next(state_, &position, &key, &value) || value != items_[i].value ||
        (is_in_dtensor(i) && !look(value, &distributed_->items[i])))
      return false;
  return true;
}

// All that it calls is made a part of it: the calls themselves were 6 % of a step of a thousand small tensors.
[[gnu::flatten]] bool Snapshot::matches(Batch& batch, bool* all_next) {
  const c10::TensorImpl *param, *gradient;
  if (distributed_ != nullptr) {
    param = distributed_->param.local;
    gradient = distributed_->gradient.local;
  } else {
    if (!THPVariable_CheckExact(object_) && (has_gradient() || !is_dtensor(object_))) return false;
    param = impl_of(object_);
    gradient = gradient_of(param);
  }
  if (gradient == nullptr || !has_gradient()) return gradient == gradient_.impl;
  Entry& entry = batch.entries[entry_];
  return is_same(param, param_) && param->numel() == numel_ && param->is_contiguous() == contiguous_ &&
         param->is_non_overlapping_and_dense() && gradient_matches(param, gradient, batch, entry) &&
         items_match(param, entry, all_next);
}

bool Snapshot::gradient_matches(const c10::TensorImpl* param, const c10::TensorImpl* gradient, Batch& batch,
                                Entry& entry) {
  if (!is_plain_beside(param, gradient) || gradient->dtype() != gradient_.dtype || !same_elements(param, gradient))
    return false;
  if (gradient_is_written_) {
    if (!gradient->is_non_overlapping_and_dense() || counter_of(gradient) == nullptr) return false;
    entry.written[kGradientCounter] = counter_of(gradient);
  }
  if (same_memory(gradient, gradient_, gradient_is_written_)) {
    gradient_.impl = gradient;  // what the step reads, of whichever tensor
    return true;
  }
  if (gradient_is_written_) return false;  // another one's may have moved to the same place
  gradient_ = seen(gradient, false);
  const TensorTask* task = batch.task_of(entry);
  if (task == nullptr) return true;
  if (!has_memory(gradient) || !batch.is_clear(gradient)) return false;
  batch.set_gradient(entry, data_of(gradient, task->gradient.dtype, false));
  return true;
}

bool Snapshot::items_match(const c10::TensorImpl* param, Entry& entry, bool* all_next) const {
  if (state_ == nullptr) return true;
  if (!is_plain_dict(state_) || PyDict_GET_SIZE(state_) != static_cast<Py_ssize_t>(items_.size())) return false;
  const c10::IntArrayRef whole = impl_of(object_)->sizes();
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (size_t i = 0; i < items_.size(); ++i) {
    const Item& item = items_[i];
    if (!PyDict_Next(state_, &position, &key, &value) || key != item.key.ptr() || value != item.value) return false;
    if (item.role == Role::kIgnored) continue;
    if (!is_in_dtensor(i) && !THPVariable_CheckExact(value)) return false;
    const c10::TensorImpl* tensor = tensor_of(i);
    if (!is_same(tensor, item.tensor)) return false;
    if (item.role == Role::kState) {
      if (requires_grad(tensor) || !same_elements(param, tensor)) return false;
    } else if (item.role == Role::kRows || item.role == Role::kColumns) {
      const bool has_shape = tensor->numel() == 0 || is_factor_of(whole, tensor, item.role == Role::kRows);
      if (requires_grad(tensor) || !has_shape) return false;
    } else if (item.role == Role::kScale) {
      if (tensor->numel() != scales_of(param->numel()) || !tensor->is_contiguous()) return false;
    } else if (item.role == Role::kNumber) {
      if (tensor->numel() != 1) return false;
      *all_next = *all_next && !entry.numbers.on_host;
    } else {
      if (tensor->numel() != 1) return false;
      if (entry.steps == nullptr) continue;  // a CUDA device counts
      if (!entry.recount()) *all_next = false;
      if (!(entry.step >= 1)) return false;
    }
  }
  if (entry.numbers.on_host) entry.numbers.read();
  return true;
}

}  // namespace trainopt::python
