// The reduce phase's inner loop: load, the stages before the rule, what an element adds to a pass's sums. Every tensor
// is seen as tiles of the arithmetic's type, so that element i of a chunk meets lane i % kSumLanes in every SIMD
// variant.
#pragma once

#include "core/sum.h"
#include "cpu/norm_kernel.h"
#include "cpu/tile.h"
#include "cpu/vec.h"
#include "rules/stages.h"

namespace trainopt::cpu {
namespace {

static_assert(kLanes == kSumLanes && kSumSegment % kBlock == 0);

// What a block's elements add to each sum: the two factors of a product, of squares the first alone.
template <class S, int kCount>
struct BlockTerms {
  S a[kCount][kBlock], b[kCount][kBlock];
};

// The lanes of one segment, of each sum.
template <int kCount>
struct SegmentSums {
  double high[kCount][kSumLanes] = {}, low[kCount][kSumLanes] = {};
};

// `add` of core/sum.h, lane by lane.
TRAINOPT_FUNCTION SumOf<Vec<double>> add(SumOf<Vec<double>> a, SumOf<Vec<double>> b) {
  using T = Vec<double>;
  const T high = a.high + b.high, added = high - a.high;
  const T low = (a.low + b.low) + ((a.high - (high - added)) + (b.high - added));
  const T both = high + low, zero(0.0);
  const auto is_finite = (both - both).lanes == zero.lanes;
  return {is_finite ? both.lanes : high.lanes, is_finite ? (low - (both - high)).lanes : zero.lanes};
}

// `combine_lanes` of core/sum.h, whole vectors as long as there are any: of small tensors the lanes one by one took
// more time than all the rest of the phase, 0.2 of LARS's 0.56 us for a tensor. Leaves nothing in them that is of use.
[[gnu::noinline]] Sum combine_segment(double* high, double* low) {
  using T = Vec<double>;
  int width = kSumLanes / 2;
  for (; width >= T::kSize; width /= 2)
    for (int i = 0; i < width; i += T::kSize) {
      const SumOf<T> sum =
          add(SumOf<T>{load(high + i), load(low + i)}, SumOf<T>{load(high + i + width), load(low + i + width)});
      store(high + i, sum.high);
      store(low + i, sum.low);
    }
  Sum lanes[T::kSize];
  for (int i = 0; i < T::kSize; ++i) lanes[i] = {high[i], low[i]};
  combine_pairwise(lanes, T::kSize, T::kSize);
  return lanes[0];
}

// What a tensor has not got is zeros.
template <class S>
alignas(64) constexpr S kZeros[kBlock] = {};

// Adds products to the lanes of one sum, from so many elements, a multiple of kSumLanes. One sum after the other, as
// the lanes of two do not fit into the registers of AVX2.
[[gnu::noinline]] void add_products(const float* a, const float* b, int count, double* high, double*) {
  Sums<kSums> sums(high);
  if (a == b) {
    for (int i = 0; i < count; i += kSumLanes) sums.template add_lanes<Norm::kSquares>(a + i);
  } else {
    for (int i = 0; i < count; i += kSumLanes) sums.add_products(a + i, b + i);
  }
  sums.store_to(high);
}
[[gnu::noinline]] void add_products(const double* a, const double* b, int count, double* high, double* low) {
  using T = Vec<double>;
  constexpr int kBeside = 4 * T::kSize <= kSumLanes ? 4 : kSumLanes / T::kSize;  // chains that wait for each other less
  for (int v = 0; v < kSumLanes; v += kBeside * T::kSize) {
    SumOf<T> sums[kBeside];
    for (int k = 0; k < kBeside; ++k) sums[k] = {load(high + v + k * T::kSize), load(low + v + k * T::kSize)};
    for (int i = v; i < count; i += kSumLanes)
      for (int k = 0; k < kBeside; ++k)
        add_term<double>(sums[k], load(a + i + k * T::kSize) * load(b + i + k * T::kSize));
    for (int k = 0; k < kBeside; ++k) {
      store(high + v + k * T::kSize, sums[k].high);
      store(low + v + k * T::kSize, sums[k].low);
    }
  }
}

template <class Pass>
constexpr bool kHasPlainTerms = false;
template <class Rule>
constexpr bool kHasPlainTerms<OwnSums<Rule>> = true;

// Puts the terms of `count` elements, a multiple of kSumLanes, at `at` of a block's. parts: those of the parameter, the
// gradient and the states.
template <class Pass, bool kPlain, class S>
TRAINOPT_FUNCTION void put_terms(const Stages<S>& stages, const typename Pass::Rule::template Scalars<S>& scalars,
                                 const S* const* parts, int count, int at, BlockTerms<S, Pass::kCount>* terms) {
  using Rule = typename Pass::Rule;
  using T = Vec<S>;
  for (int i = 0; i < count; i += T::kSize) {
    T state[kStateCount<Rule>];
    for (int s = 0; s < kStateCount<Rule>; ++s) state[s] = load(parts[2 + s] + i);
    Term<T> of[Pass::kCount];
    Pass::template gather<kPlain>(stages, scalars, load(parts[0] + i), load(parts[1] + i), state, of);
    for (int s = 0; s < Pass::kCount; ++s) {
      store(terms->a[s] + at + i, of[s].a);
      if (!contains(Pass::kSquares, s)) store(terms->b[s] + at + i, of[s].b);
    }
  }
}

// One kernel for all sets of states, as a third of the time that the kernels took to compile was that of one for each:
// those that a task does not have, or the pass does not read, are zeros.
template <class Pass, bool kPlain, class S>
void gather_as(const TensorTask& task, const Stages<S>& stages, int64_t begin, int64_t end, Sum* sums) {
  using Rule = typename Pass::Rule;
  constexpr int kParts = 2 + kStateCount<Rule>, kCount = Pass::kCount;
  typename Rule::template Scalars<S> scalars;
  __builtin_memcpy(&scalars, task.scalars->rule, sizeof scalars);
  const StateSet present = states_of<Rule>(task), states = present & Pass::kStates;
  complete_for_tensor<Rule>(scalars, present, task.param.dtype, task.whole_numel());
  const bool reads_param = Pass::kOfParam || stages.adds_parameter();
  S buffer[kParts][kBlock];
  BlockTerms<S, kCount> terms;
  for (int s = 0; s < kCount; ++s) sums[s] = {0, 0};
  for (int64_t segment = begin; segment < end; segment += kSumSegment) {
    const int64_t segment_end = end - segment < kSumSegment ? end : segment + kSumSegment;
    SegmentSums<kCount> lanes;
    for (int64_t at = segment; at < segment_end; at += kBlock) {
      const int count = static_cast<int>(segment_end - at < kBlock ? segment_end - at : kBlock);
      const S* parts[kParts];
      parts[0] = reads_param ? load_tile(task.param, at, count, buffer[0]) : kZeros<S>;
      parts[1] = load_tile(task.gradient, at, count, buffer[1]);
      for (int s = 0; s < kStateCount<Rule>; ++s)
        parts[2 + s] = contains(states, s) ? load_tile(task.state[s], at, count, buffer[2 + s]) : kZeros<S>;
      const int rest = count % kSumLanes, whole = count - rest;
      put_terms<Pass, kPlain>(stages, scalars, parts, whole, 0, &terms);
      if (rest != 0) {
        // The rest of a tensor: the same code over a padded copy, of which only the elements count. A rule may make of
        // zeros what is none.
        S padded[kParts][kSumLanes] = {};
        for (int r = 0; r < kParts; ++r) {
          __builtin_memcpy(padded[r], parts[r] + whole, static_cast<size_t>(rest) * sizeof(S));
          parts[r] = padded[r];
        }
        put_terms<Pass, kPlain>(stages, scalars, parts, kSumLanes, whole, &terms);
        for (int s = 0; s < kCount; ++s)
          for (int k = count; k < whole + kSumLanes; ++k) terms.a[s][k] = terms.b[s][k] = 0;
      }
      for (int s = 0; s < kCount; ++s)
        add_products(terms.a[s], contains(Pass::kSquares, s) ? terms.a[s] : terms.b[s],
                     rest == 0 ? whole : whole + kSumLanes, lanes.high[s], lanes.low[s]);
    }
    for (int s = 0; s < kCount; ++s) sums[s] = add(sums[s], combine_segment(lanes.high[s], lanes.low[s]));
  }
}

template <class Pass, class S>
void gather(const TensorTask& task, int64_t begin, int64_t end, Sum* sums) {
  const Stages<S> stages = stages_of(*task.scalars, S());
  // A cautious step, which is the reason for its pass, is never plain.
  if constexpr (kHasPlainTerms<Pass>)
    if (stages.is_plain()) return gather_as<Pass, true>(task, stages, begin, end, sums);
  gather_as<Pass, false>(task, stages, begin, end, sums);
}

// Null for the sums of a rule that has none.
template <class Pass, class S>
constexpr GatherKernel gather_kernel() {
  if constexpr (Pass::kCount > 0) return gather<Pass, S>;
  return nullptr;
}

}  // namespace
}  // namespace trainopt::cpu
