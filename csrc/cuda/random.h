// Random numbers of a step's elements, from their places in the whole tensor: the CPU engine's own bits.
#pragma once

#include "core/master.h"
#include "core/random.h"
#include "cuda/launch.h"
#include "cuda/table.h"
#include "rules/stages.h"

namespace trainopt::cuda {

// Standard normal values of elements [at, at + 4), `at` a multiple of 4.
template <class S>
__device__ __forceinline__ void gaussian_quad(S (&out)[4], const Stages<S>& stages, uint32_t step, uint32_t tensor,
                                              int64_t at) {
  const RandomWords r = random_words(stages.seed, step, tensor, RandomStream::kNoise, static_cast<uint64_t>(at / 4));
  const GaussianPair one = gaussian_pair(r.word[0], r.word[1]), two = gaussian_pair(r.word[2], r.word[3]);
  out[0] = static_cast<S>(one.first);
  out[1] = static_cast<S>(one.second);
  out[2] = static_cast<S>(two.first);
  out[3] = static_cast<S>(two.second);
}

__device__ __forceinline__ float gaussian_one(uint64_t seed, uint32_t step, uint32_t tensor, int64_t at) {
  const RandomWords r = random_words(seed, step, tensor, RandomStream::kNoise, static_cast<uint64_t>(at / 4));
  const bool late = (at & 2) != 0;
  const GaussianPair pair = gaussian_pair(late ? r.word[2] : r.word[0], late ? r.word[3] : r.word[1]);
  return (at & 1) != 0 ? pair.second : pair.first;
}

// A number that a 16-bit type holds; 16 of the bits are used.
__device__ __forceinline__ float rounded_at_random(float x, uint32_t bits, DType dtype) {
  return dtype == DType::kBFloat16 ? round_at_random(x, bits & 0xffffu, BFloat16())
                                   : round_at_random(x, bits & 0xffffu, Float16());
}

// The bits of elements [at, at + 8), `at` a multiple of 8: two elements' in each word.
__device__ __forceinline__ RandomWords rounding_words(uint64_t seed, uint32_t step, uint32_t tensor, int64_t at) {
  return random_words(seed, step, tensor, RandomStream::kRounding, static_cast<uint64_t>(at / kItem));
}
__device__ __forceinline__ uint32_t rounding_bits_one(uint64_t seed, uint32_t step, uint32_t tensor, int64_t at) {
  const RandomWords r = rounding_words(seed, step, tensor, at);
  const uint32_t early = (at & 2) != 0 ? r.word[1] : r.word[0], late = (at & 2) != 0 ? r.word[3] : r.word[2];
  return ((at & 4) != 0 ? late : early) >> ((at & 1) != 0 ? 16 : 0);
}

}  // namespace trainopt::cuda
