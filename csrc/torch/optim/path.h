// Which way a parameter takes through a step, and why.
#pragma once

namespace trainopt::aten {

enum class Path {
  kFused,
  kSubclass,
  kDifferentiable,
  kOptions,
  kDevice,
  kDtype,
  kGradient,
  kStateForm,
  kStateValue,
  kPlacement,
  kPending,  // none: there is no step of a sum that is still to be taken
  kFactors,  // of a tensor that other processes hold parts of
  kMemory,
  kTogether,
  kInference,
  kMode,
  kNoMemory,  // none: torch's kernels would end the process
};
const char* describe(Path);

}  // namespace trainopt::aten
