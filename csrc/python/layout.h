// One order of elements for tensors of one shape.
#pragma once

#include <c10/core/TensorImpl.h>

#include <deque>
#include <vector>

#include "core/tensor_view.h"

namespace trainopt::python {

struct Arranged {
  const c10::TensorImpl* tensor;
  TensorView* view;
};

// Gives the views layouts in one common order of elements: the first tensor's order in memory, or the logical one. A
// view that is one run in that order stays without. False if the order takes more dimensions than an engine has; then
// nothing has been changed.
bool arrange(const std::vector<Arranged>& operands, bool logical_order, std::deque<Layout>* layouts);

}  // namespace trainopt::python
