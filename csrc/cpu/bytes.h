// Bytes as the words or the halves of words of a vector, and back. The compiler's own conversions between vector types
// of different sizes take bytes apart one by one.
#pragma once

#include <cstdint>

#include "cpu/vec.h"

namespace trainopt::cpu {
namespace {

constexpr int kWords = TRAINOPT_VECTOR_BYTES / 4;
typedef uint16_t HalfLanes __attribute__((vector_size(TRAINOPT_VECTOR_BYTES)));

#if defined(__AVX512F__)

TRAINOPT_FUNCTION WordLanes load_byte_words(const void* from) {
  return (WordLanes)_mm512_maskz_cvtepu8_epi32(-1, _mm_loadu_si128(static_cast<const __m128i*>(from)));
}
TRAINOPT_FUNCTION HalfLanes load_byte_halves(const void* from) {
  return (HalfLanes)_mm512_maskz_cvtepu8_epi16(-1, _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
// Of the lower byte of each.
TRAINOPT_FUNCTION void store_byte_words(void* to, WordLanes words) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(-1, (__m512i)words));
}
TRAINOPT_FUNCTION void store_byte_halves(void* to, HalfLanes halves) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_maskz_cvtepi16_epi8(-1, (__m512i)halves));
}

#elif defined(__AVX2__)

TRAINOPT_FUNCTION WordLanes load_byte_words(const void* from) {
  return (WordLanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
}
TRAINOPT_FUNCTION HalfLanes load_byte_halves(const void* from) {
  return (HalfLanes)_mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
TRAINOPT_FUNCTION void store_byte_halves(void* to, HalfLanes halves) {
  const __m256i bytes = _mm256_and_si256((__m256i)halves, _mm256_set1_epi16(0xff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(bytes, bytes), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
TRAINOPT_FUNCTION void store_byte_words(void* to, WordLanes words) {
  const __m256i bytes = _mm256_and_si256((__m256i)words, _mm256_set1_epi32(0xff));
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(static_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
}

#else

TRAINOPT_FUNCTION WordLanes load_byte_words(const void* from) {
  uint32_t words[kWords];
  for (int i = 0; i < kWords; ++i) words[i] = static_cast<const uint8_t*>(from)[i];
  WordLanes lanes;
  __builtin_memcpy(&lanes, words, sizeof lanes);
  return lanes;
}
TRAINOPT_FUNCTION HalfLanes load_byte_halves(const void* from) {
  uint16_t halves[2 * kWords];
  for (int i = 0; i < 2 * kWords; ++i) halves[i] = static_cast<const uint8_t*>(from)[i];
  HalfLanes lanes;
  __builtin_memcpy(&lanes, halves, sizeof lanes);
  return lanes;
}
TRAINOPT_FUNCTION void store_byte_words(void* to, WordLanes words) {
  for (int i = 0; i < kWords; ++i) static_cast<uint8_t*>(to)[i] = static_cast<uint8_t>(words[i]);
}
TRAINOPT_FUNCTION void store_byte_halves(void* to, HalfLanes halves) {
  for (int i = 0; i < 2 * kWords; ++i) static_cast<uint8_t*>(to)[i] = static_cast<uint8_t>(halves[i]);
}

#endif

}  // namespace
}  // namespace trainopt::cpu
