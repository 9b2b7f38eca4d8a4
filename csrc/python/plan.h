// The step plan: torch's parameter groups and state in, one call of the engine out.
//
// A plan owns nothing that torch's dicts do not say: every step walks the groups, the gradients and the states as they
// are now, and keeps from the last step only memory to write in and what can be compared with the present to skip work.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "cpu/engine.h"
#include "python/group.h"

namespace trainopt::python {

// Which way a parameter takes through a step, and why.
enum class Path {
  kFused,
  kSubclass,
  kDifferentiable,
  kDevice,
  kDtype,
  kGradient,
  kStateForm,
  kMemory,
  kMode,
};
const char* describe(Path);

using Indices = std::vector<int64_t>;

class Plan {
 public:
  explicit Plan(const std::string& rule);

  // One step over `groups` (torch's param_groups) and `state` (torch's state dict). Gradients are divided by
  // `gradient_scale` and written back unless it is 1. `fresh` holds the indices of parameters whose states were made
  // in this very step.
  //
  // Returns None when all is done. Else (missing, rest): the indices of the parameters that need states made, and of
  // those whose gradient is there but that the engine does not take; then nothing has been changed. `torchs` names the
  // parameters that torch has stepped already. Indices count over all groups; lists of them ascend.
  pybind11::object step(pybind11::list groups, pybind11::dict state, double gradient_scale, const Indices& fresh,
                        const Indices& torchs);

  // The path of every parameter, were it to have an ordinary gradient now.
  std::vector<std::string> paths(pybind11::list groups, pybind11::dict state);

 private:
  // What `commit` must still do for a task: count its step and give it its scalars.
  struct Entry {
    void* steps;   // null where none are counted
    int64_t task;  // its index, or -1 for a parameter without elements
    int32_t group;
    int32_t steps_are_double, first, wide;  // truth values
  };
  struct Span {
    const char* begin;
    const char* end;
    uint32_t tensor;
  };

  const cpu::Rule* rule_;
  std::vector<pybind11::str> state_names_;
  std::vector<Group> groups_;
  std::vector<Entry> entries_;
  std::vector<cpu::Task> tasks_[2];  // float arithmetic, double arithmetic
  std::vector<int64_t> starts_[2];
  std::vector<size_t> task_scalars_[2];
  std::vector<cpu::Scalars> scalars_;
  std::deque<Layout> layouts_;
  std::vector<c10::TensorImpl*> written_tensors_, read_tensors_;
  std::vector<Span> written_;  // the memory of this step, over that of the last
  bool sharing_is_known_ = false;
  Indices sharing_;  // parameters whose memory another one writes too
  int64_t elements_ = 0;
  bool is_running_ = false;  // with the interpreter let go

  void walk(PyObject* groups, PyObject* state, bool writes_gradient, const Indices& fresh, const Indices& torchs,
            Indices* missing, Indices* rest);
  Path look(const Group& group, PyObject* object, PyObject* param_state, bool writes_gradient, cpu::Task* task,
            Entry* entry, bool* missing);
  bool arrange(const at::Tensor& param, const std::vector<std::pair<const at::Tensor*, TensorView*>>& operands,
               bool logical_order);
  void find_sharing();
  void commit(double gradient_scale);
  void execute();
};

}  // namespace trainopt::python
