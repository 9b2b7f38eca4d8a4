// Memory for large gradients.
//
// A large tensor is a fresh mapping each time, and the system maps its pages as they are first written: four kilobytes
// at a time, which takes several times as long as the writing itself. Huge pages are 512 times fewer.
#pragma once

#include <ATen/core/Tensor.h>

namespace trainopt::python {

// A contiguous CPU tensor, or one in the order in memory of another (as at::empty_like). Large ones are advised to huge
// pages before they are touched, where the system has them; the environment variable TRAINOPT_HUGE_PAGES=0 switches
// that off.
at::Tensor fresh(c10::IntArrayRef sizes, c10::ScalarType dtype);
at::Tensor fresh_like(const at::Tensor& tensor, c10::ScalarType dtype);

}  // namespace trainopt::python
