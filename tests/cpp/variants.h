// The SIMD variants that this build has and this processor can run.
#pragma once

#include <vector>

#include "cpu/engine.h"

namespace trainopt {

inline std::vector<cpu::Variant> variants() {
  std::vector<cpu::Variant> result;
  for (int v = 0; v < cpu::kVariants; ++v)
    if (cpu::supported(static_cast<cpu::Variant>(v))) result.push_back(static_cast<cpu::Variant>(v));
  return result;
}

}  // namespace trainopt
