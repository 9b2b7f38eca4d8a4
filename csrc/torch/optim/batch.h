// One step's work: the tensors of parameters in, one call of the engine out. Knows tensors and no Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <deque>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/engine.h"
#include "cpu/factors.h"
#include "torch/inspect.h"
#include "torch/layout.h"
#include "torch/optim/cuda_batch.h"
#include "torch/optim/group_values.h"
#include "torch/optim/path.h"
#include "torch/optim/step_memory.h"

namespace trainopt::aten {

constexpr int kMaxOperands = kMaxSlots + 3 + kMaxNumbers;  // parameter, gradient, states, step count, numbers
constexpr int kGradientCounter = 1;  // which of an entry's counters is the gradient's, where it is written to

// The tensors of one parameter; null where there is none. Those of a DTensor are its local tensors.
struct Operands {
  const c10::TensorImpl* param = nullptr;
  const c10::TensorImpl* gradient = nullptr;
  const c10::TensorImpl* steps = nullptr;
  const c10::TensorImpl* numbers[kMaxNumbers] = {};
  const c10::TensorImpl* states[kMaxSlots] = {};       // by slot
  bool states_are_tensors = true;                      // else there is a state that is a subclass of one
  bool states_are_known = true;                        // else there is a state that is something else
  const Shard* shard = nullptr;                        // of a DTensor
  bool placements_match = true;                        // so do the gradient and the states
  c10::SmallVector<const c10::TensorImpl*, 0> outers;  // the DTensors that are written to, the parameter first
  const c10::TensorImpl* outer_gradient = nullptr;

  // The parameter's sizes, of a DTensor those of the whole.
  c10::IntArrayRef sizes() const { return shard != nullptr ? c10::IntArrayRef(shard->sizes) : param->sizes(); }
};

// One parameter in a step.
struct Entry {
  const GroupValues* group;
  uint32_t tensor;     // the parameter's index in the optimizer
  int64_t task;        // its index; -1 for a parameter without elements or on a CUDA device
  CudaPlace on_cuda;   // there
  void* steps;         // the count of its steps where the host keeps it, else null
  double step;         // that count with this step
  void* device_steps;  // the count of its steps where a CUDA device keeps it, else null
  bool steps_are_double, first, is_float64;
  HeldNumbers numbers;
  Numbers moved;                              // as `prepare` leaves those of the host
  int64_t shard;                              // of a DTensor on the CPU: its place among such; else -1
  VersionCounter* written[kMaxOperands + 1];  // those of the tensors that the step writes; null after the last

  // The count of steps with this one, as the host reads it.
  double next_count() const;
  // Reads the count of steps again. Whether this step is the one after that of before.
  bool recount();
};

class Batch {
 public:
  // `first_tensor`: the index in the optimizer of the first parameter, for the noise.
  explicit Batch(const cpu::Rule& rule, uint32_t first_tensor = 0)
      : cuda(rule), rule_(rule), first_tensor_(first_tensor) {}

  void clear();

  // Adds a parameter that has a gradient to the step if the engine can take it: kFused then. `first` says that its
  // states are new; the gradient is written to if `writes_gradient`. `tensor` is the parameter's index, in ascending
  // order. `group` must live as long as the step.
  Path add(const Operands&, const GroupValues* group, uint32_t tensor, bool first, bool writes_gradient);

  // Likewise for a parameter whose states are still to be made: only its memory is noted.
  Path announce(const Operands&, const GroupValues&, uint32_t tensor, bool writes_gradient);

  // Notes memory that a parameter's step reads besides (of an option), or that torch's step of it reads and writes.
  void note_read(const c10::TensorImpl* tensor, uint32_t index) { memory_.note_read(tensor, index); }
  void note_operands(const Operands&, uint32_t tensor, bool writes_gradient);

  // As StepMemory says of what was noted.
  const Indices& sharing() { return memory_.sharing(); }
  bool is_clear(const c10::TensorImpl* gradient) const { return memory_.is_clear(gradient); }

  // What would become of a parameter, with or without a gradient. For kFused, fills the task and the entry.
  Path look(const Operands&, const GroupValues&, bool writes_gradient, TensorTask*, Entry*);

  // The step. `prepare` reads the groups' values. `count` moves version counters and step counts, and `update` changes
  // the elements and touches nothing else, so that it may run without Python's interpreter if the tensors' memory is
  // kept. `run` does both. RuntimeError for a step that a CUDA graph could not repeat, where one is being captured.
  // `add_shards` is called in between where a rule with a reduce phase meets DTensors; then `run` does not do.
  void prepare(const GradientScaling& scaling, const DeviceScaling& on_device = {});
  void run() { work(true, true, {}); }
  void count() { work(true, false, {}); }
  void update(const AddShards& add_shards = {}) { work(false, true, add_shards); }

  // Whether the step has sums over tensors of which other processes hold parts.
  bool sums_over_shards() const {
    return (!shards_.empty() && (rule_.sum_count > 0 || is_cautious_)) || cuda.sums_over_shards();
  }

  // Whether sums over all parameters can be taken: on the CPU, or on one device in one arithmetic.
  bool is_in_one_place() const { return cuda_entries_ == 0 || (lies_on_devices() && cuda.part_count() <= 1); }
  // Those of the last step, of a rule that has such; nothing where no parameter had a gradient. Waits for a device.
  std::optional<std::vector<double>> sums_over_all() const;

  // What the step has found out about the parameters whose groups ask for it, until it is forgotten: about those on
  // the CPU and those without elements, and about those on devices, whose `tensors` begin with `first_tensor`.
  struct Found {
    uint32_t tensor;
    StepStats stats;
    double gradient_scale;  // with which the gradient came
  };
  const std::vector<Found>& stats() const { return stats_; }
  decltype(auto) stats_on_devices() const { return cuda.stats(); }
  uint32_t first_tensor() const { return first_tensor_; }
  void forget_stats() {
    stats_.clear();
    cuda.forget_stats();
  }

  // Whether every parameter lies on a CUDA device.
  bool lies_on_devices() const { return cuda_entries_ == entries.size(); }

  // Whether the host must read what a group has on a device: for a parameter, or for numbers that it moves on.
  bool host_must_know() const { return !lies_on_devices() || has_host_numbers_; }

  // Whether a step can be made with what is left on the device. Where it may be skipped, the count of its steps has to
  // lie there too, and nothing that the host goes on with.
  bool can_apply(const DeviceScaling& scaling) const {
    return !scaling.exists() ||
           (lies_on_devices() && !(scaling.found_inf.defined() && (cuda.counts_on_host() || rule_.sums_over_all)));
  }

  // In place of `prepare` where the entries are those of the last step, recounted. `all_next`: each one's step is the
  // one after its last.
  void prepare_again(const GradientScaling& scaling, bool all_next, const DeviceScaling& on_device = {});

  // What an entry's tensors are to the engine; null for one without elements.
  const TensorTask* task_of(const Entry& entry) const {
    if (entry.on_cuda.part >= 0) return &cuda.task(entry.on_cuda);
    return entry.task < 0 ? nullptr : &tasks[entry.is_float64][entry.task];
  }

  // Where the gradient of an entry that has elements is now.
  void set_gradient(const Entry& entry, void* data) {
    if (entry.on_cuda.part >= 0) return cuda.set_gradient(entry.on_cuda, data);
    tasks[entry.is_float64][entry.task].gradient.data = data;
  }

  std::vector<Entry> entries;
  std::vector<cpu::TensorTask> tasks[2];  // float arithmetic, double arithmetic
  int64_t elements = 0;                   // on the CPU
  CudaBatch cuda;

 private:
  // Parameters beside each other that agree in all of this share their scalars.
  struct ScalarsKey {
    const GroupValues* group;
    double step;
    bool counts, first, is_float64;
    Numbers numbers;
  };

  // A DTensor on the CPU; task is -1 where this process holds no elements of it.
  struct ShardedTask {
    const Shard* shard;
    int64_t task;
    bool is_float64;
  };

  const cpu::Rule& rule_;
  const uint32_t first_tensor_;
  std::vector<int64_t> starts_[2];
  std::vector<ShardedTask> shards_;
  std::vector<Sum> partials_[2], sums_[kPasses][2];  // of the reduce phase
  std::vector<Sum> shared_;                          // of each DTensor, likewise: over all its shards
  std::vector<Sum> over_all_;                        // likewise: over all tensors
  std::vector<StepStats> chunk_stats_[2];
  std::vector<Found> stats_;
  bool is_cautious_ = false, is_measured_ = false;  // a group with tensors on the CPU
  std::vector<ScalarsKey> scalars_keys_;
  std::vector<cpu::Scalars> scalars_;                                            // of each key
  std::vector<std::pair<const GroupValues*, const GroupValues*>> equal_groups_;  // different groups that share scalars
  std::deque<Layout> layouts_;
  std::deque<ShardLayout> shard_layouts_;
  std::deque<cpu::FactoredTensor> factored_;
  std::vector<VersionCounter*> outer_written_;  // of DTensors

  StepMemory memory_;
  size_t cuda_entries_ = 0;
  bool has_host_numbers_ = false;
  GradientScaling scaling_;  // with which `prepare` was called
  DeviceScaling on_device_;  // likewise

  int64_t parts() const;
  cpu::Update update_of(bool is_float64) const;
  void gather(Pass pass, cpu::Update (&updates)[2], const AddShards& add_shards);
  void share_sums(Pass pass, size_t count, const AddShards& add_shards);
  void add_over_all();
  void work(bool counts, bool updates, const AddShards& add_shards);
  bool look_at_numbers(const Operands&, const GroupValues&, HeldNumbers*) const;
  Path factor(const Operands&, TensorTask*);
  void move_factors(const cpu::Update (&updates)[2], const AddShards& add_shards);
  void share_factors(const cpu::Update (&updates)[2], const AddShards& add_shards);
  void write_numbers(const cpu::Update (&updates)[2]) const;
  void check_counts() const;
  cpu::Scalars scalars_of(const ScalarsKey& key, Numbers* numbers) const;
};

// The number of the first state in a set.
inline int first_of(StateSet states) { return __builtin_ctz(states); }

// Whether a tensor can be an average over each row of a parameter's matrices, or over each column: one number in the
// place of a dimension. `sizes` are the parameter's, and of a shard those of the whole.
bool is_factor_of(c10::IntArrayRef sizes, const c10::TensorImpl* state, bool of_rows);

// How many threads of torch's pool are worth waking for this many elements.
int64_t threads_for(int64_t elements);

// What a tensor costs beside its elements, in elements.
constexpr int64_t kTensorElements = 256;

}  // namespace trainopt::aten
