// How the losses of rows or elements become one number.
#pragma once

#include <cstdint>

namespace trainopt {

// The values are torch's (at::Reduction): the operators' schemas carry them as integers.
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

}  // namespace trainopt
