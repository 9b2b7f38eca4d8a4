// A list of plain tensors of one device, for what works on all of them at once, in any order of elements.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <deque>
#include <vector>

#include "core/tensor_view.h"

namespace trainopt::python {

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

  // Reads a list of tensors, or of parameters with or without gradients. False if there is one that an engine does not
  // take (what is not plain, of a type that is not stored, or on another device than the first), or a mode that must
  // see what is done with them.
  bool collect(const pybind11::list& objects, bool of_gradients, bool writes);

  bool share_memory() const;

  // The dtype of the norm of all: what torch promotes theirs to, but float32 for 16-bit tensors, in whose dtype it may
  // be infinite (float16) or moves in steps of 1/256 of itself (bfloat16).
  at::ScalarType norm_dtype() const;

 private:
  std::deque<Layout> layouts_;

  bool add(const at::Tensor& tensor, bool writes);
};

}  // namespace trainopt::python
