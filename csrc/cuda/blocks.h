// Steps by blocks of 256 elements, each by one warp: of tensors of any types, in two parts too, and of any layouts.
// States in 8 bits have a scale for each block, which follows from all of its numbers. A parameter's moving average is
// moved, and what its stats are made of is seen, where its elements are in registers.
#pragma once

#include <type_traits>

#include "cuda/factored.h"
#include "cuda/random.h"
#include "cuda/stats.h"
#include "cuda/step_table.h"
#include "cuda/table.h"
#include "cuda/two_parts.h"
#include "rules/average.h"

namespace trainopt::cuda {
namespace {

// Those of a chunk: of what is the same for its elements, and the row of its tensors.
template <class Rule, class S, class Storage, StateSet kSet, class Chunk>
struct Blocks {
  static constexpr int kRoles = 2 + count_of(kSet);
  const Chunk& chunk;
  const RowOf<Storage, kRoles>& row;
  StepStats& stats;  // of this thread's elements, if they are measured

  // Elements [at, end), `at` a multiple of a block.
  __device__ __forceinline__ void step(int64_t at, int64_t end) const {
    for (at += threadIdx.x / 32 * kCodeBlock; at < end; at += kThreads / 32 * kCodeBlock) {
      if (kHasWords && can_take_words() && end - at >= kCodeBlock) {
        if constexpr (kHasWords) step_by_words(at);
      } else {
        step_by_ones(at, end);
      }
    }
  }

  static constexpr bool kHasCodes = sizeof(S) == sizeof(float);
  // More words of float64 do not fit in registers, nor do any with a tail that is used.
  static constexpr bool kHasWords = !kIsStrided<Storage> && (kHasCodes || kRoles < 5);
  static constexpr bool kWordsHaveTail = kHasTail<Storage> && kHasCodes;
  __device__ __forceinline__ bool can_take_words() const {
    if constexpr (kHasTail<Storage> && !kWordsHaveTail)
      if (row.is_used()) return false;
    return row.vectorisable;
  }
  __device__ __forceinline__ bool in_codes(int role) const {
    return kHasCodes && role >= 2 && has_codes(row.dtype[role]);
  }
  __device__ __forceinline__ bool rounds_at_random() const {
    return kHasCodes && chunk.stages.round_at_random && is_16_bit(row.dtype[0]);
  }

  // The roles of states that are never below 0; and the code that a state would be in.
  TRAINOPT_INLINE static constexpr uint32_t unsigned_roles() {
    uint32_t roles = 0;
    for (int s = 0, role = 2; s < kStateCount<Rule>; ++s)
      if (contains(kSet, s)) roles |= static_cast<uint32_t>(contains(kUnsignedStates<Rule>, s)) << role++;
    return roles;
  }
  template <class Use>
  __device__ __forceinline__ static void with_code(int role, Use use) {
    constexpr uint32_t kUnsignedRoles = unsigned_roles();
    contains(kUnsignedRoles, role) ? use(UnsignedCode()) : use(SignedCode());
  }

  // A whole block, aligned: each lane has eight elements beside each other.
  __device__ __forceinline__ void step_by_words(int64_t block) const {
    const Stages<S>& stages = chunk.stages;
    const int64_t at = block + threadIdx.x % 32 * kItem;
    const ParamWords<S> of_param = fetch_param<S>(row.data[0], row.beside[0], row.dtype[0], at);
    Words<S> words[kRoles];
    float scale[kRoles];
#pragma unroll
    for (int r = 1; r < kRoles; ++r) {
      if (r == kFactoredRole<Rule, kSet>) continue;
      words[r] = fetch_or_codes<S>(row.data[r], row.dtype[r], at);
      if (in_codes(r)) scale[r] = static_cast<const float*>(row.beside[r])[block / kCodeBlock];
    }
    S value[kRoles][kItem];
    unpack_param(of_param, row.dtype[0], value[0]);
#pragma unroll
    for (int r = 1; r < kRoles; ++r) {
      if (r == kFactoredRole<Rule, kSet>) {
        factored_apart(row.data[r], at, 1, kItem, value[r]);
        continue;
      }
      if constexpr (kHasCodes) {
        if (in_codes(r)) {
          with_code(r, [&](auto code) { unpack_codes(words[r].word[0], code, scale[r], value[r]); });
          continue;
        }
      }
      unpack_words(words[r], row.dtype[r], value[r]);
    }
    if (kWordsHaveTail && is_measured()) see(value[0], value[1], stats);
    S noise[4] = {};
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      if (i % 4 == 0 && stages.noisy) gaussian_quad(noise, stages, chunk.step, chunk.tensor, at + i);
      chunk.template step_value<false>(value, i, noise[i % 4]);
    }
    if (rounds_at_random()) {
      const RandomWords bits = rounding_words(stages.seed, chunk.step, chunk.tensor, at);
#pragma unroll
      for (int i = 0; i < kItem; ++i)
        value[0][i] = rounded_at_random(value[0][i], bits.word[i / 2] >> (16 * (i % 2)), row.dtype[0]);
    }
    store_param(row.data[0], row.beside[0], row.dtype[0], at, value[0]);
    if (kWordsHaveTail && is_measured()) {
      S before[kItem];
      unpack_param(of_param, row.dtype[0], before);
      see_move(before, value[0], row.dtype[0], stats);
    }
    if constexpr (kWordsHaveTail)
      if (row.average != nullptr) move_item_of_average(at, value[0]);
#pragma unroll
    for (int r = 1; r < kRoles; ++r) {
      if (!chunk.writes(r)) continue;
      if (chunk.clears(r))
#pragma unroll
        for (int i = 0; i < kItem; ++i) value[r][i] = 0;
      if constexpr (kHasCodes) {
        if (in_codes(r)) {
          with_code(
              r, [&](auto code) { store_codes(row.data[r], row.beside[r], at, code, stages.code_rounding, value[r]); });
          continue;
        }
      }
      store_item(row.data[r], row.dtype[r], at, value[r]);
    }
  }

  // Which element of the whole that the tensor is a shard of element i is, for random numbers.
  __device__ __forceinline__ int64_t in_whole(int64_t i) const {
    if constexpr (kIsStrided<Storage>)
      if (row.shard.layout.ndim != 0) return row.shard.offset + offset_of(row.shard.layout, i);
    return i;
  }

  // Any block, one element after the other. Where there are codes all is computed twice, in place of being kept: who
  // writes them must have seen the whole block.
  __device__ __forceinline__ void step_by_ones(int64_t block, int64_t end) const {
    const Stages<S>& stages = chunk.stages;
    const int count = static_cast<int>(end - block < kCodeBlock ? end - block : kCodeBlock);
    const int lane = static_cast<int>(threadIdx.x % 32);
    Statistics<uint32_t> statistics[kRoles];
    Encoding encoding[kRoles];
    bool is_last = true;
#pragma unroll
    for (int r = 2; r < kRoles; ++r) {
      is_last = is_last && !in_codes(r);
      with_code(r, [&](auto code) { statistics[r] = no_numbers<uint32_t>(code); });
    }
#pragma unroll 1
    for (;; is_last = true) {
      // tests break this: a block's tail, one element too long
      for (int i = lane; i < count; i += 32) {
        const int64_t at = block + i;
        S value[kRoles][1], noise = 0;
#pragma unroll
        for (int r = 0; r < kRoles; ++r)
          value[r][0] = r == kFactoredRole<Rule, kSet>
                            ? factored_one<S>(row.data[r], at)
                            : load_one<S>(row.data[r], row.beside[r], row.dtype[r], place_of(row, r, at));
        const S before[1] = {value[0][0]};
        if (is_last && is_measured()) see(before, value[1], stats);
        if (stages.noisy) noise = static_cast<S>(gaussian_one(stages.seed, chunk.step, chunk.tensor, in_whole(at)));
        chunk.template step_value<false>(value, 0, noise);
        if (is_last && rounds_at_random()) {
          const uint32_t bits = rounding_bits_one(stages.seed, chunk.step, chunk.tensor, in_whole(at));
          value[0][0] = rounded_at_random(static_cast<float>(value[0][0]), bits, row.dtype[0]);
        }
#pragma unroll
        for (int r = 0; r < kRoles; ++r) {
          const S x = value[r][0];
          if (in_codes(r)) {
            with_code(r, [&](auto code) { see_or_store(code, is_last, statistics[r], encoding[r], r, at, x); });
          } else if (is_last && chunk.writes(r)) {
            store_one(row.data[r], row.beside[r], row.dtype[r], place_of(row, r, at), chunk.clears(r) ? S(0) : x);
          }
        }
        if (is_last && is_measured()) see_move(before, value[0], row.dtype[0], stats);
        if constexpr (kHasTail<Storage>)
          if (is_last && row.average != nullptr) move_one_of_average(at, value[0][0]);
      }
      if (is_last) break;
#pragma unroll
      for (int r = 2; r < kRoles; ++r)
        if (in_codes(r))
          with_code(
              r, [&](auto code) { encoding[r] = encoding_of_warp(code, statistics[r], count, stages.code_rounding); });
    }
    // tests break this: a scale that is written before all have read it
    __syncwarp();
#pragma unroll
    for (int r = 2; r < kRoles; ++r)
      if (in_codes(r) && lane == 0) static_cast<float*>(row.beside[r])[block / kCodeBlock] = encoding[r].stored;
  }

  __device__ __forceinline__ bool is_measured() const {
    if constexpr (kHasTail<Storage>) return row.is_measured();
    return false;
  }

  // Of the parameter's moving average: eight elements, or one.
  __device__ __forceinline__ void move_item_of_average(int64_t at, const S (&param)[kItem]) const {
    const Words<S> words = fetch(row.average, row.average_dtype, at, S());
    S average[kItem];
    unpack_words(words, row.average_dtype, average);
#pragma unroll
    for (int i = 0; i < kItem; ++i)
      // tests break this: an average of what is not stored
      move_average(chunk.stages.average_weight, as_stored(param[i], row.dtype[0]), average[i]);
    store_item(row.average, row.average_dtype, at, average);
  }
  __device__ __forceinline__ void move_one_of_average(int64_t i, S param) const {
    int64_t at = i;
    if constexpr (kIsStrided<Storage>)
      if (row.average_layout.ndim != 0) at = offset_of(row.average_layout, i);
    S average = load_one<S>(row.average, row.average_dtype, at);
    // tests break this: an average of one that is not stored
    move_average(chunk.stages.average_weight, as_stored(param, row.dtype[0]), average);
    store_one(row.average, row.average_dtype, at, average);
  }

  template <class Code>
  __device__ __forceinline__ void see_or_store(Code code, bool stores, Statistics<uint32_t>& statistics,
                                               const Encoding& encoding, int role, int64_t at, S value) const {
    const auto x = static_cast<float>(value);
    if (!stores) return add_magnitude(code, statistics, bits_of(x) & 0x7fffffffu);
    static_cast<uint8_t*>(row.data[role])[at] = static_cast<uint8_t>(encode(code, encoding, x));
  }
};

}  // namespace
}  // namespace trainopt::cuda
