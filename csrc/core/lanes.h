// What is written once for numbers and for vectors of them, beside the operators that both have: an engine's vector
// type brings its own overloads.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace trainopt {

// One float for each word.
TRAINOPT_FUNCTION float float_like(uint32_t, float x) { return x; }

// Of words below 2^31; and of any.
TRAINOPT_FUNCTION uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
TRAINOPT_FUNCTION uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// All bits set where it is so.
TRAINOPT_FUNCTION uint32_t mask_where(bool condition) { return condition ? 0xffffffffu : 0u; }
// x where that is not 0; else 0.
TRAINOPT_FUNCTION uint32_t where_not_0(uint32_t that, uint32_t x) { return that != 0 ? x : 0u; }
TRAINOPT_FUNCTION uint32_t where_larger(float that, float limit, uint32_t x) { return that > limit ? x : 0u; }
TRAINOPT_FUNCTION uint32_t mask_where_nan(uint32_t bits) { return mask_where((bits & 0x7fffffffu) > 0x7f800000u); }

// The largest for NaN.
TRAINOPT_FUNCTION float held_within(float x, float least, float largest) {
  const float capped = x < largest ? x : largest;
  return capped > least ? capped : least;
}

}  // namespace trainopt
