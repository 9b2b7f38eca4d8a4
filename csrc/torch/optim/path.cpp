#include "torch/optim/path.h"

namespace trainopt::aten {

const char* describe(Path path) {
  switch (path) {
    case Path::kFused: return "";
    case Path::kSubclass: return "a tensor subclass, which may do its own thing with an in-place operation";
    case Path::kDifferentiable: return "differentiable=True";
    case Path::kOptions: return "an option that is no number, or beyond the range that the formulas hold in";
    case Path::kDevice: return "not a plain dense tensor on a device that there are kernels for";
    case Path::kDtype: return "not float32, float64, bfloat16 or float16";
    case Path::kGradient: return "a gradient that is sparse, lazily computed, or of another device, dtype or shape";
    case Path::kStateForm: return "a state of another device, layout or shape than the parameter";
    case Path::kStateValue: return "a state that is no tensor, or a count of steps below 0";
    case Path::kPlacement: return "a gradient or a state of another mesh, of other placements or of another class";
    case Path::kPending:
      return "a DTensor with a partial placement, a sum that is still to be taken, cannot be stepped in place:"
             " redistribute it first";
    case Path::kFactors: return "a shard that is no block of rows and columns, over which the engine takes sums";
    case Path::kMemory:
      return "memory that is not dense, that another parameter, gradient, state or option shares, or of over 8 "
             "dimensions";
    case Path::kTogether:
      return "its step depends on all parameters, of which the engine does not take one, or which lie on several "
             "devices";
    case Path::kInference: return "made in inference mode, outside of which torch does not write to it";
    case Path::kMode: return "a torch dispatch mode is active";
    case Path::kNoMemory: return "the storage of the parameter, its gradient or a state is smaller than the tensor";
  }
  return "";
}

}  // namespace trainopt::aten
