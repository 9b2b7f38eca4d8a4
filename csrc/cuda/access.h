// How elements come from memory into registers and back, for each type that tensors are stored in: eight at once as
// 16-byte words, or one.
#pragma once

#include "core/dtype.h"
#include "core/tensor_view.h"
#include "cuda/launch.h"
#include "cuda/table.h"

namespace trainopt::cuda {

// The hardware converts in one instruction from compute capability 8.0 on; bits differ only in which NaN a NaN becomes.
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(BFloat16 x) { return to_float(x); }

__device__ inline float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  return to_float(x);
#endif
}

__device__ inline BFloat16 narrow_to_bfloat16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  return to_bfloat16(x);
#endif
}

__device__ inline Float16 narrow_to_float16(float x) {
#if defined(__CUDA_ARCH__)
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  return to_float16(x);
#endif
}

// Eight elements ----------------------------------------------------------------------------------------------------

// The words that were loaded, before anything waits for them: all tensors' loads are under way before the first is
// converted. float64 under float32 arithmetic is narrowed at once.
template <class S>
struct Words {
  static constexpr int kCount = kItem * sizeof(S) / sizeof(uint4);
  uint4 word[kCount];
};

template <class T, int kCount>
__device__ __forceinline__ void fetch_words(const void* data, int64_t at, uint4* words) {
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const T*>(data) + at);
#pragma unroll
  for (int i = 0; i < kCount; ++i) words[i] = from[i];
}

// The same bytes as another type; both arrays stay in registers.
template <class To, class From, int kTo, int kFrom>
__device__ __forceinline__ void reinterpret(To (&to)[kTo], const From (&from)[kFrom]) {
  static_assert(sizeof to == sizeof from);
  __builtin_memcpy(&to, &from, sizeof to);
}

// In so many words: the compiler splits a store of values that it has just computed into four.
__device__ __forceinline__ void store_word(uint4* to, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x), "r"(y), "r"(z),
               "r"(w)
               : "memory");
#else
  *to = uint4{x, y, z, w};
#endif
}

// Stores the bytes of an array as 16-byte words.
template <class T, class From, int kFrom>
__device__ __forceinline__ void put_words(void* data, int64_t at, const From (&from)[kFrom]) {
  constexpr int kCount = kFrom * sizeof(From) / sizeof(uint4);
  uint32_t part[kCount][4];
  reinterpret(part, from);
  uint4* to = reinterpret_cast<uint4*>(static_cast<T*>(data) + at);
#pragma unroll
  for (int i = 0; i < kCount; ++i) store_word(to + i, part[i][0], part[i][1], part[i][2], part[i][3]);
}

__device__ __forceinline__ Words<float> fetch(const void* data, DType dtype, int64_t at, float) {
  Words<float> words;
  switch (dtype) {
    case DType::kFloat32: fetch_words<float, 2>(data, at, words.word); break;
    case DType::kBFloat16:
    case DType::kFloat16: fetch_words<BFloat16, 1>(data, at, words.word); break;
    case DType::kFloat64: {
      uint4 wide[4];
      fetch_words<double, 4>(data, at, wide);
      double value[kItem];
      float narrowed[kItem];
      reinterpret(value, wide);
#pragma unroll
      for (int i = 0; i < kItem; ++i) narrowed[i] = static_cast<float>(value[i]);
      reinterpret(words.word, narrowed);
      break;
    }
  }
  return words;
}

__device__ __forceinline__ Words<double> fetch(const void* data, DType dtype, int64_t at, double) {
  Words<double> words;
  switch (dtype) {
    case DType::kFloat64: fetch_words<double, 4>(data, at, words.word); break;
    case DType::kFloat32: fetch_words<float, 2>(data, at, words.word); break;
    case DType::kBFloat16:
    case DType::kFloat16: fetch_words<BFloat16, 1>(data, at, words.word); break;
  }
  return words;
}

template <class Half, class S>
__device__ __forceinline__ void widen_halves(const uint4& word, S* value) {
  Half half[kItem];
  __builtin_memcpy(half, &word, sizeof half);
#pragma unroll
  for (int i = 0; i < kItem; ++i) value[i] = static_cast<S>(widen(half[i]));
}

template <class S>
__device__ __forceinline__ void widen_words(const Words<S>& words, DType dtype, S (&value)[kItem]) {
  switch (dtype) {
    case DType::kBFloat16: widen_halves<BFloat16>(words.word[0], value); return;
    case DType::kFloat16: widen_halves<Float16>(words.word[0], value); return;
    case DType::kFloat32:
      if constexpr (sizeof(S) == sizeof(double)) {
        float single[kItem];
        __builtin_memcpy(single, words.word, sizeof single);
#pragma unroll
        for (int i = 0; i < kItem; ++i) value[i] = static_cast<S>(single[i]);
        return;
      }
      break;
    case DType::kFloat64: break;
  }
  reinterpret(value, words.word);
}

template <class S>
__device__ __forceinline__ void store_item(void* data, DType dtype, int64_t at, const S (&value)[kItem]) {
  switch (dtype) {
    case DType::kFloat32: {
      float single[kItem];
#pragma unroll
      for (int i = 0; i < kItem; ++i) single[i] = static_cast<float>(value[i]);
      return put_words<float>(data, at, single);
    }
    case DType::kFloat64: {
      double wide[kItem];
#pragma unroll
      for (int i = 0; i < kItem; ++i) wide[i] = static_cast<double>(value[i]);
      return put_words<double>(data, at, wide);
    }
    case DType::kBFloat16: {
      BFloat16 half[kItem];
#pragma unroll
      for (int i = 0; i < kItem; ++i) half[i] = narrow_to_bfloat16(static_cast<float>(value[i]));
      return put_words<BFloat16>(data, at, half);
    }
    case DType::kFloat16: {
      Float16 half[kItem];
#pragma unroll
      for (int i = 0; i < kItem; ++i) half[i] = narrow_to_float16(static_cast<float>(value[i]));
      return put_words<Float16>(data, at, half);
    }
  }
}

// One element -------------------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ S load_one(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<S>(static_cast<const float*>(data)[at]);
    case DType::kFloat64: return static_cast<S>(static_cast<const double*>(data)[at]);
    case DType::kBFloat16: return static_cast<S>(widen(static_cast<const BFloat16*>(data)[at]));
    case DType::kFloat16: return static_cast<S>(widen(static_cast<const Float16*>(data)[at]));
  }
  return S(0);
}

template <class S>
__device__ __forceinline__ void store_one(void* data, DType dtype, int64_t at, S value) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(data)[at] = static_cast<float>(value); return;
    case DType::kFloat64: static_cast<double*>(data)[at] = static_cast<double>(value); return;
    case DType::kBFloat16: static_cast<BFloat16*>(data)[at] = narrow_to_bfloat16(static_cast<float>(value)); return;
    case DType::kFloat16: static_cast<Float16*>(data)[at] = narrow_to_float16(static_cast<float>(value)); return;
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
  for (int k = 0; k < kCount; ++k) value[k] = k < count ? static_cast<S>(widen(stored[k])) : otherwise;
}

template <class S, int kCount>
__device__ __forceinline__ void load_apart(const void* data, DType dtype, int64_t at, int64_t step, int count,
                                           S otherwise, S (&value)[kCount]) {
  switch (dtype) {
    case DType::kFloat32: return load_apart_of<float>(data, at, step, count, otherwise, value);
    case DType::kFloat64: return load_apart_of<double>(data, at, step, count, otherwise, value);
    case DType::kBFloat16: return load_apart_of<BFloat16>(data, at, step, count, otherwise, value);
    case DType::kFloat16: break;
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

// Whether eight elements at a time can be loaded as 16-byte words, at every multiple of eight.
inline bool is_vectorisable(const TensorView& view) {
  return view.layout == nullptr && reinterpret_cast<uintptr_t>(view.data) % sizeof(uint4) == 0;
}

}  // namespace trainopt::cuda
