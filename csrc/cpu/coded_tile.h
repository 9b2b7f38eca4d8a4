// Tiles of tensors that hold float32 numbers in two parts: a 16-bit parameter and what it lacks, or 8-bit codes and the
// scales of their blocks. A block is a tile, so that who encodes has its largest magnitude at hand.
#pragma once

#include "core/code8.h"
#include "core/master.h"
#include "core/tensor_view.h"
#include "cpu/engine.h"
#include "cpu/vec.h"

namespace trainopt::cpu {
namespace {

static_assert(kBlock == kCodeBlock);

// The two parts of a number as one type for each way to store it.
struct Master16 {
  using First = BFloat16;
  using Second = int16_t;
  TRAINOPT_INLINE static float join(First first, Second second) {
    return float_of(trainopt::join(static_cast<uint32_t>(first.bits) << 16, static_cast<uint32_t>(int32_t{second})));
  }
  TRAINOPT_INLINE static void split(float x, First* first, Second* second) {
    const uint32_t bits = without_payload(bits_of(x));
    first->bits = static_cast<uint16_t>(nearest_upper(bits) >> 16);
    *second = static_cast<int16_t>(bits & 0xffffu);
  }
};
struct Master24 {
  using First = BFloat16;
  using Second = int8_t;
  TRAINOPT_INLINE static float join(First first, Second second) {
    return float_of(
        trainopt::join(static_cast<uint32_t>(first.bits) << 16, static_cast<uint32_t>(int32_t{second}) << 8));
  }
  TRAINOPT_INLINE static void split(float x, First* first, Second* second) {
    const uint32_t bits = rounded_to_24(without_payload(bits_of(x)));
    first->bits = static_cast<uint16_t>(nearest_upper(bits) >> 16);
    *second = static_cast<int8_t>(bits >> 8 & 0xffu);
  }
};
struct MasterCopy {
  using First = Float16;
  using Second = float;
  TRAINOPT_INLINE static float join(First first, Second second) { return join_copy(first, second); }
  TRAINOPT_INLINE static void split(float x, First* first, Second* second) {
    first->bits = to_float16(x).bits;
    *second = x;
  }
};

// The first elements of a tile of float16 numbers with their copies, likewise by vectors.
template <class First, class Second>
TRAINOPT_FUNCTION int join_vectors(const First*, const Second*, int, float*) {
  return 0;
}
TRAINOPT_FUNCTION int join_vectors(const Float16* stored, const float* copies, int count, float* out) {
  float rounded[kBlock];
  Float16 halves[kBlock];
  const int whole = store_vectors(copies, count, halves);
  load_vectors(halves, whole, rounded);
  load_vectors(stored, whole, out);
  for (int i = 0; i < whole; ++i) out[i] = bits_of(rounded[i]) == bits_of(out[i]) ? copies[i] : out[i];
  return whole;
}
template <class First, class Second>
TRAINOPT_FUNCTION int split_vectors(const float*, int, First*, Second*) {
  return 0;
}
TRAINOPT_FUNCTION int split_vectors(const float* in, int count, Float16* stored, float* copies) {
  const int whole = store_vectors(in, count, stored);
  __builtin_memcpy(copies, in, static_cast<size_t>(whole) * sizeof(float));
  return whole;
}

template <class Parts>
void load_parts(const TensorView& view, int64_t begin, int count, float* __restrict out) {
  const auto* first = static_cast<const typename Parts::First*>(view.data) + begin;
  const auto* second = static_cast<const typename Parts::Second*>(view.beside) + begin;
  for (int i = join_vectors(first, second, count, out); i < count; ++i) out[i] = Parts::join(first[i], second[i]);
}

template <class Parts>
void store_parts(const TensorView& view, int64_t begin, int count, const float* __restrict in) {
  auto* __restrict first = static_cast<typename Parts::First*>(view.data) + begin;
  auto* __restrict second = static_cast<typename Parts::Second*>(view.beside) + begin;
  for (int i = split_vectors(in, count, first, second); i < count; ++i) Parts::split(in[i], &first[i], &second[i]);
}

template <class Code>
void load_codes(const TensorView& view, int64_t begin, int count, float* __restrict out) {
  const auto* codes = static_cast<const uint8_t*>(view.data) + begin;
  const Decoding decoding = decoding_of(Code(), static_cast<const float*>(view.beside)[begin / kCodeBlock]);
  for (int i = 0; i < count; ++i) out[i] = decode(Code(), decoding, static_cast<uint32_t>(codes[i]));
}

template <class Code>
void store_codes(const TensorView& view, int64_t begin, int count, float rounding, const float* __restrict in) {
  auto* __restrict codes = static_cast<uint8_t*>(view.data) + begin;
  auto statistics = no_numbers<uint32_t>(Code());
  for (int i = 0; i < count; ++i) add_magnitude(Code(), statistics, bits_of(in[i]) & 0x7fffffffu);
  const Encoding encoding = encoding_of(Code(), statistics, count, rounding);
  for (int i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(encode(Code(), encoding, in[i]));
  static_cast<float*>(view.beside)[begin / kCodeBlock] = encoding.stored;
}

[[gnu::noinline, maybe_unused]] void load_coded(const TensorView& view, int64_t begin, int count, float* out) {
  switch (view.dtype) {
    case DType::kMaster16: return load_parts<Master16>(view, begin, count, out);
    case DType::kMaster24: return load_parts<Master24>(view, begin, count, out);
    case DType::kMasterCopy: return load_parts<MasterCopy>(view, begin, count, out);
    case DType::kSigned8: return load_codes<SignedCode>(view, begin, count, out);
    case DType::kUnsigned8: return load_codes<UnsignedCode>(view, begin, count, out);
    default: return;
  }
}

// `rounding`: of second moments in 8 bits, see code_rounding.
[[gnu::noinline, maybe_unused]] void store_coded(const TensorView& view, int64_t begin, int count, float rounding,
                                                 const float* in) {
  switch (view.dtype) {
    case DType::kMaster16: return store_parts<Master16>(view, begin, count, in);
    case DType::kMaster24: return store_parts<Master24>(view, begin, count, in);
    case DType::kMasterCopy: return store_parts<MasterCopy>(view, begin, count, in);
    case DType::kSigned8: return store_codes<SignedCode>(view, begin, count, rounding, in);
    case DType::kUnsigned8: return store_codes<UnsignedCode>(view, begin, count, rounding, in);
    default: return;
  }
}

}  // namespace
}  // namespace trainopt::cpu
