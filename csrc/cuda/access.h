// How elements come from memory into registers and back, for each type that tensors are stored in: eight at once as
// 16-byte words, or one.
#pragma once

#include "core/dtype.h"
#include "core/tensor_view.h"
#include "cuda/launch.h"
#include "cuda/table.h"

namespace trainopt::cuda {

// The hardware converts in one instruction from compute capability 8.0 on; bits differ only in which NaN a NaN becomes.
__device__ inline float from_stored(float x) { return x; }
__device__ inline double from_stored(double x) { return x; }
__device__ inline float from_stored(BFloat16 x) { return to_float(x); }

__device__ inline float from_stored(Float16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  return to_float(x);
#endif
}

__device__ inline BFloat16 round_to_bfloat16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  return to_bfloat16(x);
#endif
}

__device__ inline Float16 round_to_float16(float x) {
#if defined(__CUDA_ARCH__)
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  return to_float16(x);
#endif
}

// A word of 16 bytes, as four parts of 4 ---------------------------------------------------------------------------

// How many elements lie in one.
template <class T>
constexpr int kPerWord = static_cast<int>(sizeof(uint4) / sizeof(T));
template <class T>
constexpr int kPerPart = kPerWord<T> / 4;

template <class T>
__device__ __forceinline__ void load_word(const void* data, int64_t at, uint32_t (&part)[4]) {
  const uint4 word = *reinterpret_cast<const uint4*>(static_cast<const T*>(data) + at);
  part[0] = word.x, part[1] = word.y, part[2] = word.z, part[3] = word.w;
}

// In so many words: the compiler splits a store of values that it has just computed into four. kOnce: not to be kept in
// the caches longer than what is read again.
template <class T, bool kOnce = false>
__device__ __forceinline__ void store_word(void* data, int64_t at, const uint32_t (&part)[4]) {
  T* to = static_cast<T*>(data) + at;
#if defined(__CUDA_ARCH__)
  if constexpr (kOnce)
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(part[0]),
                 "r"(part[1]), "r"(part[2]), "r"(part[3])
                 : "memory");
  else
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(part[0]),
                 "r"(part[1]), "r"(part[2]), "r"(part[3])
                 : "memory");
#else
  *reinterpret_cast<uint4*>(to) = uint4{part[0], part[1], part[2], part[3]};
#endif
}

// Half a word, in the same way.
template <bool kOnce = false>
__device__ __forceinline__ void store_half_word(void* to, uint32_t low, uint32_t high) {
#if defined(__CUDA_ARCH__)
  if constexpr (kOnce)
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(low), "r"(high)
                 : "memory");
  else
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(low), "r"(high)
                 : "memory");
#else
  const uint32_t parts[2] = {low, high};
  __builtin_memcpy(to, parts, sizeof parts);
#endif
}

// The elements of a part as S, and rounded back: one instruction for an element, and one for two.
template <class S>
__device__ __forceinline__ void unpack_part(uint32_t part, float, S (&value)[1]) {
  value[0] = static_cast<S>(float_of(part));
}
template <class S>
__device__ __forceinline__ void unpack_part(uint32_t part, BFloat16, S (&value)[2]) {
  value[0] = static_cast<S>(float_of(part << 16));
  value[1] = static_cast<S>(float_of(part & 0xffff0000u));
}
template <class S>
__device__ __forceinline__ void unpack_part(uint32_t part, Float16, S (&value)[2]) {
  value[0] = static_cast<S>(from_stored(Float16{static_cast<uint16_t>(part)}));
  value[1] = static_cast<S>(from_stored(Float16{static_cast<uint16_t>(part >> 16)}));
}

template <class S>
__device__ __forceinline__ uint32_t pack_part(const S (&value)[1], float) {
  return bits_of(static_cast<float>(value[0]));
}
template <class S>
__device__ __forceinline__ uint32_t pack_part(const S (&value)[2], BFloat16) {
  const float low = static_cast<float>(value[0]), high = static_cast<float>(value[1]);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t part;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(part) : "f"(high), "f"(low));
  return part;
#else
  return round_to_bfloat16(low).bits | static_cast<uint32_t>(round_to_bfloat16(high).bits) << 16;
#endif
}
template <class S>
__device__ __forceinline__ uint32_t pack_part(const S (&value)[2], Float16) {
  const float low = static_cast<float>(value[0]), high = static_cast<float>(value[1]);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t part;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(part) : "f"(high), "f"(low));
  return part;
#else
  return round_to_float16(low).bits | static_cast<uint32_t>(round_to_float16(high).bits) << 16;
#endif
}

// All elements of a word.
template <class T, class S>
__device__ __forceinline__ void unpack_word(const uint32_t (&part)[4], T, S* value) {
  if constexpr (sizeof(T) == sizeof(double)) {
    double numbers[2];
    __builtin_memcpy(numbers, part, sizeof numbers);
    value[0] = static_cast<S>(numbers[0]);
    value[1] = static_cast<S>(numbers[1]);
  } else {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      S of_part[kPerPart<T>];
      unpack_part(part[p], T(), of_part);
#pragma unroll
      for (int i = 0; i < kPerPart<T>; ++i) value[p * kPerPart<T> + i] = of_part[i];
    }
  }
}

template <class T, class S>
__device__ __forceinline__ void pack_word(const S* value, T, uint32_t (&part)[4]) {
  if constexpr (sizeof(T) == sizeof(double)) {
    const double numbers[2] = {static_cast<double>(value[0]), static_cast<double>(value[1])};
    __builtin_memcpy(part, numbers, sizeof numbers);
  } else {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      S of_part[kPerPart<T>];
#pragma unroll
      for (int i = 0; i < kPerPart<T>; ++i) of_part[i] = value[p * kPerPart<T> + i];
      part[p] = pack_part(of_part, T());
    }
  }
}

// What a thread has under way at one time: kCount words, or items, of kEach elements that lie side by side. Those of a
// warp lie side by side too, first all lanes' first ones.
template <int kCount, int kEach, class Index = int64_t>
struct Batch {
  Index first, end;  // the first one's first element; where elements end

  __device__ __forceinline__ Index at(int i) const { return first + i * (32 * kEach); }
  __device__ __forceinline__ bool has(int i) const { return at(i) < end; }
};

// Deals elements [begin, end), a multiple of kEach, to threads by batches.
template <int kCount, int kEach, class Index, class Use>
__device__ __forceinline__ void for_each_batch(Index begin, Index end, int thread, int threads, Use use) {
  for (Index first = begin + thread / 32 * (32 * kCount * kEach) + thread % 32 * kEach; first < end;
       first += threads * (kCount * kEach))
    use(Batch<kCount, kEach, Index>{first, end});
}

// To those of a block.
template <int kCount, int kEach, int kBlockThreads, class Use>
__device__ __forceinline__ void for_each_batch(int64_t begin, int64_t end, Use use) {
  for_each_batch<kCount, kEach>(begin, end, static_cast<int>(threadIdx.x), kBlockThreads, use);
}

// Eight elements, of a type that is known when the kernel runs ------------------------------------------------------

// The words that were loaded, before anything waits for them: all tensors' loads are under way before the first is
// converted. Under float32 arithmetic a tensor of float64 is not loaded so: see is_vectorisable.
template <class S>
struct Words {
  static constexpr int kCount = kItem * sizeof(S) / sizeof(uint4);
  uint32_t word[kCount][4];
};

template <class S>
__device__ __forceinline__ Words<S> fetch(const void* data, DType dtype, int64_t at, S) {
  Words<S> words;
  const char* from = static_cast<const char*>(data) + at * size_of(dtype);
  load_word<char>(from, 0, words.word[0]);
  if (dtype == DType::kFloat32 || dtype == DType::kFloat64) load_word<char>(from, 16, words.word[1]);
  if constexpr (sizeof(S) == sizeof(double)) {
    if (dtype == DType::kFloat64) {
      load_word<char>(from, 32, words.word[2]);
      load_word<char>(from, 48, words.word[3]);
    }
  }
  return words;
}

template <class T, class S>
__device__ __forceinline__ void unpack_words_of(const Words<S>& words, S (&value)[kItem]) {
#pragma unroll
  for (int w = 0; w < kItem / kPerWord<T>; ++w) unpack_word(words.word[w], T(), value + w * kPerWord<T>);
}

template <class S>
__device__ __forceinline__ void unpack_words(const Words<S>& words, DType dtype, S (&value)[kItem]) {
  switch (dtype) {
    case DType::kBFloat16: return unpack_words_of<BFloat16>(words, value);
    case DType::kFloat16: return unpack_words_of<Float16>(words, value);
    case DType::kFloat64:
      if constexpr (sizeof(S) == sizeof(double)) return unpack_words_of<double>(words, value);
      break;
    default: break;
  }
  unpack_words_of<float>(words, value);
}

template <class T, class S>
__device__ __forceinline__ void store_item_as(void* data, int64_t at, const S (&value)[kItem]) {
#pragma unroll
  for (int w = 0; w < kItem / kPerWord<T>; ++w) {
    uint32_t part[4];
    pack_word(value + w * kPerWord<T>, T(), part);
    store_word<T>(data, at + w * kPerWord<T>, part);
  }
}

template <class S>
__device__ __forceinline__ void store_item(void* data, DType dtype, int64_t at, const S (&value)[kItem]) {
  switch (dtype) {
    case DType::kBFloat16: return store_item_as<BFloat16>(data, at, value);
    case DType::kFloat16: return store_item_as<Float16>(data, at, value);
    case DType::kFloat64:
      if constexpr (sizeof(S) == sizeof(double)) return store_item_as<double>(data, at, value);
      break;
    default: break;
  }
  store_item_as<float>(data, at, value);
}

// One element -------------------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ S load_one(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<S>(static_cast<const float*>(data)[at]);
    case DType::kFloat64: return static_cast<S>(static_cast<const double*>(data)[at]);
    case DType::kBFloat16: return static_cast<S>(from_stored(static_cast<const BFloat16*>(data)[at]));
    case DType::kFloat16: return static_cast<S>(from_stored(static_cast<const Float16*>(data)[at]));
    default: break;  // two_parts.h has those
  }
  return S(0);
}

template <class S>
__device__ __forceinline__ void store_one(float* at, S value) {
  *at = static_cast<float>(value);
}
template <class S>
__device__ __forceinline__ void store_one(double* at, S value) {
  *at = static_cast<double>(value);
}
template <class S>
__device__ __forceinline__ void store_one(BFloat16* at, S value) {
  *at = round_to_bfloat16(static_cast<float>(value));
}
template <class S>
__device__ __forceinline__ void store_one(Float16* at, S value) {
  *at = round_to_float16(static_cast<float>(value));
}

template <class S>
__device__ __forceinline__ void store_one(void* data, DType dtype, int64_t at, S value) {
  switch (dtype) {
    case DType::kFloat32: return store_one(static_cast<float*>(data) + at, value);
    case DType::kFloat64: return store_one(static_cast<double*>(data) + at, value);
    case DType::kBFloat16: return store_one(static_cast<BFloat16*>(data) + at, value);
    case DType::kFloat16: return store_one(static_cast<Float16*>(data) + at, value);
    default: break;
  }
}

// Several elements, `step` apart, of which the first `count` exist; the others are `otherwise`, and are not stored. All
// loads are under way before the first is converted.
template <class T, class S, int kCount>
__device__ __forceinline__ void load_apart_of(const void* data, int64_t at, int64_t step, int count, S otherwise,
                                              S (&value)[kCount]) {
  T stored[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) stored[k] = k < count ? static_cast<const T*>(data)[at + k * step] : T{};
#pragma unroll
  for (int k = 0; k < kCount; ++k) value[k] = k < count ? static_cast<S>(from_stored(stored[k])) : otherwise;
}

template <class S, int kCount>
__device__ __forceinline__ void load_apart(const void* data, DType dtype, int64_t at, int64_t step, int count,
                                           S otherwise, S (&value)[kCount]) {
  switch (dtype) {
    case DType::kFloat32: return load_apart_of<float>(data, at, step, count, otherwise, value);
    case DType::kFloat64: return load_apart_of<double>(data, at, step, count, otherwise, value);
    case DType::kBFloat16: return load_apart_of<BFloat16>(data, at, step, count, otherwise, value);
    default: break;
  }
  load_apart_of<Float16>(data, at, step, count, otherwise, value);
}

template <class S, int kCount>
__device__ __forceinline__ void store_apart(void* data, DType dtype, int64_t at, int64_t step, int count,
                                            const S (&value)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    if (k < count) store_one(data, dtype, at + k * step, value[k]);
}

// Where element i of a view with a layout lies.
__device__ __forceinline__ int64_t offset_of(const Layout& layout, int64_t i) {
  int64_t offset = 0;
  for (int d = layout.ndim - 1; d >= 0; --d) {
    offset += i % layout.sizes[d] * layout.strides[d];
    i /= layout.sizes[d];
  }
  return offset;
}

// Whether arithmetic of type S can load words of it, at every multiple of eight elements. Nobody stores as float64 what
// is computed in float32, so no kernel has code to do that fast.
template <class S>
bool is_vectorisable(const TensorView& view) {
  const auto is_aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % sizeof(uint4) == 0; };
  return view.layout == nullptr && is_aligned(view.data) && is_aligned(view.beside) &&
         (sizeof(S) == sizeof(double) || view.dtype != DType::kFloat64);
}

}  // namespace trainopt::cuda
