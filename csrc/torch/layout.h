// One order of elements for tensors of one shape.
#pragma once

#include <c10/core/TensorImpl.h>

#include <deque>
#include <vector>

#include "core/tensor_view.h"
#include "rules/task.h"

namespace trainopt::aten {

struct Arranged {
  const c10::TensorImpl* tensor;
  TensorView* view;
};

// Gives the views layouts in one common order of elements: the first tensor's order in memory, or the logical one. A
// view that is one run in that order stays without. False if the order takes more dimensions than an engine has; then
// nothing has been changed.
bool arrange(const std::vector<Arranged>& operands, bool logical_order, std::deque<Layout>* layouts);

// How a DTensor's local tensor lies in the whole that it is a part of.
struct Shard {
  int64_t kind;                        // the same for the same mesh and placements
  bool is_pending;                     // the whole is a sum over a mesh that is still to be taken
  bool is_elsewhere;                   // this process is outside of the mesh, and has nothing of the tensor
  std::vector<int64_t> cuts;           // which dimensions are spread over processes, the same on all of them
  std::vector<int64_t> sizes, offset;  // of the whole; and where in it the local tensor begins
  bool is_block;                       // `offset` tells it: the local tensor is one block of the whole

  // Whether every process has the whole.
  bool is_replica() const { return is_block && cuts.empty(); }
};

// Where the elements of a shard, of these sizes, lie in the whole; null in `layout` where it is the whole. False if
// that takes more dimensions than an engine has.
bool lay_shard(const Shard& shard, c10::IntArrayRef sizes, std::deque<ShardLayout>* layouts,
               const ShardLayout** layout);

}  // namespace trainopt::aten
