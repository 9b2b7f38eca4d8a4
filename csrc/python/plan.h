// The step plan: torch's parameter groups and state in, one call of the engine out.
//
// A plan owns nothing that torch's dicts do not say: every step walks the groups, the gradients and the states as they are
// now, and keeps from the last step only memory to write in and what can be compared with the present to skip work.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <deque>
#include <string>
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
  // A parameter that the engine takes in this step.
  struct Entry {
    const at::Tensor* param;
    const at::Tensor* gradient;
    const at::Tensor* state[kMaxStates];
    const at::Tensor* steps;  // null where the rule counts none
    int32_t group;
    uint32_t tensor;
    bool wide, first;
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
  std::vector<cpu::Scalars> scalars_;
  std::vector<size_t> task_scalars_[2];
  std::deque<Layout> layouts_;
  std::vector<Span> written_, written_before_;
  std::vector<uint32_t> sharing_;  // indices of parameters whose memory another one writes too

  void walk(PyObject* groups, PyObject* state, bool writes_gradient, const Indices& fresh, const Indices& torchs,
            Indices* missing, Indices* rest);
  Path look(const Group& group, PyObject* object, PyObject* param_state, bool writes_gradient, Entry* entry,
            bool* missing);
  void find_sharing();
  bool arrange(const Entry& entry, bool logical_order, cpu::Task* task);
  void build(double gradient_scale);
  void execute();
};

}  // namespace trainopt::python
