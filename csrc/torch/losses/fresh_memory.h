// Memory for large gradients.
//
// A large tensor is a fresh mapping each time it is made, and the system clears its pages as they are first written:
// for a gradient that takes several times as long as its arithmetic. So large memory that nobody holds any more is kept
// for the next tensor of its size, on huge pages where the system has them. It is marked as free to the system, which
// takes it back when it needs it (MADV_FREE).
//
// Environment: TRAINOPT_KEEP_MEMORY, in MiB, is how much is kept (1024; 0: nothing); TRAINOPT_HUGE_PAGES=0 asks for no
// huge pages.
#pragma once

#include <ATen/core/Tensor.h>

namespace trainopt::aten {

// A contiguous CPU tensor, or one in the order in memory of another (as at::empty_like), on its device; its elements
// are not set. Elsewhere than on the CPU it is torch's allocator that keeps memory.
at::Tensor fresh(c10::IntArrayRef sizes, c10::ScalarType dtype);
at::Tensor fresh_like(const at::Tensor& tensor, c10::ScalarType dtype);

}  // namespace trainopt::aten
