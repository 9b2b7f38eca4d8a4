// The settings under which every engine steps, and what an engine is handed for them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/engine.h"

namespace trainopt {

// What the step does besides: clips gradients of this norm, which has their scale in it; clears them; moves an average
// of the parameter; leaves out what disagrees with the gradient; rounds 16-bit parameters at random.
struct Tail {
  double max_norm = 0, norm = 0;  // max_norm 0: no clipping
  bool clears = false;
  double ema_decay = 0;  // 0: no average
  bool ema_warmup = false, cautious = false, rounds_at_random = false;
};

struct Setting {
  const char* name;
  const char* rule;
  std::vector<double> options;  // in the rule's order
  Decay decay;
  double lr, weight_decay;
  bool maximize;
  double l1;
  bool l1_proximal;
  double noise, gradient_scale;
  double step;
  Tail tail = {};

  bool writes_gradient() const { return tail.clears || (gradient_scale != 1 && tail.max_norm == 0); }
};

// The options' order: SGD momentum, dampening, nesterov; Adam beta1, beta2, eps, amsgrad, decoupled, bias correction;
// LAMB beta1, beta2, eps, trust_clip, always_adapt, bias correction, grad_averaging, decoupled; LARS SGD's,
// trust_coeff, eps, trust_clip, always_adapt; eight and four, the rules in contract/rules/rules.h, set and decay, or
// decay.
constexpr Decay kCoupled = Decay::kGradient, kDecoupled = Decay::kParameter, kInUpdate = Decay::kUpdate;
constexpr Tail kCautious = {0, 0, false, 0, false, true}, kCleared = {1, 2, true, 0.9};
inline const std::vector<Setting> kSettings = {
    {"plain", "sgd", {0, 0, 0}, kCoupled, 0.1, 0, false, 0, false, 0, 1, 0},
    {"decay", "sgd", {0, 0, 0}, kCoupled, 0.1, 0.3, true, 0, false, 0, 1, 0},
    {"momentum", "sgd", {0.9, 0.2, 0}, kCoupled, 0.1, 0.3, false, 0, false, 0, 1, 0},
    {"first", "sgd", {0.9, 0.2, 0}, kCoupled, 0.1, 0.3, false, 0, false, 0, 1, 1},
    {"nesterov", "sgd", {0.9, 0, 1}, kCoupled, 0.1, 0.3, false, 0.2, false, 0.1, 3, 2},
    {"proximal", "sgd", {0.9, 0, 1}, kCoupled, 0.1, 0.3, true, 3, true, 0, 1, 5},
    {"l1, maximize", "sgd", {0.9, 0.2, 0}, kCoupled, 0.1, 0.3, true, 0.5, false, 0, 1, 2},
    {"plain", "adam", {0.9, 0.99, 0.05, 0, 0, 1}, kCoupled, 0.05, 0, false, 0, false, 0, 1, 3},
    {"beta1 0.4", "adam", {0.4, 0.9, 0.05, 0, 0, 1}, kCoupled, 0.05, 0.3, true, 0, false, 0, 1, 1},
    {"beta1 0", "adam", {0, 0.9, 0.05, 0, 0, 1}, kCoupled, 0.05, 0.3, false, 0, false, 0, 1, 2},
    {"decoupled", "adam", {0.9, 0.99, 0.05, 0, 1, 1}, kDecoupled, 0.05, 0.3, false, 0, false, 0, 1, 7},
    {"amsgrad", "adam", {0.9, 0.5, 0.05, 1, 1, 1}, kDecoupled, 0.05, 0.3, true, 0, false, 0, 1, 4},
    {"uncorrected", "adam", {0.9, 0.99, 0.05, 0, 0, 0}, kCoupled, 0.05, 0.3, false, 0.5, false, 0, 1, 4},
    {"everything", "adam", {0.8, 0.7, 0.05, 1, 1, 1}, kDecoupled, 0.05, 0.3, true, 2, true, 0.1, 3, 4},
    {"no state", "eight", {0, 0}, kCoupled, 0.05, 0.3, false, 0, false, 0, 1, 1},
    {"two ends", "eight", {1, 1}, kDecoupled, 0.05, 0.3, true, 0, false, 0, 1, 2},
    {"four apart", "eight", {2, 2}, kInUpdate, 0.05, 0.3, false, 0.5, false, 0.1, 3, 3},
    {"all", "eight", {3, 2}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 4},
    {"plain", "lamb", {0.9, 0.99, 0.05, 0, 0, 1, 1, 0}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 3},
    {"clipped", "lamb", {0.4, 0.9, 0.05, 1, 0, 0, 0, 0}, kInUpdate, 0.05, 0.3, true, 0.5, false, 0, 1, 2},
    {"without decay", "lamb", {0.9, 0.99, 0.05, 0, 0, 1, 1, 0}, kInUpdate, 0.05, 0, false, 0, false, 0, 1, 1},
    {"decoupled", "lamb", {0.9, 0.99, 0.05, 0, 0, 1, 1, 1}, kDecoupled, 0.05, 0.3, false, 0, false, 0, 1, 3},
    {"everything", "lamb", {0.8, 0.7, 0.05, 0, 1, 1, 1, 0}, kInUpdate, 0.05, 0, true, 2, true, 0.1, 3, 4},
    {"plain", "lars", {0, 0, 0, 0.1, 0.01, 0, 0}, kInUpdate, 0.5, 0.3, false, 0, false, 0, 1, 0},
    {"first", "lars", {0.9, 0.2, 0, 0.1, 0.01, 1, 0}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 1},
    {"everything", "lars", {0.9, 0, 1, 0.1, 0.01, 0, 1}, kInUpdate, 0.5, 0.3, true, 2, true, 0.1, 3, 4},
    {"sums of all kinds", "four", {0}, kCoupled, 0.05, 0.3, true, 0.5, false, 0.1, 3, 4},
    {"decoupled", "four", {1}, kDecoupled, 0.05, 0.3, false, 0, false, 0, 1, 1},
    {"clipped", "sgd", {0.9, 0, 1}, kCoupled, 0.1, 0.3, false, 0, false, 0, 3, 2, {0.5, 4}},
    {"clipped little, cleared", "sgd", {0, 0, 0}, kCoupled, 0.1, 0, false, 0, false, 0, 1, 1, {5, 4, true}},
    {"averaged", "adam", {0.9, 0.99, 0.05, 0, 0, 1}, kCoupled, 0.05, 0, false, 0, false, 0, 1, 3, {0, 0, false, 0.9}},
    {"tail",
     "adam",
     {0.9, 0.5, 0.05, 1, 1, 1},
     kDecoupled,
     0.05,
     0.3,
     true,
     2,
     true,
     0.1,
     3,
     4,
     {2, 9, true, 0.9, true}},
    {"averaged", "eight", {3, 2}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 20, {0, 0, false, 0.6, true}},
    {"tail", "lamb", {0.9, 0.99, 0.05, 0, 0, 1, 1, 0}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 1, kCleared},
    {"cautious", "sgd", {0.9, 0.2, 0}, kCoupled, 0.1, 0.3, true, 0.5, false, 0, 3, 2, kCautious},
    {"cautious", "adam", {0.9, 0.99, 0.05, 0, 1, 1}, kDecoupled, 0.05, 0.3, false, 0, false, 0, 1, 7, kCautious},
    {"cautious", "lamb", {0.9, 0.99, 0.05, 0, 0, 1, 1, 0}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 3, kCautious},
    {"cautious", "lars", {0.9, 0.2, 0, 0.1, 0.01, 1, 0}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 2, kCautious},
    {"cautious", "eight", {3, 2}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 4, kCautious},
};

inline const Setting& setting(const char* rule, const char* name) {
  for (const Setting& s : kSettings)
    if (std::strcmp(s.rule, rule) == 0 && std::strcmp(s.name, name) == 0) return s;
  std::abort();
}

constexpr uint64_t kSeed = 0x123456789abcdefu;

inline Settings settings_of(const Setting& s) {
  Settings settings;
  settings.lr = s.lr;
  settings.weight_decay = s.weight_decay;
  settings.l1 = s.l1;
  settings.noise = s.noise;
  settings.maximize = s.maximize;
  settings.l1_proximal = s.l1_proximal;
  settings.max_grad_norm = s.tail.max_norm;
  settings.clear_gradient = s.tail.clears;
  settings.averages = s.tail.ema_decay != 0;
  settings.ema_decay = s.tail.ema_decay;
  settings.ema_warmup = s.tail.ema_warmup;
  settings.cautious = s.tail.cautious;
  settings.round_at_random = s.tail.rounds_at_random;
  settings.seed = kSeed;
  return settings;
}

inline Scalars scalars_of(const Setting& s, bool is_float64) {
  const cpu::Rule* rule = cpu::find_rule(s.rule);
  if (s.options.size() != static_cast<size_t>(rule->option_count)) std::abort();  // the rule would read past its end
  const StepInfo info{s.lr, false, s.weight_decay, s.step, s.step == 1};
  const Decay decay = rule->decay(s.options.data());
  const Settings settings = settings_of(s);
  Scalars result;
  if (is_float64) {
    result.stages64 = prepare_stages<double>(settings, info, decay, s.gradient_scale, s.tail.norm);
  } else {
    result.stages32 = prepare_stages<float>(settings, info, decay, s.gradient_scale, s.tail.norm);
  }
  Numbers numbers{};
  rule->prepare(s.options.data(), info, is_float64, &result, &numbers);
  return result;
}

// The passes of the reduce phase that a step needs.
inline std::vector<Pass> passes_of(const Setting& s) {
  std::vector<Pass> passes;
  if (cpu::find_rule(s.rule)->sum_count > 0) passes.push_back(kOwnSums);
  if (s.tail.cautious) passes.push_back(kAgreement);
  return passes;
}

// The place of the moving average among a parameter's states.
inline int average_of(const Setting& s) { return static_cast<int>(cpu::find_rule(s.rule)->state_count); }

inline SlotSet states_of(const Setting& s) {
  const SlotSet of_rule = cpu::find_rule(s.rule)->states_needed(s.options.data());
  return s.tail.ema_decay == 0 ? of_rule : static_cast<SlotSet>(of_rule | 1u << average_of(s));
}

}  // namespace trainopt
