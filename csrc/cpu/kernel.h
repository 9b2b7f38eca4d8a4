// The engine's inner loop: load, the stages before the rule, the rule, the stages after it, store. Included once by each
// kernels_*.cpp, which names the table that it fills.
#pragma once

#include "core/math.h"
#include "core/random.h"
#include "cpu/kernel_table.h"
#include "cpu/tile.h"
#include "cpu/vec.h"

namespace trainopt::cpu {
namespace {

// Elements of one quad in a tile, first all words, then all values: two loops that become vector code.
void gaussian_tile(float* out, int64_t begin, uint64_t seed, uint32_t step, uint32_t tensor) {
  constexpr int kQuads = kBlock / 4;
  uint32_t words[4][kQuads];
  for (int q = 0; q < kQuads; ++q) {
    const RandomWords r = random_words(seed, step, tensor, RandomStream::kNoise, static_cast<uint64_t>(begin / 4 + q));
    for (int w = 0; w < 4; ++w) words[w][q] = r.word[w];
  }
  for (int q = 0; q < kQuads; ++q) {
    const GaussianPair one = gaussian_pair(words[0][q], words[1][q]);
    const GaussianPair two = gaussian_pair(words[2][q], words[3][q]);
    out[4 * q] = one.first;
    out[4 * q + 1] = one.second;
    out[4 * q + 2] = two.first;
    out[4 * q + 3] = two.second;
  }
}

void gaussian_range(float* out, int64_t begin, int64_t count, uint64_t seed, uint32_t step, uint32_t tensor) {
  float tile[kBlock];
  for (int64_t i = begin, end = begin + count; i < end;) {
    const int64_t first = i / kBlock * kBlock;
    gaussian_tile(tile, first, seed, step, tensor);
    for (; i < end && i < first + kBlock; ++i) *out++ = tile[i - first];
  }
}

template <class Rule>
constexpr int kStateCount = sizeof(Rule::kStates) / sizeof(Rule::kStates[0]);

// One vector of elements: everything that happens to them between load and store.
template <class Rule, class S>
TRAINOPT_FUNCTION void update(const Stages<S>& stages, const typename Rule::template Scalars<S>& scalars, Vec<S>& p,
                              Vec<S>& g, Vec<S>* state, const Vec<S>& noise) {
  using V = Vec<S>;
  if (stages.scaled) g = g / V(stages.gradient_scale);
  V slope = g;
  if (stages.negate) slope = -slope;
  if (stages.decay_gradient) slope = slope + p * V(stages.weight_decay);
  if (stages.l1_gradient) slope = slope + sign_of(p) * V(stages.l1);
  if (stages.decay_parameter) p = p * V(stages.keep);
  Rule::update(scalars, p, slope, state);
  if (stages.l1_proximal) p = soft_threshold(p, V(stages.threshold));
  if (stages.noisy) p = p + noise * V(stages.noise);
}

template <class S>
TRAINOPT_FUNCTION Vec<S> load(const S* from) {
  Vec<S> v;
  __builtin_memcpy(&v.lanes, from, sizeof v.lanes);
  return v;
}

template <class S>
TRAINOPT_FUNCTION void store(S* to, Vec<S> v) {
  __builtin_memcpy(to, &v.lanes, sizeof v.lanes);
}

// The parts of one tile.
template <class S, int kStates>
struct Tile {
  S* p;
  S* g;
  S* state[kStates];  // null where the rule does not need it
  const S* noise;     // null without noise
};

template <class Rule, class S>
TRAINOPT_FUNCTION void update_at(const Stages<S>& stages, const typename Rule::template Scalars<S>& scalars,
                                 const Tile<S, kStateCount<Rule>>& tile, int i) {
  constexpr int kStates = kStateCount<Rule>;
  Vec<S> p = load(tile.p + i), g = load(tile.g + i), noise(S(0)), state[kStates];
  for (int s = 0; s < kStates; ++s) state[s] = tile.state[s] != nullptr ? load(tile.state[s] + i) : Vec<S>(S(0));
  if (tile.noise != nullptr) noise = load(tile.noise + i);
  update<Rule>(stages, scalars, p, g, state, noise);
  store(tile.p + i, p);
  for (int s = 0; s < kStates; ++s)
    if (tile.state[s] != nullptr) store(tile.state[s] + i, state[s]);
  if (stages.write_gradient) store(tile.g + i, g);
}

template <class Rule, class S>
TRAINOPT_FUNCTION void run_tile(const Stages<S>& stages, const typename Rule::template Scalars<S>& scalars,
                                const Tile<S, kStateCount<Rule>>& tile, int count) {
  constexpr int kStates = kStateCount<Rule>, kSize = Vec<S>::kSize;
  int i = 0;
  for (; i + kSize <= count; i += kSize) update_at<Rule>(stages, scalars, tile, i);
  if (i == count) return;
  // The rest of a tensor, less than a vector: the same code over a padded copy.
  const int bytes = (count - i) * static_cast<int>(sizeof(S));
  S padded[kStates + 3][kSize] = {};
  Tile<S, kStates> rest{padded[0], padded[1], {}, nullptr};
  __builtin_memcpy(rest.p, tile.p + i, bytes);
  __builtin_memcpy(rest.g, tile.g + i, bytes);
  for (int s = 0; s < kStates; ++s) {
    if (tile.state[s] == nullptr) continue;
    rest.state[s] = padded[3 + s];
    __builtin_memcpy(rest.state[s], tile.state[s] + i, bytes);
  }
  if (tile.noise != nullptr) {
    __builtin_memcpy(padded[2], tile.noise + i, bytes);
    rest.noise = padded[2];
  }
  update_at<Rule>(stages, scalars, rest, 0);
  __builtin_memcpy(tile.p + i, rest.p, bytes);
  for (int s = 0; s < kStates; ++s)
    if (tile.state[s] != nullptr) __builtin_memcpy(tile.state[s] + i, rest.state[s], bytes);
  if (stages.write_gradient) __builtin_memcpy(tile.g + i, rest.g, bytes);
}

TRAINOPT_FUNCTION const Stages<float>& stages_of(const Scalars& s, float) { return s.stages32; }
TRAINOPT_FUNCTION const Stages<double>& stages_of(const Scalars& s, double) { return s.stages64; }

template <class Rule, class S>
void run(const Task& task, int64_t begin, int64_t end) {
  constexpr int kStates = kStateCount<Rule>;
  // Copies: nothing that the loop writes can alias them.
  const Stages<S> stages = stages_of(*task.scalars, S());
  typename Rule::template Scalars<S> scalars;
  static_assert(sizeof scalars <= kRuleScalarBytes);
  __builtin_memcpy(&scalars, task.scalars->rule, sizeof scalars);

  S buffer[kStates + 3][kBlock];
  float gaussians[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    const int64_t next = at + kBlock;
    prefetch_tile(task.param, next, end);
    prefetch_tile(task.gradient, next, end);
    Tile<S, kStates> tile;
    tile.p = load_tile(task.param, at, count, buffer[0]);
    tile.g = load_tile(task.gradient, at, count, buffer[1]);
    for (int s = 0; s < kStates; ++s) {
      prefetch_tile(task.state[s], next, task.state[s].data != nullptr ? end : 0);
      tile.state[s] = task.state[s].data != nullptr ? load_tile(task.state[s], at, count, buffer[3 + s]) : nullptr;
    }
    tile.noise = nullptr;
    if (stages.noisy) {
      gaussian_tile(gaussians, at, stages.seed, task.step, task.tensor);
      for (int i = 0; i < kBlock; ++i) buffer[2][i] = gaussians[i];
      tile.noise = buffer[2];
    }
    run_tile<Rule>(stages, scalars, tile, count);
    store_tile(task.param, at, count, tile.p);
    for (int s = 0; s < kStates; ++s)
      if (tile.state[s] != nullptr) store_tile(task.state[s], at, count, tile.state[s]);
    if (stages.write_gradient) store_tile(task.gradient, at, count, tile.g);
  }
}

}  // namespace

#define TRAINOPT_KERNELS(rule) {run<rule, float>, run<rule, double>},
const KernelTable TRAINOPT_KERNEL_TABLE = {{TRAINOPT_FOR_EACH_RULE(TRAINOPT_KERNELS)}, gaussian_range};
#undef TRAINOPT_KERNELS

}  // namespace trainopt::cpu
