// A parameter, its gradient and its states as a step met them, for the next step to compare with what is there then.
#pragma once

#include <c10/core/TensorImpl.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "python/batch.h"

namespace trainopt::python {

// Addresses are compared, or asked for ahead of time; nothing is read through one before the present has confirmed it.
struct SeenTensor {
  const c10::TensorImpl* impl = nullptr;
  const c10::StorageImpl* storage = nullptr;
  const VersionCounter* version = nullptr;
  const void* data = nullptr;
  caffe2::TypeMeta dtype;
};

// Whether a tensor, of no subclass, has a gradient.
bool has_gradient(PyObject* param);

class Sighting {
 public:
  // A parameter that takes no part in the step.
  void see_idle(PyObject* param);

  // Unpacks a parameter, a tensor and of no subclass. `names` are the rule's states, then "step"; the first
  // `states_needed` count. False if the next step cannot be compared with this one.
  bool see(PyObject* param, PyObject* state, const std::vector<pybind11::str>& names, int64_t states_needed,
           Operands* operands);

  // Notes where the memory is, once the batch has taken the parameter as its last entry. False as above.
  bool note(const Operands& operands, const Batch& batch);

  // Whether everything that a step asks of these objects has the same answer as when they were noted, but for the
  // gradient's memory, which is put into the task, and the count of steps, which is put into the entry. Touches no
  // reference count: several threads may ask at once, each for its own, while the caller holds the interpreter.
  bool still_holds(Batch& batch);

  // Asks for the memory that `still_holds` will read.
  void prefetch() const;

  PyObject* object() const { return object_; }
  PyObject* state() const { return state_; }
  bool has_gradient() const { return gradient_.impl != nullptr; }

  // The tensors that the step reads or writes.
  template <class Use>
  void for_each_tensor(Use use) const {
    if (!has_gradient()) return;
    use(param_.impl);
    use(gradient_.impl);
    for (int i = 0; i < item_count_; ++i)
      if (items_[i].name != kIgnored) use(items_[i].tensor.impl);
  }

 private:
  static constexpr int kMaxItems = kMaxStates + 2;
  static constexpr int kIgnored = -1;

  struct Item {
    pybind11::object key;  // owned, so that its address stays its own
    PyObject* value;
    int name;  // among the rule's states; their number for the count of steps; or kIgnored
    SeenTensor tensor;
  };

  PyObject* object_ = nullptr;
  PyObject* state_ = nullptr;  // null where there is none
  SeenTensor param_, gradient_;
  const c10::AutogradMetaInterface* meta_ = nullptr;
  int64_t numel_ = 0;
  int64_t entry_ = 0;
  bool contiguous_ = false;
  int item_count_ = 0;
  Item items_[kMaxItems];

  bool gradient_holds(const c10::TensorImpl* param, const c10::TensorImpl* gradient, cpu::Task& task);
  bool items_hold(const c10::TensorImpl* param, Entry& entry) const;
};

}  // namespace trainopt::python
