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

// What kSumLanes elements beside each other add to each sum: the two factors of a product.
template <class S, int kCount>
struct LaneTerms {
  S a[kCount][kSumLanes], b[kCount][kSumLanes];
};

// The lanes of one segment.
template <int kCount>
struct LaneSums {
  static constexpr int kVectors = kSumLanes / Vec<double>::kSize;
  SumOf<Vec<double>> of[kCount][kVectors];

  TRAINOPT_INLINE LaneSums() {
    for (int s = 0; s < kCount; ++s)
      for (int v = 0; v < kVectors; ++v) of[s][v] = {Vec<double>(0.0), Vec<double>(0.0)};
  }

  template <class S>
  TRAINOPT_INLINE void add_terms(const LaneTerms<S, kCount>& terms) {
    for (int s = 0; s < kCount; ++s)
      for (int v = 0; v < kVectors; ++v) {
        const int at = v * Vec<double>::kSize;
        add_term<S>(of[s][v], load_wide(terms.a[s] + at) * load_wide(terms.b[s] + at));
      }
  }

  TRAINOPT_INLINE Sum combined(int s) const {
    double high[kSumLanes], low[kSumLanes];
    for (int v = 0; v < kVectors; ++v) {
      store(high + v * Vec<double>::kSize, of[s][v].high);
      store(low + v * Vec<double>::kSize, of[s][v].low);
    }
    Sum lanes[kSumLanes];
    for (int i = 0; i < kSumLanes; ++i) lanes[i] = {high[i], low[i]};
    return combine_lanes(lanes, kSumLanes);
  }
};

template <class Pass>
constexpr bool kHasPlainTerms = false;
template <class Rule>
constexpr bool kHasPlainTerms<OwnSums<Rule>> = true;

// Terms of kSumLanes elements. parts: those of the parameter, the gradient and the states.
template <class Pass, bool kPlain, class S>
TRAINOPT_FUNCTION void terms_of(const Stages<S>& stages, const typename Pass::Rule::template Scalars<S>& scalars,
                                const S* const* parts, LaneTerms<S, Pass::kCount>* terms) {
  using Rule = typename Pass::Rule;
  using T = Vec<S>;
  for (int i = 0; i < kSumLanes; i += T::kSize) {
    T state[kStateCount<Rule>];
    for (int s = 0; s < kStateCount<Rule>; ++s) state[s] = load(parts[2 + s] + i);
    Term<T> of[Pass::kCount];
    Pass::template gather<kPlain>(stages, scalars, load(parts[0] + i), load(parts[1] + i), state, of);
    for (int s = 0; s < Pass::kCount; ++s) {
      store(terms->a[s] + i, of[s].a);
      store(terms->b[s] + i, of[s].b);
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
  if (!reads_param) __builtin_memset(buffer[0], 0, sizeof buffer[0]);
  for (int s = 0; s < kStateCount<Rule>; ++s)
    if (!contains(states, s)) __builtin_memset(buffer[2 + s], 0, sizeof buffer[0]);
  LaneTerms<S, kCount> terms;
  for (int s = 0; s < kCount; ++s) sums[s] = {0, 0};
  for (int64_t segment = begin; segment < end; segment += kSumSegment) {
    const int64_t segment_end = end - segment < kSumSegment ? end : segment + kSumSegment;
    LaneSums<kCount> lanes;
    for (int64_t at = segment; at < segment_end; at += kBlock) {
      const int count = static_cast<int>(segment_end - at < kBlock ? segment_end - at : kBlock);
      const S* parts[kParts];
      parts[0] = reads_param ? load_tile(task.param, at, count, buffer[0]) : static_cast<const S*>(buffer[0]);
      parts[1] = load_tile(task.gradient, at, count, buffer[1]);
      for (int s = 0; s < kStateCount<Rule>; ++s)
        parts[2 + s] = contains(states, s) ? load_tile(task.state[s], at, count, buffer[2 + s])
                                           : static_cast<const S*>(buffer[2 + s]);
      int i = 0;
      for (; i + kSumLanes <= count; i += kSumLanes) {
        terms_of<Pass, kPlain>(stages, scalars, parts, &terms);
        lanes.add_terms(terms);
        for (const S*& part : parts) part += kSumLanes;
      }
      if (i == count) continue;
      // The rest of a tensor: the same code over a padded copy, of which only the elements count. A rule may make of
      // zeros what is none.
      const int rest = count - i;
      S padded[kParts][kSumLanes] = {};
      for (int r = 0; r < kParts; ++r) {
        __builtin_memcpy(padded[r], parts[r], static_cast<size_t>(rest) * sizeof(S));
        parts[r] = padded[r];
      }
      terms_of<Pass, kPlain>(stages, scalars, parts, &terms);
      for (int s = 0; s < kCount; ++s)
        for (int k = rest; k < kSumLanes; ++k) terms.a[s][k] = terms.b[s][k] = 0;
      lanes.add_terms(terms);
    }
    for (int s = 0; s < kCount; ++s) sums[s] = add(sums[s], lanes.combined(s));
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
