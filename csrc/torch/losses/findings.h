// What kernels find that the host would have refused, had it looked: it is told of at the next call.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>

#if defined(TRAINOPT_WITH_CUDA)
#include "cuda/cross_entropy.h"
#endif

namespace trainopt::aten {

// Raises if a loss on any device has met what it does not take since it was last told of: IndexError for a target that
// is no class, RuntimeError for an input or a target of binary_cross_entropy that is no probability. Looks at what the
// devices have done so far, and forgets.
void check_findings();

#if defined(TRAINOPT_WITH_CUDA)

// Memory of the host's that a device's kernels write to.
struct Findings {
  cuda::BadTarget bad_target;
  int64_t bad_probability;  // 0: none; 1: an input; 2: a target; 3: both
  int64_t scaled;           // whether the last upstream gradient of a reduced cross-entropy was not 1
};

// Null while a first call is being captured into a graph, when no such memory can be made.
Findings* findings_of(c10::Device);

// As check_findings, of one device.
void check_findings_on(c10::Device);

#endif

}  // namespace trainopt::aten
