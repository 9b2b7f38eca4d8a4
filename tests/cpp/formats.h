// The storage types by the definition of their fields, in double: what the engines' conversions are compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "core/dtype.h"

namespace trainopt {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

struct Format {
  const char* name;
  int fraction, smallest_exponent, largest_exponent;
};

inline Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return {"float32", 23, -126, 127};
    case DType::kFloat64: return {"float64", 52, -1022, 1023};
    case DType::kBFloat16: return {"bfloat16", 7, -126, 127};
    case DType::kFloat16: return {"float16", 10, -14, 15};
    default: break;
  }
  std::abort();
}

// The distance between neighbours round x.
inline double spacing(double x, DType dtype) {
  const Format format = format_of(dtype);
  const int exponent = x == 0 ? format.smallest_exponent : std::ilogb(x);
  return std::ldexp(1.0, std::max(exponent, format.smallest_exponent) - format.fraction);
}

// The value of a 16-bit number, by the definition of its fields.
inline double decode16(uint16_t bits, DType dtype) {
  const Format format = format_of(dtype);
  const int exponent_bits = 15 - format.fraction;
  const int exponent = (bits >> format.fraction) & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << format.fraction) - 1);
  const double sign = bits & 0x8000u ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(fraction, format.smallest_exponent - format.fraction);
  return sign *
         std::ldexp(fraction + (1 << format.fraction), exponent - 1 + format.smallest_exponent - format.fraction);
}

// The nearest number of a 16-bit type, ties to even, by arithmetic in double.
inline double round16(double x, DType dtype) {
  if (!std::isfinite(x)) return x;
  const Format format = format_of(dtype);
  const double step = spacing(x, dtype);
  const double rounded = std::nearbyint(x / step) * step;
  const double largest = (2 - std::ldexp(1.0, -format.fraction)) * std::ldexp(1.0, format.largest_exponent);
  return std::fabs(rounded) > largest ? std::copysign(HUGE_VAL, x) : rounded;
}

// Whether `found` is `exact` rounded once, but for the arithmetic's own error.
inline bool is_close(double found, double exact, DType dtype, bool is_float64, double scale) {
  const double arithmetic = (is_float64 ? 0x1p-52 : 0x1p-23) * 16 * (scale + std::fabs(exact));
  return std::fabs(found - exact) <= 0.5 * spacing(exact, dtype) + arithmetic;
}

inline double sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }

inline bool same_value(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

inline uint16_t convert(float x, DType dtype) {
  return dtype == DType::kBFloat16 ? to_bfloat16(x).bits : to_float16(x).bits;
}

inline float convert(uint16_t bits, DType dtype) {
  return dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

}  // namespace trainopt
