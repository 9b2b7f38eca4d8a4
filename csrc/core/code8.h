// Numbers in one byte: for each block of 256 a float32 scale, and for each number the nearest of so many multiples of
// it.
//
// Like floating-point numbers, the multiples lie the closer to each other the smaller they are, and in a block whose
// numbers are of many magnitudes less so than in another: there are 2^shift powers of two after which there are half as
// many multiples between one and the next, with a shift of 0 (multiples at equal distances) to 3. A code q stands for
// the float of which the bits are those of the float q + 2^shift, times a power of two, shifted left by the shift. From
// one code to the next that grows by a constant within each power of two, so to round the bits shifted back is to find
// the nearest. Each block has the shift that suits it, in the last two bits of its scale. docs/optimizers.md has what
// this and other codes were measured to lose. Steps round second moments to nearest only in the mean over them: see
// code_rounding.
//
// A number that is not finite makes the scale NaN, and with it the whole block. A number above 0 in the unsigned code
// is never stored as 0: it would be divided by. A block of nothing but subnormal numbers is one of zeros.
//
// Each function takes numbers, or vectors of them for which an engine has the functions of core/lanes.h.
#pragma once

#include <cstdint>

#include "core/lanes.h"
#include "core/macros.h"

namespace trainopt {

constexpr int64_t kCodeBlock = 256;
constexpr int64_t scales_of(int64_t numel) { return (numel + kCodeBlock - 1) / kCodeBlock; }

// A sign before seven bits; and eight bits. Codes 1 ... kTop stand for numbers above 0.
struct SignedCode {
  static constexpr int kTop = 127, kTopExponent = 7;
};
struct UnsignedCode {
  static constexpr int kTop = 255, kTopExponent = 8;
};

// The place of a code is the float q + 2^shift times a unit: the power of two with which the exponent of the largest
// place, shifted left, is that of 2. So multiples are below 4, and nothing has to be added to the shifted bits.
template <class Code>
struct Places {
  int shift;

  TRAINOPT_INLINE float offset() const { return static_cast<float>(1 << shift); }
  TRAINOPT_INLINE uint32_t unit_exponent() const { return static_cast<uint32_t>((128 >> shift) - Code::kTopExponent); }
  TRAINOPT_INLINE float unit() const { return float_of(unit_exponent() << 23); }
  TRAINOPT_INLINE float last() const { return (offset() + Code::kTop) * unit(); }
  TRAINOPT_INLINE float largest_multiple() const { return float_of(bits_of(last()) << shift); }
};

// What a block is decoded with.
struct Decoding {
  int shift;
  uint32_t whole;  // with a code added, a float of as many units above `origin`
  float origin, scale;

  template <class W>
  TRAINOPT_INLINE auto number(W code) const {
    const auto place = float_of(code + whole) - float_like(code, origin);
    return float_of(where_not_0(code, bits_of(place) << shift)) * float_like(code, scale);
  }
};

// `stored`: the block's scale with the shift in it.
template <class Code>
TRAINOPT_FUNCTION Decoding decoding_of(Code, float stored) {
  const uint32_t bits = bits_of(stored);
  const int shift = static_cast<int>(bits & 3u);
  const uint32_t origin = (Places<Code>{shift}.unit_exponent() + 23) << 23;
  return {shift, origin + (1u << shift), float_of(origin), float_of(bits & ~3u)};
}

template <class W>
TRAINOPT_FUNCTION auto decode(SignedCode, const Decoding& decoding, W code) {
  const auto x = decoding.number(code & 0x7fu);
  return float_of((bits_of(x) & 0x7fffffffu) | ((code << 24) & 0x80000000u));
}
template <class W>
TRAINOPT_FUNCTION auto decode(UnsignedCode, const Decoding& decoding, W code) {
  return decoding.number(code);
}

// What decides on a block's scale and shift, over the bits of its numbers' magnitudes, in any order: the largest one,
// which a NaN is, and for numbers that are divided by the least one above 0, less 1, which makes 0 the largest; for
// numbers that are added up the sum of the bits but for the last 15. W is a word, or lanes that are combined at the
// end.
template <class W>
struct Statistics {
  W largest, other;
};
constexpr int kDropped = 15;  // so that the sum over a block fits into a word

template <class W>
TRAINOPT_FUNCTION Statistics<W> no_numbers(SignedCode) {
  return {W(0u), W(0u)};
}
template <class W>
TRAINOPT_FUNCTION Statistics<W> no_numbers(UnsignedCode) {
  return {W(0u), W(0xffffffffu)};
}
template <class W>
TRAINOPT_FUNCTION W combined_others(SignedCode, W a, W b) {
  return a + b;
}
template <class W>
TRAINOPT_FUNCTION W combined_others(UnsignedCode, W a, W b) {
  return smaller(a, b);
}
template <class W>
TRAINOPT_FUNCTION void add_magnitude(SignedCode, Statistics<W>& to, W bits) {
  to = {larger(to.largest, bits), to.other + (bits >> kDropped)};
}
template <class W>
TRAINOPT_FUNCTION void add_magnitude(UnsignedCode, Statistics<W>& to, W bits) {
  to = {larger(to.largest, bits), smaller(to.other, bits - 1u)};
}

// Which shift a block of `count` numbers calls for. Those that are added up always have small ones among them: what
// counts is whether they are within three powers of two of the largest in the mean of their logarithms, as even noise
// is. Of those that are divided by, all matter alike: there are 16 multiples or more to a power of two at the least of
// them, if there can be.
TRAINOPT_FUNCTION int shift_of(SignedCode, const Statistics<uint32_t>& of, int count) {
  const uint32_t top = of.largest >> kDropped, near = 3u << (23 - kDropped);
  return top > near && of.other >= static_cast<uint32_t>(count) * (top - near) ? 1 : 2;
}
TRAINOPT_FUNCTION int shift_of(UnsignedCode, const Statistics<uint32_t>& of, int) {
  const uint32_t span = of.other < of.largest ? of.largest - of.other - 1 : 0;  // in powers of two, times 2^23
  return span <= 4u << 23 ? 0 : span <= 13u << 22 ? 1 : span <= 10u << 23 ? 2 : 3;
}

// How a step t = 1, 2, … rounds second moments. The nearest code would be the same one step after the other where a
// moment decays: it loses a thousandth in a step, and half the way to the next code is often over a hundredth. So what
// has to be passed is another part of the way in each step, by the golden ratio's multiples, which fill it evenly: in
// the mean over the steps a moment is rounded to itself. 0, for the nearest, without a count of steps.
TRAINOPT_FUNCTION float code_rounding(uint32_t step) {
  const float part = static_cast<float>(static_cast<int32_t>((step * 0x9E3779B9u) >> 8)) * 5.9604644775390625e-8f;
  const float within = held_within(part, 0.015625f, 0.984375f);
  return step == 0 ? 0.0f : within - 0.5f;
}

// What a block is encoded with.
struct Encoding {
  int shift;
  float stored;             // the scale, with the shift in its last bits
  float inverse;            // of the scale
  float first, last, zero;  // the places of the first and the last code, and where it is nearer to 0 than to the first
  // How far a place is moved on towards the next code. Then, added to the rounder, it is rounded to a whole number of
  // units, to nearest, and its code is in the last bits.
  float rounding, rounder;

  template <class F>
  TRAINOPT_INLINE F place_of(F magnitude) const {
    return float_of(bits_of(magnitude * F(inverse)) >> shift);
  }
};

// Of a block of `count` numbers. `to_next`: see code_rounding; of the unsigned code.
template <class Code>
TRAINOPT_FUNCTION Encoding encoding_of(Code code, const Statistics<uint32_t>& of, int count, float to_next) {
  const bool is_zero = of.largest < 0x01800000u, is_finite = of.largest < 0x7f800000u;  // 2^-124
  const int shift = is_zero ? 0 : shift_of(code, of, count);
  const Places<Code> places{shift};
  const uint32_t scale = bits_of(float_of(of.largest) / places.largest_multiple()) & ~3u;
  const uint32_t stored = is_zero ? 0u : is_finite ? scale | static_cast<uint32_t>(shift) : 0x7fc00000u;
  const float unit = places.unit();
  return {shift,
          float_of(stored),
          is_zero || !is_finite ? 0.0f : 1 / float_of(scale),
          (places.offset() + 1) * unit,
          places.last(),
          places.offset() * unit,
          to_next * unit,
          (8388608.0f - places.offset()) * unit};
}

// In the lower byte of a word.
template <class F>
TRAINOPT_FUNCTION auto encode(SignedCode, const Encoding& with, F x) {
  const auto bits = bits_of(x);
  const F place = with.place_of(float_of(bits & 0x7fffffffu));
  const auto code = bits_of(held_within(place, with.first, with.last) + F(with.rounder));
  return (where_larger(place, with.zero, code) & 0x7fu) | ((bits >> 24) & 0x80u);
}
template <class F>
TRAINOPT_FUNCTION auto encode(UnsignedCode, const Encoding& with, F x) {
  const auto magnitude = bits_of(x) & 0x7fffffffu;
  const F place = held_within(with.place_of(float_of(magnitude)), with.first, with.last);
  return where_not_0(magnitude, bits_of((place + F(with.rounding)) + F(with.rounder)));
}

}  // namespace trainopt
