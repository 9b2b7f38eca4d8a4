// Plain views of tensors: what an engine sees of one.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace trainopt {

constexpr int kMaxDims = 8;

// Where the elements of a view lie when they are not one run in memory: element i of the order in which the engine
// walks has the index (i_0, ..., i_{ndim-1}) of a row-major array of `sizes`.
struct Layout {
  int ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];  // in elements
};

struct TensorView {
  void* data;
  const Layout* layout;  // null: one run in memory, as whatever has something beside it is
  DType dtype;
  void* beside = nullptr;  // of a dtype in two tensors: the other one's data
};

}  // namespace trainopt
