// The element types that tensors are stored in, and the scalar conversions to and from the 16-bit ones.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace trainopt {

enum class DType : uint8_t {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  // Float32 numbers in two tensors: a parameter as its model sees it, and beside it what that lacks.
  kMaster16,    // bfloat16, and the lower 16 bits
  kMaster24,    // bfloat16, and the next 8 bits
  kMasterCopy,  // float16, and the float32 itself
  // One byte for an element, and beside it a float32 scale for each 256 of them: core/code8.h.
  kSigned8,
  kUnsigned8,
  // No element is stored: core/factored.h, which the data are.
  kFactored,
};
TRAINOPT_FUNCTION constexpr bool is_16_bit(DType dtype) {
  return dtype == DType::kBFloat16 || dtype == DType::kFloat16;
}
TRAINOPT_FUNCTION constexpr bool has_codes(DType dtype) {
  return dtype == DType::kSigned8 || dtype == DType::kUnsigned8;
}
TRAINOPT_FUNCTION constexpr bool has_master(DType dtype) {
  return dtype == DType::kMaster16 || dtype == DType::kMaster24 || dtype == DType::kMasterCopy;
}

// Stored as bits; arithmetic happens in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

TRAINOPT_FUNCTION constexpr DType dtype_of(float) { return DType::kFloat32; }
TRAINOPT_FUNCTION constexpr DType dtype_of(double) { return DType::kFloat64; }
TRAINOPT_FUNCTION constexpr DType dtype_of(BFloat16) { return DType::kBFloat16; }
TRAINOPT_FUNCTION constexpr DType dtype_of(Float16) { return DType::kFloat16; }

TRAINOPT_FUNCTION int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : dtype >= DType::kSigned8 ? 1 : 2;
}

// From 1 to the next number; of a parameter that has a master, which is a float32.
TRAINOPT_FUNCTION double epsilon_of(DType dtype) {
  return dtype == DType::kFloat64    ? 0x1p-52
         : dtype == DType::kBFloat16 ? 0x1p-7
         : dtype == DType::kFloat16  ? 0x1p-10
                                     : 0x1p-23;
}

TRAINOPT_FUNCTION uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

TRAINOPT_FUNCTION float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Each conversion is free of branches, so that a loop over it becomes vector code on every instruction set.

TRAINOPT_FUNCTION float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// Round to nearest, ties to even; a NaN stays a NaN (quiet).
TRAINOPT_FUNCTION BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

TRAINOPT_FUNCTION float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Normal numbers: move the fields and rebias the exponent by 127 - 15.
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  // Inf and NaN: the exponent is all ones in both formats.
  const uint32_t special = (magnitude << 13) | 0x7f800000u | (magnitude > 0x7c00u ? 0x400000u : 0u);
  // Subnormal numbers: an integer count of 2^-24.
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f);
  const uint32_t finite = magnitude < 0x400u ? subnormal : normal;
  return float_of(sign | (magnitude >= 0x7c00u ? special : finite));
}

// Round to nearest, ties to even; too large becomes infinite; a NaN stays a NaN (quiet).
TRAINOPT_FUNCTION Float16 to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves exactly the bits of a count of 2^-24 at the end of the fraction, rounded as wanted.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : 0x7c00u;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite))};
}

}  // namespace trainopt
