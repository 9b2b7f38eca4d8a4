// A parameter, its gradient and its states as a step met them, for the next step to compare with what is there then.
#pragma once

#include <c10/core/TensorImpl.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "python/distributed.h"
#include "python/group.h"
#include "torch/optim/batch.h"

namespace trainopt::python {

// Addresses are compared, or asked for ahead of time; nothing is read through one before the present has confirmed it.
struct SeenTensor {
  const c10::TensorImpl* impl = nullptr;
  const c10::StorageImpl* storage = nullptr;
  const VersionCounter* version = nullptr;
  const void* storage_data = nullptr;
  size_t storage_bytes = 0;
  int64_t storage_offset = 0;  // in elements
  caffe2::TypeMeta dtype;
};

// Of a tensor of Python's, whatever its class.
const c10::TensorImpl* impl_of(PyObject* tensor);

class Snapshot {
 public:
  // A parameter that takes no part in the step.
  void set_idle(PyObject* param);

  // Unpacks a parameter, a tensor. `names` are those of the rule's slots, then "step", then those of its numbers; of
  // the slots `wanted` count. False if the parameter is of a class that the engine knows nothing of; then its own
  // tensors are unpacked all the same.
  bool see(PyObject* param, PyObject* state, const std::vector<pybind11::str>& names, const cpu::Rule& rule,
           SlotSet wanted, Specs* specs, Operands* operands);

  // Notes where the memory is, once the batch has taken the parameter as its last entry. False if the next step cannot
  // be compared with this one.
  bool note(const Operands& operands, bool writes_gradient, Batch& batch);

  // To be called before `matches`, by one thread: looks into DTensors. False if they are not those that were noted.
  bool unwrap() { return distributed_ == nullptr || look_into_dtensors(); }

  // Whether everything that a step asks of these objects has the same answer as when they were noted, but for the
  // gradient's memory, which is put into the task, and the count of steps and the numbers, which are put into the
  // entry; `all_next` turns false if that is not the next one, or the host has numbers. Touches no reference count:
  // several threads may ask at once, each for its own, while the caller holds the interpreter.
  bool matches(Batch& batch, bool* all_next);

  // Asks for the memory that `matches` will read.
  void prefetch() const;

  bool has_gradient() const { return gradient_.impl != nullptr; }

  // The tensors that the step reads or writes.
  template <class Use>
  void for_each_tensor(Use use) const {
    if (!has_gradient()) return;
    use(param_.impl);
    use(gradient_.impl);
    for (const Item& item : items_)
      if (item.role != Role::kIgnored) use(item.tensor.impl);
  }

 private:
  // kRows and kColumns: averages over them. kScale: of a state of 8 bits.
  enum class Role { kState, kRows, kColumns, kScale, kCount, kNumber, kIgnored };

  // Of the parameter's state dict.
  struct Item {
    pybind11::object key;  // a string; owned, so that its address stays its own
    PyObject* value;
    Role role;
    SeenTensor tensor;
  };

  // A DTensor as it was noted, and the tensor that is in it now.
  struct Outer {
    PyObject* spec = nullptr;                 // `Specs` owns it
    const VersionCounter* version = nullptr;  // null: the step does not write to it
    const c10::TensorImpl* local = nullptr;
  };
  struct Distributed {
    Outer param, gradient;
    c10::SmallVector<Outer, 3> items;  // as items_
  };

  PyObject* object_ = nullptr;
  PyObject* state_ = nullptr;  // null where there is none
  SeenTensor param_, gradient_;
  const torch::autograd::AutogradMeta* meta_ = nullptr;
  int64_t numel_ = 0;
  int64_t entry_ = 0;
  bool contiguous_ = false, gradient_is_written_ = false;
  c10::SmallVector<Item, 3> items_;
  std::unique_ptr<Distributed> distributed_;  // of a DTensor

  bool is_in_dtensor(size_t item) const;
  const c10::TensorImpl* tensor_of(size_t item) const;
  bool see_param(PyObject* param, Specs* specs, Operands* operands);
  static bool lies_as_it_should(const Leaf& leaf, Role role, const Operands& operands);
  const c10::TensorImpl* see_state(PyObject* value, Role role, Specs* specs, Operands* operands);
  bool look_into_dtensors();
  bool gradient_matches(const c10::TensorImpl* param, const c10::TensorImpl* gradient, Batch& batch, Entry& entry);
  bool items_match(const c10::TensorImpl* param, Entry& entry, bool* all_next) const;
};

}  // namespace trainopt::python
