// A row of cross-entropy in the plain case (see is_plain), where the time goes in language models: logits of one type,
// a label, and nothing to ask for each class. What a class costs is a handful of instructions, and 64 bytes of the row
// are under way in each thread.
#pragma once

#include "cuda/cross_entropy_row.h"

namespace trainopt::cuda {

// Shared memory in which the threads of a row keep its first words from the pass that sums to the pass that writes the
// gradient: a thread those that it has itself, `count` of them. What does not fit in is read again.
#if defined(TRAINOPT_SIMT)
using SharedWords = simt::Shared<uint4>;
#else
using SharedWords = uint4*;
#endif
struct Kept {
  SharedWords words;
  int first, step, count;  // the thread's first, how far its next is, and how many

  __device__ __forceinline__ void put(int i, const uint32_t (&part)[4]) const {
    if (i < count) words[first + i * step] = uint4{part[0], part[1], part[2], part[3]};
  }
  __device__ __forceinline__ void get(int i, uint32_t (&part)[4]) const {
    const uint4 word = words[first + i * step];  // tests break this: a word of another place
    part[0] = word.x, part[1] = word.y, part[2] = word.z, part[3] = word.w;
  }
};

// e^x for x below 0, in three instructions less than exp_of. The product is off by |x| roundings, where e^x is as
// small.
__device__ __forceinline__ float fast_exp_of(float x) { return fast_exp2(x * 1.44269504f); }

// Two numbers' larger one; a NaN is left out.
__device__ __forceinline__ uint32_t larger_part(uint32_t a, uint32_t b, float) {
  return bits_of(__builtin_fmaxf(float_of(a), float_of(b)));
}
// Of two pairs.
template <class Half>
__device__ __forceinline__ uint32_t larger_part(uint32_t a, uint32_t b, Half) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t larger;
  if constexpr (std::is_same_v<Half, BFloat16>)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
#else
  float x[2], y[2];
  unpack_part(a, Half(), x);
  unpack_part(b, Half(), y);
  const float larger[2] = {__builtin_fmaxf(x[0], y[0]), __builtin_fmaxf(x[1], y[1])};
  return pack_part(larger, Half());
#endif
}

// Logits of type T, and a gradient of type G.
template <class T, class G>
struct Plain {
  using S = float;
  static constexpr int kEach = kPerWord<T>, kWords = 4;
  using Words = Batch<kWords, kEach, int>;

  // Where the classes of a row lie in words that are aligned; the others are singles.
  struct Places {
    int before, end, singles;

    __device__ __forceinline__ Places(int classes, const Head& head)
        : before(classes < head.elements ? classes : head.elements),
          end(before + (classes - before) / kEach * kEach),
          singles(before + classes - end) {}  // tests break this: a row's tail, one class short
    __device__ __forceinline__ int single(int s) const { return s < before ? s : end + (s - before); }
    // The thread that has a class.
    __device__ __forceinline__ int owner_of(int c, int threads) const {
      if (c < before || c >= end) return (c < before ? c : before + c - end) % threads;
      const int word = (c - before) / kEach;
      return word / (32 * kWords) * 32 % threads + word % 32;  // tests break this: a label that is another thread's
    }
  };

  // use(words, number): a thread's words are numbered as it comes to them.
  template <class Use>
  static __device__ __forceinline__ void for_each_words(const Places& places, int thread, int threads, Use use) {
    int number = 0;
    for_each_batch<kWords, kEach>(places.before, places.end, thread, threads, [&](const Words& words) {
      use(words, number);
      number += kWords;
    });
  }

  // Those that are not there are -infinity.
  static __device__ __forceinline__ void load(const T* row, const Words& words, uint32_t (&word)[kWords][4]) {
    if (words.has(kWords - 1)) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) load_word<T>(row, words.at(w), word[w]);
      return;
    }
    const uint32_t nothing = sizeof(T) == 4 ? 0xff800000u : std::is_same_v<T, BFloat16> ? 0xff80ff80u : 0xfc00fc00u;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      word[w][0] = word[w][1] = word[w][2] = word[w][3] = nothing;
      if (words.has(w)) load_word<T>(row, words.at(w), word[w]);
    }
  }

  static __device__ __forceinline__ void store(G* gradient, int at, bool aligned, const float (&value)[kEach]) {
    if (!aligned) {
#pragma unroll
      for (int k = 0; k < kEach; ++k) store_one(gradient + at + k, value[k]);
    } else if constexpr (kEach == kPerWord<G>) {
      uint32_t part[4];
      pack_word(value, G(), part);
      store_word<G, true>(gradient, at, part);
    } else {
      static_assert(kEach == 4 && sizeof(G) == 2);
      const float low[2] = {value[0], value[1]}, high[2] = {value[2], value[3]};
      store_half_word<true>(gradient + at, pack_part(low, G()), pack_part(high, G()));
    }
  }

  static __device__ __forceinline__ Places places_of(const RowsWork& work, int64_t start) {
    Head head;
    head.align(work.task.logits, start);
    return Places(static_cast<int>(work.task.classes), head);
  }

  static __device__ __forceinline__ RowSums<float> sum_row(const RowsWork& work, const Constants<float>& constants,
                                                           int64_t row, int thread, int threads, const Kept& kept) {
    const int64_t start = row * work.task.logits.stride;
    const T* logits = static_cast<const T*>(work.task.logits.data) + start;
    const Places places = places_of(work, start);
    RowSums<float> sums;  // mass: a class counts 1
    for_each_words(places, thread, threads, [&](const Words& words, int number) {
      uint32_t word[kWords][4];
      load(logits, words, word);
#pragma unroll
      for (int w = 0; w < kWords; ++w) kept.put(number + w, word[w]);
      uint32_t largest = word[0][0];
#pragma unroll
      for (int w = 0; w < kWords; ++w)
#pragma unroll
        for (int p = 0; p < 4; ++p) largest = larger_part(largest, word[w][p], T());
      float of_part[kPerPart<T>];
      unpack_part(largest, T(), of_part);
      sums.raise(kPerPart<T> == 1 ? of_part[0] : __builtin_fmaxf(of_part[0], of_part[kPerPart<T> - 1]));
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        float x[kEach], part[kEach];
        unpack_word(word[w], T(), x);
#pragma unroll
        for (int k = 0; k < kEach; ++k) part[k] = fast_exp_of(x[k] - sums.shift);
        sums.exponentials += sum_of(part);
        if (constants.has_mass) {
#pragma unroll
          for (int k = 0; k < kEach; ++k) part[k] = x[k] - sums.shift;
          const float sum = sum_of(part);
          sums.mass += words.has(w) ? kEach : 0;
          sums.mass_times_logit += words.has(w) ? sum : 0.0f;
        }
      }
    });
    for (int s = thread; s < places.singles; s += threads) {
      const float x = from_stored(logits[places.single(s)]);
      sums.raise(x);
      sums.exponentials += fast_exp_of(x - sums.shift);
      if (!constants.has_mass) continue;
      sums.mass += 1;
      sums.mass_times_logit += x - sums.shift;
    }
    return sums;
  }

  // What the masses are, of sums over all classes.
  static __device__ __forceinline__ void weigh(RowSums<float>& sums, const Constants<float>& constants) {
    sums.mass = sums.mass * constants.spread;
    sums.mass_times_logit = sums.mass_times_logit * constants.spread;
  }

  static __device__ __forceinline__ void write_row(const RowsWork& work, const Constants<float>& constants,
                                                   const RowGradient<float>& of_row, int64_t row, int thread,
                                                   int threads, const Kept& kept) {
    const int64_t start = row * work.task.logits.stride;
    const T* logits = static_cast<const T*>(work.task.logits.data) + start;
    const int64_t gradient_start = row * work.gradient.stride;
    G* gradient = static_cast<G*>(work.gradient.data) + gradient_start;
    const Places places = places_of(work, start);
    const bool aligned = is_aligned(work.gradient, gradient_start + places.before, kEach * sizeof(G));
    const float taken = constants.has_mass ? constants.spread * of_row.upstream : 0.0f;
    const auto derivative_of = [&](float x) {
      return multiply_add(fast_exp_of(x - of_row.peak), of_row.probability_factor, -taken);
    };
    if (of_row.target.ignored) {
      for_each_words(places, thread, threads, [&](const Words& words, int) {
        const float zero[kEach] = {};
#pragma unroll
        for (int w = 0; w < kWords; ++w)
          if (words.has(w)) store(gradient, words.at(w), aligned, zero);
      });
      for (int s = thread; s < places.singles; s += threads) store_one(gradient + places.single(s), 0.0f);
      return;
    }
    // Before the gradient may be written over it.
    const int label = static_cast<int>(of_row.target.label);
    const bool owns_label = label >= 0 && thread == places.owner_of(label, threads);
    const float logit = owns_label ? from_stored(logits[label]) : 0.0f;
    for_each_words(places, thread, threads, [&](const Words& words, int number) {
      uint32_t word[kWords][4];
      if (number + kWords <= kept.count) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) kept.get(number + w, word[w]);
      } else {
        load(logits, words, word);
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        if (!words.has(w)) break;
        float x[kEach];
        unpack_word(word[w], T(), x);
#pragma unroll
        for (int k = 0; k < kEach; ++k) x[k] = derivative_of(x[k]);
        store(gradient, words.at(w), aligned, x);
      }
    });
    for (int s = thread; s < places.singles; s += threads) {
      const int c = places.single(s);
      store_one(gradient + c, derivative_of(from_stored(logits[c])));
    }
    if (owns_label) store_one(gradient + label, derivative_of(logit) - of_row.label_mass);
  }
};

}  // namespace trainopt::cuda
