// A list of plain tensors of one device, for what works on all of them at once, in any order of elements.
#pragma once

#include <ATen/core/Tensor.h>

#include <deque>
#include <vector>

#include "core/tensor_view.h"

namespace trainopt::aten {

struct TensorList {
  struct Item {
    TensorView view;
    int64_t numel;
    c10::TensorImpl* tensor;
  };
  std::vector<Item> items;
  int64_t elements = 0;

  // The device of all; without tensors, the CPU.
  c10::Device device() const { return items.empty() ? c10::Device(c10::kCPU) : items[0].tensor->device(); }

  // Adds a tensor. False if an engine does not take it: what is not plain, of a type that is not stored, or on another
  // device than the first. RuntimeError, which begins with `kind` and `index`, for one whose memory is gone.
  bool add(const char* kind, size_t index, const at::Tensor& tensor, bool writes);

  bool share_memory() const;

  // The dtype of the norm of all: what torch promotes theirs to, but float32 for 16-bit tensors, in whose dtype it may
  // be infinite (float16) or moves in steps of 1/256 of itself (bfloat16).
  at::ScalarType norm_dtype() const;

 private:
  std::deque<Layout> layouts_;
};

}  // namespace trainopt::aten
