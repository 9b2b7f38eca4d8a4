// Float32 numbers in two tensors: the 16-bit one that a model computes with, and beside it what that lacks. And
// rounding at random, which needs no second tensor. Everything is free of branches, as in core/dtype.h.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/lanes.h"
#include "core/macros.h"

namespace trainopt {

// The bits of a number: those of a bfloat16 in the upper half, and what is added to them. Whoever writes the bfloat16
// alone moves the number to within half a unit in its last place; a zero or an infinity that is written so stays one,
// for beyond them in the order of bits are NaNs. Takes numbers, or vectors of them.
template <class W>
TRAINOPT_FUNCTION W join(W upper, W rest) {
  const W bits = upper + rest, is_nan = mask_where_nan(bits);
  return (upper & is_nan) | (bits & ~is_nan);
}

// The bits with every NaN one that has nothing in the lower half.
template <class W>
TRAINOPT_FUNCTION W without_payload(W bits) {
  const W is_nan = mask_where_nan(bits);
  return (bits & ~is_nan) | (((bits & 0xffff0000u) | 0x400000u) & is_nan);
}

// Of such bits the nearest bfloat16 is the upper half of these; of two the larger in magnitude. The lower half is the
// rest.
template <class W>
TRAINOPT_FUNCTION W nearest_upper(W bits) {
  return bits + 0x8000u;
}

// Such bits rounded to their first 24, to nearest, of two the larger in magnitude; what is behind those does not count.
template <class W>
TRAINOPT_FUNCTION W rounded_to_24(W bits) {
  return bits + 0x80u;
}

// The float32 that a copy beside a float16 holds, unless somebody has written another number to the float16.
TRAINOPT_FUNCTION float join_copy(Float16 stored, float copy) {
  return to_float16(copy).bits == stored.bits ? copy : to_float(stored);
}

// Rounded at random to a number that bfloat16 or float16 holds: up, in magnitude, with the probability of how far it is
// on the way there. `random` is one of 65,536 equally likely numbers, of which float16 uses the upper 13 bits.
TRAINOPT_FUNCTION float round_at_random(float x, uint32_t random, BFloat16) {
  const uint32_t bits = bits_of(x);
  return float_of((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : (bits + random) & 0xffff0000u);
}

TRAINOPT_FUNCTION float round_at_random(float x, uint32_t random, Float16) {
  const uint32_t bits = bits_of(x), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + (random >> 3)) & 0xffffe000u;
  // A subnormal number is a whole count of 2^-24, below 1024.
  const float count =
      float_of(magnitude) * 16777216.0f + static_cast<float>(static_cast<int32_t>(random >> 3)) * 1.220703125e-4f;
  const bool is_subnormal = magnitude < 0x38800000u;
  const float whole = static_cast<float>(static_cast<int32_t>(is_subnormal ? count : 0.0f));
  const uint32_t rounded = is_subnormal ? bits_of(whole * 5.9604644775390625e-8f) : normal;
  return float_of(magnitude > 0x7f800000u ? bits | 0x400000u : sign | (magnitude == 0x7f800000u ? magnitude : rounded));
}

}  // namespace trainopt
