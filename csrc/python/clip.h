// Gradient clipping, over plain tensors of one device.
#pragma once

#include <pybind11/pybind11.h>

namespace trainopt::python {

// The norm of order 1, 2 or infinity over a list of tensors, or over the gradients of a list of parameters: exact, a
// float on the CPU and a 0-dimensional float64 tensor on CUDA; and as the tensor that torch gives. None if torch must
// do it.
pybind11::object norm_of(const pybind11::list& tensors, double order, bool of_gradients);

// Multiplies the gradients of a list of parameters so that their norm, exact as above, becomes at most `max_norm`.
// False, and nothing is changed, if torch must do it: as above, or gradients that share memory.
bool clip_gradients(const pybind11::list& parameters, double max_norm, const pybind11::object& norm);

// Brings every element of the gradients into [-limit, limit]; `limit` is at least 0. False likewise.
bool clamp_gradients(const pybind11::list& parameters, double limit);

}  // namespace trainopt::python
