// The part of a step that lies on CUDA devices. A build without CUDA has one that is always empty.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/engine.h"
#include "torch/cuda_device.h"
#include "torch/layout.h"
#include "torch/optim/group_values.h"

namespace trainopt::aten {

// Makes the sums of this process's shards those of the whole tensors. `sums` has as many rows for each tensor as `rows`
// says, one where it is empty; its elements are doubles, or pairs of such, see core/sum.h. A null shard is that of a
// tensor which no other process has a part of.
using AddShards = std::function<void(const at::Tensor& sums, const std::vector<const Shard*>& shards,
                                     const std::vector<int64_t>& rows)>;

// What is left on the device for a step; undefined where there is none.
struct DeviceScaling {
  at::Tensor gradient_scale;  // GradScaler's, in place of GradientScaling::scale
  at::Tensor norm;            // in place of GradientScaling::norm, in float64
  at::Tensor found_inf;       // nothing is done unless it is 0

  bool exists() const { return changes_scalars() || found_inf.defined(); }
  bool changes_scalars() const { return gradient_scale.defined() || norm.defined(); }
};

// A parameter's numbers in its state: all on the host or all on its device, and of one type.
struct HeldNumbers {
  int count = 0;
  void* data[kMaxNumbers] = {};
  bool on_host = false, on_device = false;  // neither where there are none
  Numbers values{};                         // on the host: as the step before has left them

  void read();
  void write(const Numbers& moved) const;
};

// The count of a parameter's steps.
struct StepCount {
  void* on_device = nullptr;  // null: the host has counted, or the rule counts none
  bool is_double = false;     // on the device: float64 or float32
  double step = 0;            // by the host, with this step
  bool on_host = false;
};

// What a step has found out about parameters on a device: a row of float64 for each, as cuda::tell has it.
struct ToldOnDevice {
  at::Tensor rows;
  std::vector<uint32_t> tensors;  // whose they are
};

// Where a CudaBatch has a parameter.
struct CudaPlace {
  int part = -1;  // -1: nowhere
  int64_t index = 0;
};

#if defined(TRAINOPT_WITH_CUDA)

class CudaBatch {
 public:
  explicit CudaBatch(const cpu::Rule& rule) : rule_(rule) {}

  void clear();
  bool empty() const { return devices_.empty(); }

  // Notes a device that is written to; RuntimeError if there are no kernels for it.
  void visit(c10::Device);
  // Where it has its place then; none for a tensor without elements of which nothing is to be done on the device.
  // `group` and `shard`, of a DTensor or null, must live as long as the step.
  CudaPlace add(const TensorTask&, const GroupValues* group, c10::Device, bool is_float64, bool first, const StepCount&,
                const HeldNumbers&, const Shard* shard);

  // For a step of the same parameters as the last: what has been added.
  const TensorTask& task(CudaPlace place) const { return parts_[place.part].tasks[place.index]; }
  // Likewise: where the gradient is now. Several threads may each set their own.
  void set_gradient(CudaPlace place, void* data);
  // Likewise: each parameter's step is the one after its last. False if `recount` must be told of each all the same.
  // `is_scaled`: by what lies on the device.
  bool advance(bool is_scaled);
  // Likewise: the count with this step and the numbers where the host keeps them. The states are no longer new.
  void recount(CudaPlace place, double step, const HeldNumbers& numbers);

  // Whether any count of steps or number is kept by the host, which must know then whether this step is skipped.
  bool counts_on_host() const { return counts_on_host_; }
  // Whether one of the devices' streams is being captured into a CUDA graph.
  bool is_captured() const;

  // How many devices there are to step on, each arithmetic counted.
  size_t part_count() const { return parts_.size(); }
  // The last step's sums over all tensors, of a rule that has such, if there is one part. Waits for the device.
  std::vector<Sum> sums_over_all() const;

  // Whether the rule's sums are over tensors of which other processes hold parts.
  bool sums_over_shards() const { return sums_over_shards_; }

  // What the last step has found out, until it is forgotten. Waits for no device.
  const std::vector<ToldOnDevice>& stats() const { return told_; }
  void forget_stats() { told_.clear(); }

  // Launches the step. `add_shards` is called where a rule with a reduce phase meets DTensors.
  void run(const GradientScaling&, const DeviceScaling&, const AddShards& add_shards);

 private:
  // What a task's scalars are prepared from.
  struct Source {
    const GroupValues* group;
    bool first;
    StepCount count;
    HeldNumbers numbers;
    const Shard* shard;

    bool is_first() const { return first || (count.on_host && count.step == 1); }
  };

  // Parameters that follow each other and share their scalars, which the host prepares.
  struct Run {
    const GroupValues* group;
    double step;
    bool counts, first;
    Numbers numbers;
  };

  // The parameters of one device and one arithmetic.
  struct Part {
    c10::Device device;
    bool is_float64;
    std::vector<cuda::TensorTask> tasks;
    std::vector<Source> sources;     // of the tasks
    std::vector<uint32_t> measured;  // the tensors of those that are

    // How the last step was made, for one of the same parameters: as it stands, only gradients and scalars change.
    enum class By { kUnknown, kHost, kDevice, kBoth } by = By::kUnknown;  // who prepares the scalars
    bool was_scaled = false;                                              // by what lies on the device
    std::vector<Run> runs;                                                // by the host
    std::vector<cuda::Count> counts;                                      // by the device
    std::vector<const GroupValues*> groups;                               // likewise
    bool has_first = false;                                               // likewise: states that were new
    std::unique_ptr<cuda::StepTables> tables;
    at::Tensor memory;              // of the scalars on the device
    cuda::Stream stream = nullptr;  // on which that is used

    Part(c10::Device of, bool is_double) : device(of), is_float64(is_double) {}
    void forget();
    void find_runs();
    void find_counts();
  };

  // What the parts of a step share.
  struct Step {
    const GradientScaling& scaling;
    const DeviceScaling& on_device;
    const AddShards& add_shards;
    at::Tensor* over_all;             // where sums over all tensors are to be kept
    std::vector<ToldOnDevice>* told;  // where stats are
  };

  const cpu::Rule& rule_;
  std::vector<Part> parts_;
  std::vector<c10::Device> devices_;
  at::Tensor over_all_;
  std::vector<ToldOnDevice> told_;
  bool counts_on_host_ = false, sums_over_shards_ = false;
  std::atomic<bool> gradients_stay_aligned_ = true;  // as they were when the tables were filled

  cuda::Prepared* scalars_on(Part&, size_t count, cuda::Stream, std::vector<at::Tensor>* kept) const;
  void run_part(Part&, const Step&) const;
  void run_by_host(Part&, const Step&) const;
  void run_by_device(Part&, const Step&) const;
  void update(Part&, const cuda::Prepared*, bool on_device, const float* found_inf, const Step&, cuda::Stream) const;
  void launch_update(Part&, const cuda::Update&, bool keeps_tables, const Step&, cuda::Stream) const;
};

#else

class CudaBatch {
 public:
  explicit CudaBatch(const cpu::Rule&) {}
  void clear() {}
  bool empty() const { return true; }
  void visit(c10::Device) {}
  CudaPlace add(const TensorTask&, const GroupValues*, c10::Device, bool, bool, const StepCount&, const HeldNumbers&,
                const Shard*) {
    return {};
  }
  const TensorTask& task(CudaPlace) const { return none_; }
  void set_gradient(CudaPlace, void*) {}
  bool advance(bool) { return true; }
  void recount(CudaPlace, double, const HeldNumbers&) {}
  bool counts_on_host() const { return false; }
  bool is_captured() const { return false; }
  size_t part_count() const { return 0; }
  std::vector<Sum> sums_over_all() const { return {}; }
  bool sums_over_shards() const { return false; }
  std::vector<ToldOnDevice> stats() const { return {}; }
  void forget_stats() {}
  void run(const GradientScaling&, const DeviceScaling&, const AddShards&) {}

 private:
  TensorTask none_;
};

#endif

}  // namespace trainopt::aten
