// A torch device of the tests' own, "simt", that stands for CUDA's: see device.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace simt {

// What tests ask of the device, as a module `simt` within this one.
void bind_device(pybind11::module_);

}  // namespace simt
