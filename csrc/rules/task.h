// One parameter in a step, as both engines take it.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "rules/rule.h"

namespace trainopt {

// Where the elements of a shard lie in the whole that it is a part of: the one of index (i_0, ...) in a row-major array
// of the layout's sizes is number offset + i_0 * strides[0] + ... of the whole.
struct ShardLayout {
  int64_t offset;
  Layout layout;
};

struct TensorTask {
  int64_t numel;
  TensorView param, gradient;
  uint32_t tensor;                     // its index in the optimizer, for the random numbers
  const ShardLayout* shard = nullptr;  // likewise: null for a whole
  // In the rule's order, then the moving average; without data where the options call for none.
  TensorView state[kMaxViews];
  int64_t numel_of_whole = -1;  // -1: `numel`, where it is no shard

  TRAINOPT_INLINE int64_t whole_numel() const { return numel_of_whole < 0 ? numel : numel_of_whole; }
};

// The states of the rule's that a task has.
template <class Rule>
TRAINOPT_FUNCTION StateSet states_of(const TensorTask& task) {
  StateSet set = 0;
  for (int s = 0; s < kStateCount<Rule>; ++s) set |= static_cast<StateSet>((task.state[s].data != nullptr) << s);
  return set;
}

}  // namespace trainopt
