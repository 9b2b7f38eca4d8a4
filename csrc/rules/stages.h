// What happens to an element round its rule, whatever the rule and the device: the gradient's scale, clipping and sign,
// decay, L1, noise. Both engines run these between their load and their store, which clears the gradient.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/code8.h"
#include "core/macros.h"
#include "core/math.h"
#include "core/random.h"
#include "rules/average.h"
#include "rules/rule.h"

namespace trainopt {

// The hyper-parameters that all rules share, as a parameter group gives them. All fields are eight bytes is_float64.
struct Settings {
  double lr = 0, lr_is_float32 = 0;  // lr_is_float32: the learning rate is a float32 tensor
  double weight_decay = 0, l1 = 0, noise = 0;
  double max_grad_norm = 0;  // 0: gradients are not clipped
  double ema_decay = 0;
  double maximize = 0, l1_proximal = 0, clear_gradient = 0;  // truth values
  double averages = 0, ema_warmup = 0;                       // likewise: whether a parameter has a moving average
  double cautious = 0, cautious_weight_decay = 0, round_at_random = 0;  // likewise
  uint64_t seed = 0;

  // Whether the step writes to gradients: to clear them, or to leave them without the scale that they came with, as
  // torch's fused optimizers do. Those that are clipped are left as they came.
  TRAINOPT_INLINE bool writes_gradient(bool is_scaled) const {
    return clear_gradient != 0 || (is_scaled && max_grad_norm == 0);
  }

  // What the tensor's gradient, which has this norm, is multiplied by for the rule: the sign, and clipping as torch's
  // clip_grad_norm_ has it, which multiplies by min(1, max_norm / (norm + 1e-6)), once the scale is out of both. A norm
  // of NaN makes it NaN.
  TRAINOPT_INLINE double gradient_factor(double gradient_scale, double norm) const {
    const double sign = maximize != 0 ? -1 : 1;
    if (max_grad_norm == 0) return sign;
    const double excess = (norm / gradient_scale + 1e-6) / max_grad_norm;
    return sign / (excess <= 1 ? gradient_scale : gradient_scale * excess);
  }
};

// The same for all parameters of a group at one step. S is the arithmetic's type.
template <class S>
struct Stages {
  bool scaled, has_factor, decay_gradient, l1_gradient, l1_proximal, noisy;
  bool write_gradient, clear_gradient;  // with zeros, or with what it is without its scale
  bool cautious, cautious_decay;
  bool round_at_random;  // a 16-bit parameter
  S scale;               // the gradient is divided by it, if it is scaled: torch's fused optimizers divide
  S gradient_factor;     // then it is multiplied by this, if it has one
  S weight_decay;        // L2: added to the gradient, times the parameter
  S decay_factor;        // decoupled decay: the parameter is multiplied by it; else 1
  S cautious_scale;      // of an update that agrees with the gradient, once the reduce phase has found it
  S cautious_share;      // of the parameter that cautious decay takes away, where it decays
  S l1;                  // added to the gradient, times the parameter's sign
  S threshold;           // the proximal form: the parameter is moved to 0 by this
  S noise;               // standard deviation
  float code_rounding;   // of second moments in 8 bits: core/code8.h
  S average_weight;      // of the parameter in its moving average, if it has one
  uint64_t seed;         // of the noise, with
  uint32_t step;         // the step that it belongs to: see random_key

  // Whether there is nothing but clipping, sign and weight decay.
  TRAINOPT_INLINE bool is_plain() const {
    return !(scaled || l1_gradient || l1_proximal || noisy || cautious || cautious_decay);
  }
  // Whether the gradient is left without its scale.
  TRAINOPT_INLINE bool leaves_unscaled() const { return write_gradient && !clear_gradient; }
  // Whether the gradient that a rule is given depends on the parameter.
  TRAINOPT_INLINE bool adds_parameter() const { return decay_gradient || l1_gradient; }
  // Whether a rule is given the gradient as it is in memory.
  TRAINOPT_INLINE bool keeps_gradient() const { return is_plain() && !has_factor && !decay_gradient; }
  // Whether random numbers are wanted for a parameter of a 16-bit type, or of another.
  TRAINOPT_INLINE bool needs_random(bool is_16_bit) const { return noisy || (round_at_random && is_16_bit); }
};

constexpr size_t kRuleScalarBytes = 144;

// All that a kernel needs beside the tensors; one for each group and step count.
struct Scalars {
  union {
    Stages<float> stages32;
    Stages<double> stages64;
  };
  alignas(16) unsigned char rule[kRuleScalarBytes];
};

TRAINOPT_FUNCTION Stages<float>& stages_of(Scalars& s, float) { return s.stages32; }
TRAINOPT_FUNCTION Stages<double>& stages_of(Scalars& s, double) { return s.stages64; }
TRAINOPT_FUNCTION const Stages<float>& stages_of(const Scalars& s, float) { return s.stages32; }
TRAINOPT_FUNCTION const Stages<double>& stages_of(const Scalars& s, double) { return s.stages64; }

// `norm` is that of the gradients with their scale, for groups that clip.
template <class S>
TRAINOPT_FUNCTION Stages<S> prepare_stages(const Settings& group, const StepInfo& info, Decay decay,
                                           double gradient_scale, double norm) {
  Stages<S> stages;
  stages.scaled = gradient_scale != 1 && group.max_grad_norm == 0;
  stages.clear_gradient = group.clear_gradient != 0;
  stages.write_gradient = group.writes_gradient(gradient_scale != 1);
  stages.decay_gradient = decay == Decay::kGradient && group.weight_decay != 0;
  stages.l1_gradient = group.l1 != 0 && group.l1_proximal == 0;
  stages.l1_proximal = group.l1 != 0 && group.l1_proximal != 0;
  stages.noisy = group.noise != 0;
  stages.scale = static_cast<S>(gradient_scale);
  stages.gradient_factor = static_cast<S>(group.gradient_factor(gradient_scale, norm));
  stages.has_factor = stages.gradient_factor != 1;
  stages.weight_decay = static_cast<S>(group.weight_decay);
  stages.round_at_random = group.round_at_random != 0;
  stages.cautious = group.cautious != 0;
  stages.cautious_scale = S(1);
  const double share = decay == Decay::kParameter ? info.rounded(info.lr * info.rounded(group.weight_decay)) : 0;
  stages.cautious_decay = group.cautious_weight_decay != 0 && share != 0;
  stages.cautious_share = static_cast<S>(share);
  stages.decay_factor = stages.cautious_decay ? S(1) : static_cast<S>(info.rounded(1 - share));
  stages.l1 = static_cast<S>(group.l1);
  stages.threshold = static_cast<S>(info.lr * group.l1);
  stages.noise = static_cast<S>(group.noise);
  stages.average_weight =
      group.averages != 0 ? static_cast<S>(average_weight(group.ema_decay, group.ema_warmup != 0, info.step)) : S(0);
  const RandomKey key = random_key(group.seed, info.step);
  stages.code_rounding = code_rounding(key.step);
  stages.seed = key.seed;
  stages.step = key.step;
  return stages;
}

// The stages before the rule: changes p and g, and returns what the rule takes for the gradient. kPlain: see is_plain.
template <bool kPlain, class T, class S>
TRAINOPT_FUNCTION T before_rule(const Stages<S>& stages, T& p, T& g) {
  if constexpr (!kPlain)
    if (stages.scaled) g = g / T(stages.scale);
  T direction = g;
  // A GPU multiplies by 1 in place of keeping one more register: Lion's 16-bit steps spilled 8 bytes.
  if (std::is_same_v<T, S> || stages.has_factor) direction = direction * T(stages.gradient_factor);
  if (stages.decay_gradient) direction = direction + p * T(stages.weight_decay);
  if constexpr (!kPlain)
    if (stages.l1_gradient) direction = direction + sign_of(p) * T(stages.l1);
  p = p * T(stages.decay_factor);  // times 1 without decoupled decay
  return direction;
}

// Whether a rule's states take something from the parameter as its step leaves it.
template <class Rule, class T, class S, class = void>
constexpr bool kSettles = false;
template <class Rule, class T, class S>
constexpr bool kSettles<Rule, T, S,
                        decltype(Rule::settle(std::declval<const typename Rule::template Scalars<S>&>(),
                                              std::declval<T>(), std::declval<T*>()))> = true;

// What the group's stages have from the rule's scalars.
template <class Rule, class S, class = void>
constexpr bool kHasDecayFactor = false;
template <class Rule, class S>
constexpr bool kHasDecayFactor<
    Rule, S, decltype(void(Rule::decay_factor(std::declval<const typename Rule::template Scalars<S>&>())))> = true;
template <class Rule, class S>
TRAINOPT_FUNCTION void complete_stages(Stages<S>& stages, const typename Rule::template Scalars<S>& scalars) {
  if constexpr (kHasDecayFactor<Rule, S>) stages.decay_factor = Rule::decay_factor(scalars);
}

// One register of elements, from load to store. `noise` holds standard normal values, and is read if stages.noisy.
template <class Rule, bool kPlain, class T, class S>
TRAINOPT_FUNCTION void step_elements(const Stages<S>& stages, const typename Rule::template Scalars<S>& scalars, T& p,
                                     T& g, T* state, T noise) {
  const T direction = before_rule<kPlain>(stages, p, g);
  T change = Rule::update(scalars, p, direction, state);
  if constexpr (kPlain) {
    p = p - change;
    if constexpr (kSettles<Rule, T, S>) Rule::settle(scalars, p, state);
  } else {
    // As a factor: a NaN in the gradient stays one.
    if (stages.cautious) change = change * where_same_sign(change, direction, T(stages.cautious_scale));
    T decay(S(0));
    if (stages.cautious_decay) decay = where_signs_agree(change, p, p * T(stages.cautious_share));
    p = p - change;
    if (stages.cautious_decay) p = p - decay;
    if constexpr (kSettles<Rule, T, S>) Rule::settle(scalars, p, state);
    if (stages.l1_proximal) p = soft_threshold(p, T(stages.threshold));
    if (stages.noisy) p = p + noise * T(stages.noise);
  }
}

// The passes of a reduce phase, in their order: what each sums up over a tensor, of which nothing is written, and what
// follows from it. First a rule's own sums, if it has any; then, of some rules, they are added up over all tensors.
template <class R>
struct OwnSums {
  using Rule = R;
  static constexpr int kCount = kSumCount<Rule>;
  static constexpr StateSet kStates = kGatheredStates<Rule>;  // that `gather` reads
  static constexpr bool kOfParam = kGathersParam<Rule>;       // whether it reads the parameter
  static constexpr uint32_t kSquares = kSumsOfSquares<Rule>;  // the sums of squares

  template <bool kPlain, class T, class S>
  TRAINOPT_INLINE static void gather(const Stages<S>& stages, const typename Rule::template Scalars<S>& scalars, T p,
                                     T g, T* state, Term<T>* terms) {
    T decayed = p;
    const T direction = before_rule<kPlain>(stages, decayed, g);
    Rule::gather(scalars, kSumsAreBeforeDecay<Rule> ? p : decayed, direction, state, terms);
  }

  template <class S>
  TRAINOPT_INLINE static void finish(Stages<S>&, typename Rule::template Scalars<S>& scalars, const double* sums,
                                     Numbers& numbers) {
    finish_by<Rule>(scalars, sums, numbers);
  }
};

// Then, in cautious groups, the elements whose update agrees with their gradient, and all. The updates of those are
// divided by their share, which counts as a thousandth if it is less: Liang et al. 2024, arXiv:2411.16085.
template <class R>
struct Agreement {
  using Rule = R;
  static constexpr int kCount = 2;
  static constexpr StateSet kStates = kAllStates<Rule>;
  static constexpr bool kOfParam = true;
  static constexpr uint32_t kSquares = 0b10;

  template <bool kPlain, class T, class S>
  TRAINOPT_INLINE static void gather(const Stages<S>& stages, const typename Rule::template Scalars<S>& scalars, T p,
                                     T g, T* state, Term<T>* terms) {
    const T direction = before_rule<kPlain>(stages, p, g), one(S(1));
    terms[0] = {where_same_sign(Rule::update(scalars, p, direction, state), direction, one), one};
    terms[1] = {one, one};
  }

  template <class S>
  TRAINOPT_INLINE static void finish(Stages<S>& stages, typename Rule::template Scalars<S>&, const double* sums,
                                     Numbers&) {
    if (stages.cautious)
      stages.cautious_scale = static_cast<S>(sums[1] / (sums[0] > 1e-3 * sums[1] ? sums[0] : 1e-3 * sums[1]));
  }
};

enum Pass { kOwnSums, kAgreement };
constexpr int kPasses = 2;

}  // namespace trainopt
