// Stores that go past the caches, and reads that are asked for early. Neither changes a bit of a result.
#pragma once

#include <cstdint>

#include "cpu/vec.h"

namespace trainopt::cpu {
namespace {

// How many elements there are up to the next one at which a register may be streamed to.
template <class Stored>
TRAINOPT_FUNCTION int64_t elements_to_boundary(const Stored* address) {
  constexpr uintptr_t kBytes = Register<Stored>::kSize * sizeof(Stored);
  return static_cast<int64_t>((0 - reinterpret_cast<uintptr_t>(address)) % kBytes / sizeof(Stored));
}

// Asks for the line of the cache so many bytes behind an address, which may be beyond what there is.
template <int kWrites>
TRAINOPT_FUNCTION void prefetch_behind(const void* address, uintptr_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) + bytes), kWrites);
}

constexpr uintptr_t kReadAhead = 2048;

#if defined(__SSE2__)

#if defined(__AVX512F__)
#define TRAINOPT_STREAM(to, bits) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)(bits))
#elif defined(__AVX2__)
#define TRAINOPT_STREAM(to, bits) _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)(bits))
#else
#define TRAINOPT_STREAM(to, bits) _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)(bits))
#endif

TRAINOPT_FUNCTION void stream(float* to, Vec<float> v) { TRAINOPT_STREAM(to, v.lanes); }
TRAINOPT_FUNCTION void stream(double* to, Vec<double> v) { TRAINOPT_STREAM(to, v.lanes); }
TRAINOPT_FUNCTION void stream(BFloat16* to, Pair v) {
  WordLanes words;
  store(reinterpret_cast<BFloat16*>(&words), v);
  TRAINOPT_STREAM(to, words);
}
#undef TRAINOPT_STREAM

// Others see what was streamed before this.
TRAINOPT_FUNCTION void finish_streaming() { _mm_sfence(); }

#else
template <class Stored, class V>
TRAINOPT_FUNCTION void stream(Stored* to, V v) {
  store(to, v);
}
TRAINOPT_FUNCTION void finish_streaming() {}
#endif

#if defined(__SSE2__)
TRAINOPT_FUNCTION void stream(Float16* to, Vec<float> v) { store(to, v); }  // half a register
#endif

}  // namespace
}  // namespace trainopt::cpu
