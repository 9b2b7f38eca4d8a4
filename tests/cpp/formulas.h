// The rules' formulas, written anew in double, for one element: what every engine is compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "formats.h"
#include "settings.h"

namespace trainopt {

// What a tensor's elements add up to: for LAMB and LARS squares of the parameter, and of LAMB's update or LARS's
// gradient; for the rule of the tests what that says.
struct Sums {
  double of[kMaxSums] = {};
  double agreeing = 0, all = 0;  // elements; the former where the update has the gradient's sign

  double root(int i) const { return std::sqrt(of[i]); }
  double ratio_to(double by) const { return of[0] != 0 && of[1] != 0 ? root(0) / by : 1; }
};

// Of a gradient without its scale: clip_grad_norm_'s.
inline double clip_factor(const Setting& s) {
  return s.tail.max_norm == 0 ? 1 : std::min(s.tail.max_norm / (s.tail.norm / s.gradient_scale + 1e-6), 1.0);
}

// The gradient as the rule sees it; decay that is decoupled has shrunk the parameter then.
inline double direction_of(const Setting& s, double& p, double g) {
  g = g / s.gradient_scale * clip_factor(s);
  double direction = s.maximize ? -g : g;
  if (s.decay == kCoupled) direction += s.weight_decay * p;
  if (!s.l1_proximal) direction += s.l1 * sign(p);
  if (s.decay == kDecoupled) p *= 1 - s.lr * s.weight_decay;
  return direction;
}

// The rules -----------------------------------------------------------------------------------------------------------

// What a step takes from the parameter, of a tensor with these sums; moves the states on.
inline double sgd_change(const Setting& s, double, double direction, double* state, const Sums&) {
  const std::vector<double>& o = s.options;
  if (o[0] != 0) {
    state[0] = s.step == 1 ? direction : o[0] * state[0] + (1 - o[1]) * direction;
    direction = o[2] != 0 ? direction + o[0] * state[0] : state[0];
  }
  return s.lr * direction;
}

inline double lars_change(const Setting& s, double p, double direction, double* state, const Sums& sums) {
  const std::vector<double>& o = s.options;
  double ratio = 1;
  if (s.weight_decay != 0 || o[6] != 0) {
    ratio = sums.ratio_to((sums.root(1) + s.weight_decay * sums.root(0) + o[4]) / o[3]);
    if (o[5] != 0) ratio = std::min(ratio / s.lr, 1.0);
  }
  return sgd_change(s, p, ratio * (direction + s.weight_decay * p), state, sums);
}

inline void move_moments(const Setting& s, double direction, double* state) {
  const std::vector<double>& o = s.options;
  state[0] = o[0] * state[0] + (1 - o[0]) * direction;
  state[1] = o[1] * state[1] + (1 - o[1]) * direction * direction;
}

// Of the first or the second moment.
inline double bias_correction(const Setting& s, int moment) {
  return s.options[5] != 0 ? 1 - std::pow(s.options[moment], s.step) : 1;
}

inline double adam_change(const Setting& s, double, double direction, double* state, const Sums&) {
  const std::vector<double>& o = s.options;
  move_moments(s, direction, state);
  double v = state[1];
  if (o[3] != 0) v = state[2] = std::max(state[2], v);
  return s.lr / bias_correction(s, 0) * state[0] / (std::sqrt(v) / std::sqrt(bias_correction(s, 1)) + o[2]);
}

// Before its scaling.
inline double lamb_update(const Setting& s, double p, double direction, double* state) {
  const double before = state[0];
  move_moments(s, direction, state);
  if (s.options[6] == 0) state[0] = s.options[0] * before + direction;
  return state[0] / bias_correction(s, 0) / (std::sqrt(state[1] / bias_correction(s, 1)) + s.options[2]) +
         (s.decay == kInUpdate ? s.weight_decay * p : 0);
}

inline double lamb_change(const Setting& s, double p, double direction, double* state, const Sums& sums) {
  const std::vector<double>& o = s.options;
  double ratio = s.weight_decay != 0 || o[4] != 0 ? sums.ratio_to(sums.root(1)) : 1;
  if (o[3] != 0) ratio = std::min(ratio, 1.0);
  return s.lr * ratio * lamb_update(s, p, direction, state);
}

inline double eight_change(const Setting& s, double p, double direction, double* state, const Sums&) {
  double sum = s.decay == kInUpdate ? s.weight_decay * p : 0;
  for (int i = 0; i < 8; ++i) sum += state[i] = state[i] / 2 + std::ldexp(direction, -i);
  return s.lr * sum;
}

inline double four_change(const Setting& s, double, double direction, double* state, const Sums& sums) {
  state[0] = state[0] / 2 + direction;
  return s.lr * (state[0] + (sums.of[0] + sums.of[1] - sums.of[2]) / sums.of[3]);
}

// What one element adds to its tensor's sums.
inline Sums lars_terms(const Setting&, double p, double direction, double*) { return {{p * p, direction * direction}}; }

inline Sums lamb_terms(const Setting& s, double p, double direction, double* state) {
  const double update = lamb_update(s, p, direction, state);
  return {{p * p, update * update}};
}

inline Sums four_terms(const Setting&, double p, double direction, double* state) {
  return {{p, p * direction, (state[0] / 2 + direction) * direction, 1}};
}

struct RuleFormulas {
  const char* rule;
  double (*change)(const Setting&, double p, double direction, double* state, const Sums&);
  Sums (*terms)(const Setting&, double p, double direction, double* state);  // null without a reduce phase
};
constexpr RuleFormulas kRuleFormulas[] = {
    {"sgd", sgd_change, nullptr},      {"lars", lars_change, lars_terms}, {"adam", adam_change, nullptr},
    {"lamb", lamb_change, lamb_terms}, {"eight", eight_change, nullptr},  {"four", four_change, four_terms},
};

inline const RuleFormulas& formulas_of(const Setting& s) {
  for (const RuleFormulas& formulas : kRuleFormulas)
    if (std::strcmp(formulas.rule, s.rule) == 0) return formulas;
  std::abort();
}

// A step of one element -----------------------------------------------------------------------------------------------

inline void gather_element(const Setting& s, double p, double g, double* state, Sums* sums) {
  const RuleFormulas& formulas = formulas_of(s);
  if (formulas.terms == nullptr) return;
  const double direction = direction_of(s, p, g);
  const Sums terms = formulas.terms(s, p, direction, state);
  for (int i = 0; i < kMaxSums; ++i) sums->of[i] += terms.of[i];
}

// Once the others are known.
inline void ask_element(const Setting& s, double p, double g, double* state, Sums* sums) {
  const double direction = direction_of(s, p, g);
  sums->agreeing += formulas_of(s).change(s, p, direction, state, *sums) * direction > 0;
  ++sums->all;
}

inline void step_element(const Setting& s, double& p, double& g, double* state, double noise, const Sums& sums) {
  const double direction = direction_of(s, p, g);
  double change = formulas_of(s).change(s, p, direction, state, sums);
  if (s.tail.cautious) change = change * direction > 0 ? change / std::max(sums.agreeing / sums.all, 1e-3) : 0;
  p -= change;
  if (s.l1_proximal) p = sign(p) * std::max(std::fabs(p) - s.lr * s.l1, 0.0);
  p += s.noise * noise;
  if (s.writes_gradient()) g = s.tail.clears ? 0 : g / s.gradient_scale;
}

// How far the average goes towards the parameter: (1 - d_t) / (1 - d_1 ... d_t), where d_t is the decay, or with
// warm-up the smaller of it and t / (9 + t).
inline double average_weight_of(const Setting& s) {
  double decay = 0, product = 1;
  for (int t = 1; t <= s.step; ++t) {
    decay = s.tail.ema_warmup ? std::min(s.tail.ema_decay, t / (9.0 + t)) : s.tail.ema_decay;
    product *= decay;
  }
  return (1 - decay) / (1 - product);
}

}  // namespace trainopt
