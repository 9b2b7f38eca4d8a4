// The emulated device for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace simt {

// What tests ask of the device, as a module `simt` within this one, and as torch.simt.
void bind_device(pybind11::module_);

}  // namespace simt
