// A torch device of the tests' own, "simt", that stands for CUDA's: see device.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

namespace simt {

// What tests ask of the device, as a module `simt` within this one.
void bind_device(pybind11::module_);

// The tensor as the host sees it, at addresses of its own: for the work of streams.
at::Tensor on_host(const at::Tensor&);

// Of a stream, by its handle.
c10::Device device_of_stream(const void* stream);

}  // namespace simt
