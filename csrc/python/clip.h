// Gradient clipping by a norm, over plain CPU tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace trainopt::python {

// The norm of order 1, 2 or infinity over a list of tensors, or over the gradients of a list of parameters: (norm, its
// dtype), the dtype None where there is nothing to sum. None if torch must do it: a tensor that is not a plain one on
// the CPU of a type that the engine stores.
pybind11::object norm_of(pybind11::list tensors, double order, bool of_gradients);

// Multiplies the gradients of a list of parameters by a factor. False, and nothing is changed, if torch must do it: as
// above, or gradients that share memory.
bool scale_gradients(pybind11::list parameters, double factor);

}  // namespace trainopt::python
