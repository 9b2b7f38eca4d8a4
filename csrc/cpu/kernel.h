// The engine's inner loop: load, the stages before the rule, the rule, the stages after it, store. Included once by
// each kernels_*.cpp, which names the table that it fills.
#pragma once

#include "cpu/coded_kernel.h"
#include "cpu/coded_tile.h"
#include "cpu/factor_kernel.h"
#include "cpu/gather_kernel.h"
#include "cpu/kernel_table.h"
#include "cpu/norm_kernel.h"
#include "cpu/random_tile.h"
#include "cpu/stats_tile.h"
#include "cpu/tile.h"
#include "cpu/vec.h"
#include "rules/stages.h"

namespace trainopt::cpu {
namespace {

// The parts of one tile, stored as `Stored`.
template <class Stored, class S, int kStates>
struct Tile {
  Stored* p;
  Stored* g;
  Stored* state[kStates];
  const S* noise;  // null without noise
};

template <class Rule, bool kPlain, StateSet kSet, class Stored, class S>
TRAINOPT_FUNCTION void update_at(const Stages<S>& stages, const typename Rule::template Scalars<S>& scalars,
                                 const Tile<Stored, S, kStateCount<Rule>>& tile, int i) {
  using T = Register<Stored>;
  T p = load(tile.p + i), g = load(tile.g + i), state[kStateCount<Rule>];
  for (int s = 0; s < kStateCount<Rule>; ++s) state[s] = contains(kSet, s) ? load(tile.state[s] + i) : T(S(0));
  T noise(S(0));
  if constexpr (!kPlain && sizeof(Stored) == sizeof(S))  // where it is made, all is in the arithmetic's type
    if (tile.noise != nullptr) noise = load(tile.noise + i);
  step_elements<Rule, kPlain>(stages, scalars, p, g, state, noise);
  store(tile.p + i, p);
  for (int s = 0; s < kStateCount<Rule>; ++s)
    if (contains(kWrittenStates<Rule, kSet>, s)) store(tile.state[s] + i, state[s]);
  if (!kPlain && stages.leaves_unscaled()) store(tile.g + i, g);
}

template <class Rule, bool kPlain, StateSet kSet, class Stored, class S>
TRAINOPT_FUNCTION void run_tile(const Stages<S>& given_stages, const typename Rule::template Scalars<S>& given_scalars,
                                const Tile<Stored, S, kStateCount<Rule>>& tile, int count) {
  // Copies whose address nobody has, which what is written cannot alias: so they stay in registers. Read anew for each
  // vector, they made AdamW of 64M elements 0.85 to 0.95 times as fast on one thread of an EPYC, and in the caches 0.8.
  const Stages<S> stages = given_stages;
  const typename Rule::template Scalars<S> scalars = given_scalars;
  constexpr int kSize = Register<Stored>::kSize;
  int i = 0;
  for (; i + kSize <= count; i += kSize) update_at<Rule, kPlain, kSet>(stages, scalars, tile, i);
  if (i == count) return;
  // The rest of a tensor, less than a vector: the same code over a padded copy.
  const size_t bytes = (count - i) * sizeof(Stored);
  Stored padded[2 + kStateCount<Rule>][kSize] = {};
  S padded_noise[kSize] = {};
  Tile<Stored, S, kStateCount<Rule>> rest{padded[0], padded[1], {}, nullptr};
  __builtin_memcpy(rest.p, tile.p + i, bytes);
  __builtin_memcpy(rest.g, tile.g + i, bytes);
  for (int s = 0; s < kStateCount<Rule>; ++s) {
    if (!contains(kSet, s)) continue;
    rest.state[s] = padded[2 + s];
    __builtin_memcpy(rest.state[s], tile.state[s] + i, bytes);
  }
  if (tile.noise != nullptr) {
    __builtin_memcpy(padded_noise, tile.noise + i, (count - i) * sizeof(S));
    rest.noise = padded_noise;
  }
  update_at<Rule, kPlain, kSet>(stages, scalars, rest, 0);
  __builtin_memcpy(tile.p + i, rest.p, bytes);
  for (int s = 0; s < kStateCount<Rule>; ++s)
    if (contains(kWrittenStates<Rule, kSet>, s)) __builtin_memcpy(tile.state[s] + i, rest.state[s], bytes);
  if (!kPlain && stages.leaves_unscaled()) __builtin_memcpy(tile.g + i, rest.g, bytes);
}

// Asks for a block that is to be read and written, four blocks before its turn: Intel's own prefetching asks for it as
// if it were only read. AdamW of 64M elements was 0.98 times as fast as torch's fused step without it and 1.02 with it
// on a Xeon, but GPT-2's 1.04 without and 0.93 with it on an EPYC.
constexpr int64_t kAheadElements = 64 * 1024;  // of a tensor that are left; shorter ones are in the caches
template <class Stored>
TRAINOPT_FUNCTION void prefetch_ahead(const Stored* block) {
  const char* ahead = reinterpret_cast<const char*>(block + 4 * kBlock);
  for (size_t line = 0; line < kBlock * sizeof(Stored); line += 64) __builtin_prefetch(ahead + line, 1);
}

// The moving average takes in the parameters as they have just been stored, while they are in the nearest cache.
template <class S>
[[gnu::noinline]] void average_tile(const TensorView& param, const TensorView& average, S weight, int64_t at,
                                    int count) {
  constexpr int kSize = Vec<S>::kSize;
  S buffer[2][kBlock];
  const S* p = load_tile(param, at, count, buffer[0]);
  S* a = load_tile(average, at, count, buffer[1]);
  int i = 0;
  for (; i + kSize <= count; i += kSize) {
    Vec<S> moved = load(a + i);
    move_average(weight, load(p + i), moved);
    store(a + i, moved);
  }
  for (; i < count; ++i) move_average(weight, p[i], a[i]);
  store_tile(average, at, count, a);
}

// All tensors are runs of one type, and there is no noise: they are worked on where they lie.
template <class Rule, bool kPlain, StateSet kSet, class Stored, class S>
TRAINOPT_FUNCTION void run_direct(const TensorTask& task, const Stages<S>& stages,
                                  const typename Rule::template Scalars<S>& scalars, int64_t begin, int64_t end) {
  const TensorView& average = task.state[kAverage<Rule>];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    Tile<Stored, S, kStateCount<Rule>> tile{
        static_cast<Stored*>(task.param.data) + at, static_cast<Stored*>(task.gradient.data) + at, {}, nullptr};
    for (int s = 0; s < kStateCount<Rule>; ++s)
      if (contains(kSet, s)) tile.state[s] = static_cast<Stored*>(task.state[s].data) + at;
    if (kAsksAhead && task.numel - at >= kAheadElements) {
      prefetch_ahead(tile.p);
      if (stages.write_gradient) prefetch_ahead(tile.g);
      for (int s = 0; s < kStateCount<Rule>; ++s)
        if (contains(kSet, s)) prefetch_ahead(tile.state[s]);
      if (average.data != nullptr && is_run_of<S>(average)) prefetch_ahead(static_cast<const S*>(average.data) + at);
    }
    if (task.stats != nullptr) note_before<S>(task, at, count);
    run_tile<Rule, kPlain, kSet>(stages, scalars, tile, count);
    if (stages.clear_gradient) clear_tile(task.gradient, at, count);
    if (task.stats != nullptr) note_after<S>(task, at, count);
    if (average.data != nullptr) average_tile(task.param, average, stages.average_weight, at, count);
  }
}

// Any types, any layouts, any stages, unless kPlain: what is not a run of the arithmetic's type goes through a buffer.
template <class Rule, bool kPlain, StateSet kSet, class S>
TRAINOPT_FUNCTION void run_buffered(const TensorTask& task, const Stages<S>& stages,
                                    const typename Rule::template Scalars<S>& scalars, int64_t begin, int64_t end) {
  S buffer[3 + kStateCount<Rule>][kBlock];
  float gaussians[kBlock];
  uint16_t bits[kBlock];
  const TensorKey key{stages.seed, stages.step, task.tensor};
  const bool rounds_at_random = stages.round_at_random && is_16_bit(task.param.dtype);
  const TensorView& average = task.state[kAverage<Rule>];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    if (task.stats != nullptr) note_before<S>(task, at, count);
    Tile<S, S, kStateCount<Rule>> tile{
        load_tile(task.param, at, count, buffer[0]), load_tile(task.gradient, at, count, buffer[1]), {}, nullptr};
    for (int s = 0; s < kStateCount<Rule>; ++s)
      if (contains(kSet, s)) tile.state[s] = load_tile(task.state[s], at, count, buffer[3 + s]);
    if (!kPlain && stages.noisy) {
      random_tile<Gaussians>(gaussians, task, at, count, key);
      for (int i = 0; i < kBlock; ++i) buffer[2][i] = gaussians[i];
      tile.noise = buffer[2];
    }
    run_tile<Rule, kPlain, kSet>(stages, scalars, tile, count);
    if constexpr (sizeof(S) == sizeof(float)) {
      if (rounds_at_random) {
        random_tile<RoundingBits>(bits, task, at, count, key);
        round_tile_at_random(task.param.dtype, count, bits, tile.p);
      }
    }
    store_tile(task.param, at, count, tile.p);
    for (int s = 0; s < kStateCount<Rule>; ++s)
      if (contains(kWrittenStates<Rule, kSet>, s))
        store_tile(task.state[s], at, count, tile.state[s], stages.code_rounding);
    if (stages.leaves_unscaled()) store_tile(task.gradient, at, count, tile.g);
    if (stages.clear_gradient) clear_tile(task.gradient, at, count);
    if (task.stats != nullptr) note_after<S>(task, at, count);
    if (average.data != nullptr) average_tile(task.param, average, stages.average_weight, at, count);
  }
}

// Parameters or states in two parts, in one of the ways that coded_kernel.h has: whole blocks. Returns where it has
// stopped.
template <class Rule, bool kPlain, StateSet kSet, class Param, class State>
[[gnu::noinline]] int64_t run_coded(const TensorTask& given, const Stages<float>& given_stages,
                                    const typename Rule::template Scalars<float>& given_scalars, int64_t begin,
                                    int64_t end) {
  // Copies, which the bytes that are written cannot alias.
  const TensorTask task = given;
  const Stages<float> stages = given_stages;
  const typename Rule::template Scalars<float> scalars = given_scalars;
  const TensorView& average = task.state[kAverage<Rule>];
  int64_t at = begin;
  for (; at + kBlock <= end; at += kBlock) {
    if (task.stats != nullptr) note_before<float>(task, at, kBlock);
    run_coded_block<Rule, kPlain, kSet, Param, State>(task, stages, scalars, at);
    if (stages.clear_gradient) clear_tile(task.gradient, at, kBlock);
    if (task.stats != nullptr) note_after<float>(task, at, kBlock);
    if (average.data != nullptr) average_tile(task.param, average, stages.average_weight, at, kBlock);
  }
  return at;
}

// For many states there are not the registers, and to compile a kernel of eight takes minutes; and under a sanitizer so
// do those of every rule but Adam.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kFewestCodedStates = 3;
#else
constexpr int kFewestCodedStates = 0;
#endif
template <class Rule>
constexpr bool kHasCodedKernels = kStateCount<Rule> >= kFewestCodedStates && kStateCount<Rule> <= 3;

template <class Rule, StateSet kSet>
TRAINOPT_FUNCTION int64_t run_if_coded(const TensorTask& task, const Stages<float>& stages,
                                       const typename Rule::template Scalars<float>& scalars, int64_t begin,
                                       int64_t end) {
  const auto run = [&](auto param, auto state) {
    using Param = decltype(param);
    using State = decltype(state);
    if (begin == end || !are_stored_as<Param, State>(task, kSet)) return;
    const auto kernel =
        stages.is_plain() ? run_coded<Rule, true, kSet, Param, State> : run_coded<Rule, false, kSet, Param, State>;
    begin = kernel(task, stages, scalars, begin, end);
  };
  if constexpr (kHasCodedKernels<Rule>) {
    if (stages.needs_random(is_16_bit(task.param.dtype))) return begin;
    run(Whole<float>(), InCodes());
    run(Whole<BFloat16>(), InCodes());
    run(WithRest<int16_t>(), InCodes());
    run(WithRest<int8_t>(), InCodes());
    run(WithRest<int16_t>(), Whole<BFloat16>());
  }
  return begin;
}

template <class Stored>
TRAINOPT_FUNCTION bool is_uniform(const TensorTask& task, StateSet set) {
  bool uniform = is_run_of<Stored>(task.param) && is_run_of<Stored>(task.gradient);
  for (int s = 0; s < kMaxStates; ++s)
    if (contains(set, s)) uniform = uniform && is_run_of<Stored>(task.state[s]);
  return uniform;
}

template <class Rule, StateSet kSet, class Stored, class S>
TRAINOPT_FUNCTION void run_uniform(const TensorTask& task, const Stages<S>& stages,
                                   const typename Rule::template Scalars<S>& scalars, int64_t begin, int64_t end) {
  if (stages.needs_random(sizeof(Stored) == sizeof(BFloat16)))
    return run_buffered<Rule, false, kSet>(task, stages, scalars, begin, end);
  if (stages.is_plain()) return run_direct<Rule, true, kSet, Stored>(task, stages, scalars, begin, end);
  run_direct<Rule, false, kSet, Stored>(task, stages, scalars, begin, end);
}

template <class Rule, StateSet kSet, class S>
void run_set(const TensorTask& task, int64_t begin, int64_t end) {
  const Stages<S> stages = stages_of(*task.scalars, S());
  typename Rule::template Scalars<S> scalars;
  static_assert(sizeof scalars <= kRuleScalarBytes);
  __builtin_memcpy(&scalars, task.scalars->rule, sizeof scalars);
  complete_for_tensor<Rule>(scalars, kSet, task.param.dtype, task.whole_numel());
  if (is_uniform<S>(task, kSet)) return run_uniform<Rule, kSet, S>(task, stages, scalars, begin, end);
  if constexpr (sizeof(S) == sizeof(float)) {
    if (is_uniform<BFloat16>(task, kSet)) return run_uniform<Rule, kSet, BFloat16>(task, stages, scalars, begin, end);
    if (is_uniform<Float16>(task, kSet)) return run_uniform<Rule, kSet, Float16>(task, stages, scalars, begin, end);
    begin = run_if_coded<Rule, kSet>(task, stages, scalars, begin, end);
  }
  // The usual way of a state that no memory holds: without the stages 64M elements took 37 ms in place of 58, one
  // thread.
  if constexpr ((kSet & kFactorStates<Rule>) != 0)
    if (stages.is_plain()) return run_buffered<Rule, true, kSet>(task, stages, scalars, begin, end);
  run_buffered<Rule, false, kSet>(task, stages, scalars, begin, end);
}

// By the states that the task has: the kernel of that set.
template <class Rule, class S>
void run(const TensorTask& task, int64_t begin, int64_t end) {
  const StateSet states = states_of<Rule>(task);
  for_each_set<Rule>([&](auto set) {
    constexpr StateSet kSet = decltype(set)::kSet;
    if (states == kSet) run_set<Rule, kSet, S>(task, begin, end);
  });
}

}  // namespace

#define TRAINOPT_KERNELS(rule) {run<rule, float>, run<rule, double>},
#define TRAINOPT_GATHERS(rule)                                                      \
  {{gather_kernel<OwnSums<rule>, float>(), gather_kernel<OwnSums<rule>, double>()}, \
   {gather_kernel<Agreement<rule>, float>(), gather_kernel<Agreement<rule>, double>()}},
const KernelTable TRAINOPT_KERNEL_TABLE = {{TRAINOPT_FOR_EACH_RULE(TRAINOPT_KERNELS)},
                                           {TRAINOPT_FOR_EACH_RULE(TRAINOPT_GATHERS)},
                                           random_range<Gaussians>,
                                           random_range<RoundingBits>,
                                           norm_of_chunk_kernel,
                                           scale_kernel,
                                           clamp_kernel,
                                           {add_squares_kernel<float>, add_squares_kernel<double>}};
#undef TRAINOPT_GATHERS
#undef TRAINOPT_KERNELS

}  // namespace trainopt::cpu
