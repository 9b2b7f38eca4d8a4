// One step's work: the tensors of parameters in, one call of the engine out. Knows tensors and no Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <deque>
#include <utility>
#include <vector>

#include "cpu/engine.h"
#include "python/cuda_batch.h"
#include "python/group.h"
#include "python/version.h"

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

constexpr int kMaxOperands = kMaxStates + 3;  // parameter, gradient, states, step count

// The tensors of one parameter; null where there is none.
struct Operands {
  const c10::TensorImpl* param = nullptr;
  const c10::TensorImpl* gradient = nullptr;
  const c10::TensorImpl* steps = nullptr;
  const c10::TensorImpl* states[kMaxStates] = {};  // in the rule's order
  bool states_are_tensors = true;                  // else there is a state that is none, or is a subclass of one
};

// One parameter in a step.
struct Entry {
  const GroupValues* group;
  int64_t task;        // its index, or -1 for a parameter without elements or on a CUDA device
  void* steps;         // the count of its steps where the host keeps it, else null
  double step;         // that count with this step
  void* device_steps;  // the count of its steps where a CUDA device keeps it, else null
  bool steps_are_double, first, wide;
  VersionCounter* written[kMaxOperands];  // those of the tensors that the step writes; null after the last

  // Reads the count of steps again. Whether this step is the one after that of before.
  bool recount();
};

class Batch {
 public:
  explicit Batch(const cpu::Rule& rule) : cuda(rule), rule_(rule) {}

  void clear();

  // Adds a parameter that has a gradient to the step if the engine can take it: kFused then. `first` says that its
  // states are new; the gradient is written to if `writes_gradient`. `tensor` is the parameter's index, in ascending
  // order. `group` must live as long as the step.
  Path add(const Operands&, const GroupValues* group, uint32_t tensor, bool first, bool writes_gradient);

  // Likewise for a parameter whose states are still to be made: only its own memory is noted.
  Path announce(const Operands&, const GroupValues&, uint32_t tensor, bool writes_gradient);

  // To be called when all are added: the parameters that write memory which another one writes too.
  const Indices& sharing();

  // What would become of a parameter, with or without a gradient. For kFused, fills the task and the entry.
  Path look(const Operands&, const GroupValues&, bool writes_gradient, Task*, Entry*);

  // The step. `prepare` reads the groups' values, `run` counts, tells autograd, and touches nothing but tensors.
  // RuntimeError for a step that a CUDA graph could not repeat, where one is being captured.
  void prepare(double gradient_scale, const DeviceScaling& scaling = {});
  void run();

  // Whether the host need not know if the step is skipped.
  bool is_for_devices_alone() const { return cuda_entries_ == entries.size() && !cuda.counts_on_host(); }

  // In place of `prepare` where the entries are those of the last step, recounted. `all_next`: each one's step is the
  // one after its last.
  void prepare_again(double gradient_scale, bool all_next);

  std::vector<Entry> entries;
  std::vector<cpu::Task> tasks[2];  // float arithmetic, double arithmetic
  int64_t elements = 0;             // on the CPU
  CudaBatch cuda;

 private:
  struct Span {
    const char* begin;
    const char* end;
    uint32_t tensor;
  };

  // Neighbours of the same options at the same step, which share their scalars.
  struct Run {
    const GroupValues* group;
    double step;
    bool counts, first, wide;
  };

  const cpu::Rule& rule_;
  std::vector<int64_t> starts_[2];
  std::vector<Run> runs_;
  std::vector<cpu::Scalars> scalars_;                                     // of the runs
  std::vector<std::pair<const GroupValues*, const GroupValues*>> alike_;  // different groups in one run
  std::deque<Layout> layouts_;
  std::vector<Span> written_;  // the memory of this step, over that of the last
  size_t spans_ = 0;           // how many are this step's
  bool sharing_is_known_ = false;
  Indices sharing_;

  size_t cuda_entries_ = 0;
  double gradient_scale_ = 1;  // with which `prepare` was called
  DeviceScaling scaling_;      // likewise

  void note(const void* begin, const char* end, uint32_t tensor);
  void find_sharing();
  cpu::Scalars scalars_of(const Run& run, double gradient_scale) const;
};

// How many threads of torch's pool are worth waking for this many elements.
int64_t threads_for(int64_t elements);

// What a tensor costs beside its elements, in elements.
constexpr int64_t kTensorElements = 256;

}  // namespace trainopt::python
