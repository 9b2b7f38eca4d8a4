// DTensors as the plan sees them: the local tensor inside of each, and how it lies in the whole.
#pragma once

#include <c10/core/TensorImpl.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <unordered_map>
#include <vector>

#include "torch/optim/batch.h"

namespace trainopt::python {

using namespace aten;  // the layer below, which knows tensors and no Python

// Whether an object is a torch.distributed.tensor.DTensor, and of no subclass. Runs no Python code.
bool is_dtensor(PyObject* object);

// Of a DTensor: the tensor and the DTensorSpec in it, borrowed; null if there is none.
PyObject* local_of(PyObject* dtensor);
PyObject* spec_of(PyObject* dtensor);

class Specs;

// What is to be stepped for a DTensor.
struct Leaf {
  const c10::TensorImpl* local = nullptr;  // null for an object that is no DTensor, or whose spec is not known yet
  const c10::TensorImpl* outer = nullptr;  // the DTensor itself
  const Shard* shard = nullptr;
};
Leaf leaf_of(PyObject* object, Specs* specs);

// Whether two DTensors are of one mesh and have the same placements and sizes.
bool have_same_placements(const Leaf& a, const Leaf& b);

// What Python has said of the specs that the tensors of the last step had. Only Python code can tell whether two meshes
// are the same, so it is asked between two walks, once for each spec.
class Specs {
 public:
  // Null for one that is not known yet; then it is one to be learnt.
  const Shard* find(PyObject* spec);

  // Asks for those that were met. Whether there were any: then Python code has run, and all must be looked at again.
  bool learn();

  // Adds up the sums of shards over the processes that hold them: see AddShards. Runs Python code, and waits for the
  // other processes.
  void add_shards(const at::Tensor& sums, const std::vector<const Shard*>& shards,
                  const std::vector<int64_t>& rows) const;

  // Forgets what the last walk has not found. Lets go of Python's objects, which may run Python code.
  void forget_unused();

 private:
  struct Known {
    pybind11::object spec;  // owned, so that its address stays its own
    Shard shard;
    bool used;
  };
  std::unordered_map<PyObject*, Known> known_;
  std::vector<pybind11::object> placements_;  // what is equal for tensors of one mesh and placements, by Shard::kind
  std::vector<pybind11::object> strangers_;
};

}  // namespace trainopt::python
