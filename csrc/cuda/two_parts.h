// How numbers in two parts come into registers and back: 16-bit parameters with what they lack of a float32
// (core/master.h), and 8-bit codes with the scales of their blocks (core/code8.h). Only float32 arithmetic has them.
#pragma once

#include "core/code8.h"
#include "core/master.h"
#include "cuda/access.h"
#include "cuda/reduce.h"

namespace trainopt::cuda {

static_assert(kCodeBlock == 32 * kItem);

// A bfloat16 in the upper half of a word, and what is added to its bits.
__device__ __forceinline__ float joined(uint32_t upper, int32_t rest) {
  return float_of(join(upper, static_cast<uint32_t>(rest)));
}

// The bits of the bfloat16, and those of what lies beside it.
struct Split {
  uint32_t upper, rest;
};
__device__ __forceinline__ Split split(float x, DType dtype) {
  const uint32_t bits = without_payload(bits_of(x));
  if (dtype == DType::kMaster16) return {nearest_upper(bits) >> 16, bits & 0xffffu};
  const uint32_t rounded = rounded_to_24(bits);
  return {nearest_upper(rounded) >> 16, rounded >> 8 & 0xffu};
}

// A parameter's element as it is once it has been stored, and loaded again.
template <class S>
__device__ __forceinline__ S as_stored(S x, DType dtype) {
  if constexpr (sizeof(S) == sizeof(float)) {
    switch (dtype) {
      case DType::kBFloat16: return from_stored(round_to_bfloat16(x));
      case DType::kFloat16: return from_stored(round_to_float16(x));
      case DType::kMaster16: {
        const Split parts = split(x, dtype);
        return joined(parts.upper << 16, static_cast<int16_t>(parts.rest));
      }
      case DType::kMaster24: {
        const Split parts = split(x, dtype);
        return joined(parts.upper << 16, static_cast<int8_t>(parts.rest) * 256);
      }
      case DType::kMasterCopy: return join_copy(round_to_float16(x), x);
      default: break;
    }
  }
  return x;
}

// Eight elements ----------------------------------------------------------------------------------------------------

// Eight of one byte.
__device__ __forceinline__ void load_half_word(const void* data, int64_t at, uint32_t (&part)[4]) {
  uint64_t half;
  __builtin_memcpy(&half, __builtin_assume_aligned(static_cast<const char*>(data) + at, sizeof half), sizeof half);
  part[0] = static_cast<uint32_t>(half), part[1] = static_cast<uint32_t>(half >> 32);
}

// As `fetch`, of a gradient or a state: or codes.
template <class S>
__device__ __forceinline__ Words<S> fetch_or_codes(const void* data, DType dtype, int64_t at) {
  if (sizeof(S) == sizeof(double) || !has_codes(dtype)) return fetch(data, dtype, at, S());
  Words<S> words;
  load_half_word(data, at, words.word[0]);
  return words;
}

// What was loaded of a parameter, before anything waits for it. A float16's copy is in `beside` and in the word of
// `own` that is free.
template <class S>
struct ParamWords {
  Words<S> own;
  uint32_t beside[4];
};

template <class S>
__device__ __forceinline__ ParamWords<S> fetch_param(const void* data, const void* beside, DType dtype, int64_t at) {
  ParamWords<S> words;
  words.own = fetch(data, dtype, at, S());
  if (sizeof(S) == sizeof(double) || !has_master(dtype)) return words;
  if (dtype == DType::kMaster24) {
    load_half_word(beside, at, words.beside);
  } else if (dtype == DType::kMaster16) {
    load_word<int16_t>(beside, at, words.beside);
  } else {
    load_word<float>(beside, at, words.beside);
    load_word<float>(beside, at + 4, words.own.word[1]);
  }
  return words;
}

__device__ __forceinline__ void unpack_master(const ParamWords<float>& words, DType dtype, float (&value)[kItem]) {
#pragma unroll
  for (int i = 0; i < kItem; ++i) {
    const uint32_t own = words.own.word[0][i / 2], upper = i % 2 == 0 ? own << 16 : own & 0xffff0000u;
    // The rest is brought to the top of its word, and back down with its sign.
    if (dtype == DType::kMaster16) {
      const uint32_t top = words.beside[i / 2] << (i % 2 == 0 ? 16 : 0);
      value[i] = joined(upper, static_cast<int32_t>(top) >> 16);
    } else if (dtype == DType::kMaster24) {
      const uint32_t top = words.beside[i / 4] << (24 - 8 * (i % 4)) & 0xff000000u;
      value[i] = joined(upper, static_cast<int32_t>(top) >> 16);
    } else {
      const uint32_t copy = i < 4 ? words.beside[i] : words.own.word[1][i % 4];
      value[i] = join_copy(Float16{static_cast<uint16_t>(upper >> 16)}, float_of(copy));
    }
  }
}

template <class S>
__device__ __forceinline__ void unpack_param(const ParamWords<S>& words, DType dtype, S (&value)[kItem]) {
  if constexpr (sizeof(S) == sizeof(float))
    if (has_master(dtype)) return unpack_master(words, dtype, value);
  unpack_words(words.own, dtype, value);
}

template <class S>
__device__ __forceinline__ void store_param(void* data, void* beside, DType dtype, int64_t at,
                                            const S (&value)[kItem]) {
  if (sizeof(S) == sizeof(double) || !has_master(dtype)) return store_item(data, dtype, at, value);
  if (dtype == DType::kMasterCopy) {
    store_item_as<Float16>(data, at, value);
    return store_item_as<float>(beside, at, value);
  }
  uint32_t upper[4], rest[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const Split low = split(static_cast<float>(value[2 * p]), dtype);
    const Split high = split(static_cast<float>(value[2 * p + 1]), dtype);
    upper[p] = low.upper | high.upper << 16;
    rest[p] = low.rest | high.rest << (dtype == DType::kMaster16 ? 16 : 8);
  }
  store_word<BFloat16>(data, at, upper);
  if (dtype == DType::kMaster16) return store_word<int16_t>(beside, at, rest);
  store_half_word(static_cast<int8_t*>(beside) + at, rest[0] | rest[1] << 16, rest[2] | rest[3] << 16);
}

template <class Code>
__device__ __forceinline__ void unpack_codes(const uint32_t (&codes)[4], Code code, float scale,
                                             float (&value)[kItem]) {
  const Decoding decoding = decoding_of(code, scale);
#pragma unroll
  for (int i = 0; i < kItem; ++i) value[i] = decode(code, decoding, codes[i / 4] >> (8 * (i % 4)) & 0xffu);
}

// What a block of `count` numbers is encoded with, of which each lane has seen its own.
template <class Code>
__device__ __forceinline__ Encoding encoding_of_warp(Code code, Statistics<uint32_t> of, int count, float rounding) {
  // tests break this: a scale that is a lane's own
  of.largest = combine_warp(of.largest, [](uint32_t a, uint32_t b) { return larger(a, b); });
  of.other = combine_warp(of.other, [](uint32_t a, uint32_t b) { return combined_others(Code(), a, b); });
  return encoding_of(code, of, count, rounding);
}

// A whole block, of which a warp's lanes have eight each. The scale it had has been read.
template <class Code>
__device__ __forceinline__ void store_codes(void* data, void* scale, int64_t at, Code code, float rounding,
                                            const float (&value)[kItem]) {
  auto statistics = no_numbers<uint32_t>(code);
#pragma unroll
  for (int i = 0; i < kItem; ++i) add_magnitude(code, statistics, bits_of(value[i]) & 0x7fffffffu);
  const Encoding encoding = encoding_of_warp(code, statistics, kCodeBlock, rounding);
  uint32_t codes[2] = {};
#pragma unroll
  for (int i = 0; i < kItem; ++i) codes[i / 4] |= (encode(code, encoding, value[i]) & 0xffu) << (8 * (i % 4));
  store_half_word(static_cast<uint8_t*>(data) + at, codes[0], codes[1]);
  if (at % kCodeBlock == 0) static_cast<float*>(scale)[at / kCodeBlock] = encoding.stored;
}

// One element -------------------------------------------------------------------------------------------------------

// Calls use(load) with what loads the element at an offset, for tensors of any dtype.
template <class S, class Use>
__device__ __forceinline__ void with_load(const void* data, const void* beside, DType dtype, Use use) {
  if constexpr (sizeof(S) == sizeof(float)) {
    const auto upper = [=](int64_t at) { return uint32_t{static_cast<const uint16_t*>(data)[at]} << 16; };
    const auto decoded = [=](auto code, int64_t at) {
      return decode(code, decoding_of(code, static_cast<const float*>(beside)[at / kCodeBlock]),
                    uint32_t{static_cast<const uint8_t*>(data)[at]});
    };
    switch (dtype) {
      case DType::kMaster16:
        return use([=](int64_t at) { return joined(upper(at), static_cast<const int16_t*>(beside)[at]); });
      case DType::kMaster24:
        return use([=](int64_t at) { return joined(upper(at), static_cast<const int8_t*>(beside)[at] * 256); });
      case DType::kMasterCopy:
        return use([=](int64_t at) {
          return join_copy(static_cast<const Float16*>(data)[at], static_cast<const float*>(beside)[at]);
        });
      case DType::kSigned8: return use([=](int64_t at) { return decoded(SignedCode(), at); });
      case DType::kUnsigned8: return use([=](int64_t at) { return decoded(UnsignedCode(), at); });
      default: break;
    }
  }
  use([=](int64_t at) { return load_one<S>(data, dtype, at); });
}

template <class S>
__device__ __forceinline__ S load_one(const void* data, const void* beside, DType dtype, int64_t at) {
  S value;
  with_load<S>(data, beside, dtype, [&](auto load) { value = load(at); });
  return value;
}

// But of no codes, which whole blocks of are stored.
template <class S>
__device__ __forceinline__ void store_one(void* data, void* beside, DType dtype, int64_t at, S value) {
  if (sizeof(S) == sizeof(double) || !has_master(dtype)) return store_one(data, dtype, at, value);
  const auto x = static_cast<float>(value);
  if (dtype == DType::kMasterCopy) {
    static_cast<Float16*>(data)[at] = round_to_float16(x);
    static_cast<float*>(beside)[at] = x;
    return;
  }
  const Split parts = split(x, dtype);
  static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(parts.upper);
  if (dtype == DType::kMaster16) {
    static_cast<uint16_t*>(beside)[at] = static_cast<uint16_t>(parts.rest);
  } else {
    static_cast<uint8_t*>(beside)[at] = static_cast<uint8_t>(parts.rest);
  }
}

}  // namespace trainopt::cuda
