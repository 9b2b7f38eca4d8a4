// The step plan: torch's parameter groups and state in, one call of the engine out.
//
// A plan owns nothing that torch's dicts do not say: every step looks at the groups, the gradients and the states as
// they are now. What is kept from the last step is compared with the present, and used again where they are the same.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cpu/engine.h"
#include "python/batch.h"
#include "python/group.h"
#include "python/sighting.h"

namespace trainopt::python {

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
  //
  // `device_scale` and `found_inf` (float32 tensors of one element on a CUDA device, or None) say the same as
  // `gradient_scale` and a step that is not to be made, without the host's knowing. False where it must know: then
  // nothing has been changed.
  //
  // True, and nothing has been changed, if the gradients must be looked at first, unless they `were_seen`: a group
  // skips steps that are not finite, or there is neither a state nor a learning rate, so that the step may only ask for
  // states.
  pybind11::object step(pybind11::list groups, pybind11::dict state, double gradient_scale, const Indices& fresh,
                        const Indices& torchs, const pybind11::object& device_scale, const pybind11::object& found_inf,
                        bool were_seen);

  // The path of every parameter, were it to have an ordinary gradient now.
  std::vector<std::string> paths(pybind11::list groups, pybind11::dict state);

 private:
  // What a group decides of the batch.
  struct GroupForm {
    Py_ssize_t count = 0;
    int64_t states_needed = 0;
    bool noisy = false, differentiable = false;

    GroupForm() = default;
    explicit GroupForm(const Group& group)
        : count(PySequence_Fast_GET_SIZE(group.params)),
          states_needed(group.states_needed),
          noisy(group.noise != 0),
          differentiable(group.differentiable != 0) {}
    bool operator==(const GroupForm& other) const {
      return count == other.count && states_needed == other.states_needed && noisy == other.noisy &&
             differentiable == other.differentiable;
    }
  };

  // A parameter in the lists, and the state dict's value for it; null where it has none or no gradient.
  struct Place {
    PyObject* object;
    PyObject* state;
    bool has_gradient;
  };

  const cpu::Rule& rule_;
  std::vector<pybind11::str> state_names_;  // the rule's, then "step"
  std::vector<Group> groups_;
  std::vector<GroupForm> forms_;     // of the last walk
  std::vector<Place> places_;        // of every parameter, in order
  std::vector<Sighting> sightings_;  // likewise
  Batch batch_;
  std::vector<c10::Storage> kept_;  // while the interpreter is let go
  bool can_recall_ = false;         // whether the next step can be compared with the last one
  bool is_running_ = false;         // with the interpreter let go

  bool recall(PyObject* groups, PyObject* state, bool* all_next);
  bool same_places(PyObject* groups, PyObject* state);
  void walk(PyObject* groups, PyObject* state, bool writes_gradient, const Indices& fresh, const Indices& torchs,
            Indices* missing, Indices* rest);
  bool lacks_states(const Operands& operands, const Group& group) const;
  bool depends_on_gradients(PyObject* state) const;
  void check_capture() const;
  void run_unlocked();
};

}  // namespace trainopt::python
