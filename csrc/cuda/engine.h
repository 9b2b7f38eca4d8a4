// The CUDA engine: runs a rule over any list of parameters, in one launch where the list fits in a kernel's parameters.
//
// Nothing here waits for the device. What only the device knows (step counts, a learning rate or betas kept as tensors,
// GradScaler's scale and its found_inf) is read there, so that a step can be captured in a CUDA graph. All memory is
// the caller's, and so is the stream; the caller has made the tensors' device the current one. A launch that CUDA
// refuses throws std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/step_stats.h"
#include "core/sum.h"
#include "core/tensor_view.h"
#include "cuda/stream.h"
#include "rules/rule.h"
#include "rules/stages.h"
#include "rules/task.h"

namespace trainopt::cuda {

// What aligned tensors are loaded and stored by.
constexpr uintptr_t kAlignment = 16;

// What the kernel needs beside the tensors, for one group and step count.
struct Prepared {
  Scalars scalars;
  uint32_t step;  // for the random numbers
};

// One of a parameter's numbers: where it lies on the device, or what the host knows it to be.
union Number {
  void* data;
  double value;
};

// Data lie on the device, layouts on the host.
struct TensorTask : trainopt::TensorTask {
  uint32_t prepared;              // which of the update's is its
  bool rounds_at_random = false;  // its parameter, if that is of 16 bits; as its scalars say
  bool is_measured = false;       // the step finds out what StepStats has
  // The numbers, on the device, of a rule whose sums move them.
  Number numbers[kMaxNumbers] = {};
  bool numbers_are_float32 = false;
};

struct Update {
  int rule;         // its place in TRAINOPT_FOR_EACH_RULE
  bool is_float64;  // float64 arithmetic
  const TensorTask* tasks;
  size_t count;
  const Prepared* prepared;
  bool prepared_on_device;  // by `prepare`; else they lie on the host, and travel with the launch
  const float* found_inf;   // on the device, or null: nothing is done unless it is 0
};

// Changes the parameters and states of all tasks, and their moving averages. Tasks without elements are allowed.
// `chunk_stats` is memory for measured_chunks(work) of them, for `tell`. A step that is left out measures all the same.
void update(const Update&, StepStats* chunk_stats, Stream);
size_t measured_chunks(const Update&);
// Where among them those of each task's first chunk are; -1 for one that is not measured.
std::vector<int64_t> stats_places(const Update&);

// What that has found out, for each task that is measured: the norms of the gradient, of the parameter before and of
// its move, the largest absolute element of the gradient and how many are not finite; the gradient without its scale,
// `gradient_scale` on the device, or if that is null `scale`.
constexpr int kToldStats = 5;
void tell(const Update&, const StepStats* chunk_stats, const float* gradient_scale, double scale, double* out, Stream);

// The launches of an update with their tables filled, for steps of the same tensors, of which only gradients move. Each
// task's `prepared` is the one that it had then.
class StepTables {
 public:
  virtual ~StepTables() = default;
  // The gradient of the task with this index, aligned as the last one was. Several threads may each set their own.
  virtual void set_gradient(size_t task, void* data) = 0;
  // As `update` does: the scalars, `found_inf` and `chunk_stats` are this step's.
  virtual void launch(const Prepared* prepared, const float* found_inf, StepStats* chunk_stats, Stream) = 0;
};
std::unique_ptr<StepTables> tables_of(const Update&);

// Of a rule whose matrices have averages over rows and columns: moves these on, for the passes after it. `memory` is of
// factor_bytes(work), aligned; the states of `tasks`, a copy of work's, are in it from the second call on. Of shards,
// the first puts what they add to the sums over the whole's rows and columns into `totals`, which is 0 before: as many
// of it for each task as shared_numbers(work) says. In the second it is the sum over all shards.
void add_squares(const Update&, void* memory, double* totals, Stream);
void move_factors(const Update&, void* memory, double* totals, TensorTask* tasks, Stream);
size_t factor_bytes(const Update&);
std::vector<int64_t> shared_numbers(const Update&);

// A pass of the reduce phase: the sums of each task, one after the other, in `sums`. `partials` is memory for
// partial_sums(work, ...) of them. Tasks without elements have sums of 0.
void gather(const Update&, Pass, Sum* partials, Sum* sums, Stream);
size_t partial_sums(const Update&, int sum_count);

// Adds up the sums of all tasks.
void add_over_all(const Update&, int sum_count, const Sum* sums, Sum* total, Stream);

// Writes each task's scalars, with what follows from its sums, to out[its index]; or from the same sums for each, those
// over all tasks. All memory is the device's.
void finish(const Update&, Pass, const Sum* sums, bool of_all, Prepared* out, Stream);

// Numbers of a parameter group that lie on the device, as tensors of one element.
struct DeviceNumber {
  static constexpr int kLr = -1;
  const void* data;  // null: none
  int32_t option;    // the rule's option that it is, or kLr
  int32_t is_double;
};
constexpr int kMaxDeviceNumbers = 4;

// What a group says: numbers of the host, some of them replaced by the device's.
struct GroupSource {
  Settings settings;
  double options[kMaxOptions];
  DeviceNumber replaced[kMaxDeviceNumbers];
};

// A parameter whose scalars are to be prepared on the device.
struct Count {
  void* steps;        // its step count, a tensor of one element on the device; null: the host has counted
  double step;        // then this is the count with this step, 0 where the rule has none
  uint32_t group;     // which of the sources is its
  uint8_t is_double;  // the type of `steps`: float64 or float32
  uint8_t first;      // its states were made in this very step; so is it where the count becomes 1
  uint8_t counts;     // the host's count goes up with each step
  // The parameter's numbers, of a rule that has any. Those on the device are moved on there.
  uint8_t numbers_are_float32 : 1, numbers_are_values : 1;
  Number numbers[kMaxNumbers];
};

struct Preparation {
  int rule;
  bool is_float64;
  const GroupSource* groups;
  size_t group_count;
  const Count* counts;
  size_t count;
  double scale, norm;           // the gradients', where the host knows them: see Settings::gradient_factor
  const float* gradient_scale;  // on the device, in place of `scale`; or null
  const double* gradient_norm;  // likewise in place of `norm`
  const float* found_inf;       // on the device, or null: no step is counted unless it is 0
  Prepared* out;                // on the device, one for each count
};

// Counts the steps, moves the numbers on and computes the scalars of each parameter.
void prepare(const Preparation&, Stream);

}  // namespace trainopt::cuda
