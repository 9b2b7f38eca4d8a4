// The step plan: torch's parameter groups and state in, one call of the engine out.
//
// A plan owns nothing that torch's dicts do not say: every step looks at the groups, the gradients and the states as
// they are now. What is kept from the last step is compared with the present, and used again where they are the same.
//
// Two rules keep it safe from what other threads and users' objects do meanwhile.
// 1. While it looks, no Python code runs: nothing of a user's is hashed, compared, converted or let go of. So no other
//    thread gets the interpreter, and all that is borrowed stays. What only Python code could tell is left to torch's
//    path. Where Python has to be asked, of changed options or of unknown DTensors, it looks anew afterwards.
// 2. Before the interpreter is let go, all that is written besides elements is written (version counters, step counts),
//    and the memory of the elements is owned.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/engine.h"
#include "python/distributed.h"
#include "python/group.h"
#include "python/snapshot.h"
#include "python/state_cursor.h"
#include "torch/optim/batch.h"

namespace trainopt::python {

// What keeps a step from being done: indices of parameters, over all groups, ascending.
struct Unfinished {
  Indices missing;   // their states are to be made
  Indices rest;      // they have a gradient, but the engine does not take them
  Indices sharing;   // of the rest: memory is shared, so that one has to be stepped after the other
  Indices doubtful;  // of the rest: torch may refuse a state's value, or an option of the group whose first this is

  // The first parameter that nobody can step, and why.
  std::optional<std::pair<uint32_t, Path>> refused;

  void refuse(uint32_t tensor, Path path) {
    if (!refused) refused.emplace(tensor, path);
  }
  bool empty() const { return missing.empty() && rest.empty(); }
};

// The answer to nearly every step, made once: the module asks for it when it is loaded, so that no step has to.
pybind11::object step_is_done();

class Plan {
 public:
  // `first_tensor`: the index of the first parameter in the optimizer, for the noise. `check` is called with a group,
  // before anything is changed, where one of the options of the names `checked` is new in it; it may raise.
  explicit Plan(const std::string& rule, uint32_t first_tensor = 0, std::vector<pybind11::str> checked = {},
                pybind11::object check = pybind11::none());

  // One step over `groups` (torch's param_groups) and `state` (torch's state dict). Gradients are divided by
  // `gradient_scale` and written back unless it is 1. `new_states` holds the indices of parameters whose states
  // were made in this very step, `stepped` of those that torch has stepped already.
  //
  // `gradient_norm` is that of the gradients, with their scale, for groups that clip them (`max_grad_norm`): a number,
  // or a float64 tensor of one element on a CUDA device, where it is read without a wait.
  //
  // Returns a `StepAnswer`, a named tuple whose `status` is "done" or says why nothing has been changed:
  //   "unfinished"          the other fields are those of an `Unfinished`
  //   "look at gradients"   a group skips steps that are not finite, or clips gradients by their norm, or there is
  //                         neither a state nor a learning rate, so that the step may only ask for states; not where
  //                         `gradients_seen`
  //   "ask the host"        the device alone cannot apply `device_scale`, `found_inf` and a norm that lies there: the
  //                         host has to read them
  //   "foreign containers"  groups, parameters or states are in containers that answer by code of their own
  //
  // `device_scale` and `found_inf` (float32 tensors of one element on a CUDA device, or None) say the same as
  // `gradient_scale` and a step that is not to be made. They are applied on the device, without a wait.
  pybind11::object step(const pybind11::object& groups, const pybind11::object& state, double gradient_scale,
                        Indices new_states, Indices stepped, const pybind11::object& device_scale,
                        const pybind11::object& found_inf, const pybind11::object& gradient_norm, bool gradients_seen);

  // What the last step has found out, a tuple for each parameter that the engine has stepped in a group with stats: its
  // index in the optimizer; then the norms of gradient, parameter and update, the largest absolute element of the
  // gradient that is not NaN, and how many of its elements are not finite: these as a tuple, or for a parameter on a
  // CUDA device as a tensor of float64 there, which nothing has waited for.
  pybind11::list stats() const;

  // The sums over all parameters that the last step went by, of a rule that has such, for the numbers that follow from
  // them; nothing where the engine has stepped no parameter. Waits for a device.
  std::optional<std::vector<double>> sums_over_all() const;

  // The path of every parameter, were it to have an ordinary gradient now. Nothing for containers as above.
  std::optional<std::vector<std::string>> paths(const pybind11::object& groups, const pybind11::object& state);

 private:
  // What a group decides of the batch.
  struct GroupForm {
    Py_ssize_t count = 0;
    int64_t states_needed = 0, numbers_needed = 0;
    bool noisy = false, cautious = false, stats = false;
    Precision precision = Precision::kNative;
    bool differentiable = false, unreadable = false;
    bool clips = false, clears_gradient = false;
    std::vector<const void*> options;  // where the options that are tensors lie

    GroupForm() = default;
    explicit GroupForm(const Group& group);
    bool operator==(const GroupForm& other) const {
      return count == other.count && states_needed == other.states_needed && numbers_needed == other.numbers_needed &&
             noisy == other.noisy && cautious == other.cautious && stats == other.stats &&
             precision == other.precision && differentiable == other.differentiable && unreadable == other.unreadable &&
             clips == other.clips && clears_gradient == other.clears_gradient && options == other.options;
    }
  };

  // A parameter in the lists, and the state dict's value for it; null where it has none or no gradient.
  struct Place {
    PyObject* object;
    PyObject* state;
    bool has_gradient;
  };

  const cpu::Rule& rule_;
  const uint32_t first_tensor_;
  const std::vector<pybind11::str> checked_;
  const pybind11::object check_;
  std::vector<pybind11::str> state_names_;  // of the rule's slots, then "step", then the rule's numbers
  std::vector<Group> groups_;
  std::vector<GroupForm> forms_;     // of the last walk
  std::vector<Place> places_;        // of every parameter, in order
  StateEntries entries_;             // of the state dict, in its order
  std::vector<Snapshot> snapshots_;  // of every parameter, in order
  Specs specs_;
  Batch batch_;
  std::vector<c10::Storage> kept_;  // while the interpreter is let go
  std::vector<at::Tensor> kept_options_;
  bool has_dtensors_ = false;  // in the last walk
  bool is_scaled_ = false;     // likewise, and so each group knows whether its gradients were written to
  bool can_recall_ = false;    // whether the next step can be compared with the last one
  bool is_running_ = false;    // with the interpreter let go, or Python code asked

  void check_options(PyObject* groups);
  bool refresh(PyObject* groups, PyObject* state);
  bool recall(PyObject* state, bool* all_next);
  bool same_places(PyObject* state) const;
  Unfinished walk(PyObject* state, bool is_scaled, const Indices& new_states, const Indices& stepped);
  bool learn();
  bool lacks_states(const Operands& operands, const Group& group) const;
  bool depends_on_gradients(PyObject* state) const;
  void check_capture() const;
  void run_unlocked();
};

}  // namespace trainopt::python
