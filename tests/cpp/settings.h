// The settings under which every engine steps, and what an engine is handed for them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/engine.h"

namespace trainopt {

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
};

// The options' order: SGD momentum, dampening, nesterov; Adam beta1, beta2, eps, amsgrad, decoupled, bias correction;
// LAMB beta1, beta2, eps, trust_clip, always_adapt, bias correction; LARS SGD's, trust_coeff, eps, trust_clip,
// always_adapt;
// eight and four, the rules in contract/rules/rules.h, set and decay, or decay.
constexpr Decay kCoupled = Decay::kGradient, kDecoupled = Decay::kParameter, kInUpdate = Decay::kUpdate;
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
    {"plain", "lamb", {0.9, 0.99, 0.05, 0, 0, 1}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 3},
    {"clipped", "lamb", {0.4, 0.9, 0.05, 1, 0, 0}, kInUpdate, 0.05, 0.3, true, 0.5, false, 0, 1, 2},
    {"without decay", "lamb", {0.9, 0.99, 0.05, 0, 0, 1}, kInUpdate, 0.05, 0, false, 0, false, 0, 1, 1},
    {"everything", "lamb", {0.8, 0.7, 0.05, 0, 1, 1}, kInUpdate, 0.05, 0, true, 2, true, 0.1, 3, 4},
    {"plain", "lars", {0, 0, 0, 0.1, 0.01, 0, 0}, kInUpdate, 0.5, 0.3, false, 0, false, 0, 1, 0},
    {"first", "lars", {0.9, 0.2, 0, 0.1, 0.01, 1, 0}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 1},
    {"everything", "lars", {0.9, 0, 1, 0.1, 0.01, 0, 1}, kInUpdate, 0.5, 0.3, true, 2, true, 0.1, 3, 4},
    {"sums of all kinds", "four", {0}, kCoupled, 0.05, 0.3, true, 0.5, false, 0.1, 3, 4},
    {"decoupled", "four", {1}, kDecoupled, 0.05, 0.3, false, 0, false, 0, 1, 1},
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
  settings.seed = kSeed;
  return settings;
}

inline Scalars scalars_of(const Setting& s, bool is_float64) {
  const cpu::Rule* rule = cpu::find_rule(s.rule);
  const StepInfo info{s.lr, false, s.weight_decay, s.step, s.step == 1};
  const Decay decay = rule->decay(s.options.data());
  const Settings settings = settings_of(s);
  Scalars result;
  if (is_float64) {
    result.stages64 = prepare_stages<double>(settings, info, decay, s.gradient_scale, 0);
  } else {
    result.stages32 = prepare_stages<float>(settings, info, decay, s.gradient_scale, 0);
  }
  rule->prepare(s.options.data(), info, is_float64, &result);
  return result;
}

inline StateSet states_of(const Setting& s) { return cpu::find_rule(s.rule)->states_needed(s.options.data()); }

}  // namespace trainopt
