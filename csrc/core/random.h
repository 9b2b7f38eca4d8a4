// Random numbers from a counter: the value for (seed, step, tensor, element) is a pure function of these four, so it is
// the same for any number of threads, after a resume, in every replica and on every device.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace trainopt {

// Which of the independent random streams of one element is meant.
enum class RandomStream : uint32_t { kNoise = 0, kRounding = 1 };

struct RandomWords {
  uint32_t word[4];
};

// Philox-4x32 with 10 rounds: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
TRAINOPT_FUNCTION RandomWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// What the random numbers of a step are keyed by.
struct RandomKey {
  uint64_t seed;
  uint32_t step;
};

// Likewise of one tensor.
struct TensorKey {
  uint64_t seed;
  uint32_t step, tensor;
};

// `count` is the number of the step, a whole one. Its bits beyond 32 go into the seed: no step has another's numbers.
TRAINOPT_FUNCTION RandomKey random_key(uint64_t seed, double count) {
  const uint64_t whole = count >= 0 && count < 9007199254740992.0 ? static_cast<uint64_t>(count) : 0;
  return {seed + (whole >> 32) * 0x9E3779B97F4A7C15u, static_cast<uint32_t>(whole)};
}

// The four random words of elements 4*quad ... 4*quad+3 of a tensor at a step.
TRAINOPT_FUNCTION RandomWords random_words(uint64_t seed, uint32_t step, uint32_t tensor, RandomStream stream,
                                           uint64_t quad) {
  const uint32_t high = static_cast<uint32_t>(quad >> 32) | (static_cast<uint32_t>(stream) << 28);
  return philox(seed, static_cast<uint32_t>(quad), high, tensor, step);
}

// The functions below use only operations that IEEE 754 rounds exactly (no fused multiply-add, no library call but the
// square root), so that they give the same bits wherever they run.

// log(x) for x in (0, 1], error below 2 ulp: x = m * 2^e with m in [sqrt(1/2), sqrt(2)), and log(m) as
// 2*atanh(s), s = (m-1)/(m+1), by its series.
TRAINOPT_FUNCTION float log_of_uniform(float x) {
  const uint32_t bits = bits_of(x) - 0x3f3504f3u;  // the bits of sqrt(1/2)
  const float exponent = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float m = float_of((bits & 0x007fffffu) + 0x3f3504f3u);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float s2 = s * s;
  const float series = 0.66666666f + s2 * (0.40000000f + s2 * (0.28571430f + s2 * (0.22222222f + s2 * 0.18181818f)));
  return exponent * 0.69314718f + (2.0f * s + s * s2 * series);
}

struct GaussianPair {
  float first, second;
};

// Two independent standard normal values from 64 random bits (Box & Muller 1958). The radius uses the 32 bits of
// `a`, so values reach 6.7 standard deviations; the angle uses the top two bits of `b` for the quadrant and the
// next 24 for the place in it.
TRAINOPT_FUNCTION GaussianPair gaussian_pair(uint32_t a, uint32_t b) {
  const float u = static_cast<float>(static_cast<int32_t>(a >> 16)) * 1.52587890625e-5f +
                  (static_cast<float>(static_cast<int32_t>(a & 0xffffu)) + 0.5f) * 2.3283064365386963e-10f;
  const float radius = __builtin_sqrtf(-2.0f * log_of_uniform(u));
  // t in [-1/2, 1/2) quarter turns round the middle of the quadrant, x = t * pi/2.
  const float t = static_cast<float>(static_cast<int32_t>(b << 2) >> 8) * 5.9604644775390625e-8f;
  const float x = t * 1.57079633f;
  const float x2 = x * x;
  const float sine = x + x * x2 * (-0.16666667f + x2 * (8.3333310e-3f + x2 * (-1.9840874e-4f + x2 * 2.7525562e-6f)));
  const float cosine =
      1.0f + x2 * (-0.5f + x2 * (4.1666668e-2f + x2 * (-1.3888889e-3f + x2 * (2.4801587e-5f + x2 * -2.7557319e-7f))));
  // Rotate by the quadrant: swap for odd ones, then the signs.
  const bool odd = (b & 0x40000000u) != 0;
  const float along = odd ? -sine : cosine;
  const float across = odd ? cosine : sine;
  const float sign = (b & 0x80000000u) != 0 ? -1.0f : 1.0f;
  return {radius * (sign * along), radius * (sign * across)};
}

}  // namespace trainopt
