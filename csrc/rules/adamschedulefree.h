// Schedule-free AdamW and RAdam, whose average of the iterates stands in for a schedule: Defazio et al. 2024,
// arXiv:2405.15682. The conventions are those of the authors' package. The parameter is y, where gradients are taken;
// the state z is the iterate itself; their average x is what is evaluated, and lies in y = (1 - beta1) z + beta1 x.
// What a step needs of the steps before it is in the group, which the class in Python moves on before each step; the
// learning rate there has the warm-up in it, or RAdam's rectification.
#pragma once

#include "core/math.h"
#include "rules/moments.h"
#include "rules/rule.h"

namespace trainopt {

struct AdamScheduleFree {
  static constexpr const char* kName = "adam_schedule_free";
  enum Option { kBeta1, kBeta2, kEps, kStepsBefore, kLr, kLrMax, kWeightSum, kPower, kLrPower, kSilent };
  static constexpr const char* kOptions[] = {"betas.0",         "betas.1",         "eps",        "k",
                                             "scheduled_lr",    "lr_max",          "weight_sum", "r",
                                             "weight_lr_power", "silent_sgd_phase"};
  static constexpr OptionSet kTrueByDefault = 1u << kSilent;
  static constexpr const char* kStates[] = {"z", "exp_avg_sq"};
  static constexpr StateSet kStateSets[] = {0b11};
  static constexpr StateSet kUnsigned = 0b10;
  static constexpr bool kCountsSteps = false;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b11; }
  TRAINOPT_INLINE static bool takes(const double* options) { return are_betas(options, kBeta1, kBeta2); }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kUpdate; }

  // The part of this step's z in the average, whose weights add up to `sum` with this one's.
  TRAINOPT_INLINE static double share_of(double step, double power, double lr_max, double lr_power, double sum) {
    return sum != 0 ? __builtin_pow(step, power) * __builtin_pow(lr_max, lr_power) / sum : 0;
  }

  // How much of an update y makes, of which z makes the whole.
  TRAINOPT_INLINE static double part_of(double momentum, double share) { return 1 - momentum * (1 - share); }

  template <class S>
  struct Scalars {
    AverageWeights<S> second;  // of the gradient's squares
    S lr, share, step_of_y, inverse_sqrt_correction2, eps, weight_decay;
    bool decays;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    const double beta2 = options[kBeta2], step = options[kStepsBefore] + 1;
    const double share = share_of(step, options[kPower], options[kLrMax], options[kLrPower], options[kWeightSum]);
    // Where RAdam does not trust the second moment yet it steps by the gradient; where that phase is silent, with a
    // learning rate of 0.
    const bool adapts = options[kSilent] != 0 || averaged_length(beta2, step, __builtin_pow(beta2, step)) > 4;
    Scalars<S> k;
    k.lr = static_cast<S>(options[kLr]);
    k.share = static_cast<S>(share);
    k.step_of_y = static_cast<S>(options[kLr] * part_of(options[kBeta1], share));
    k.second = weights_of<S>(beta2);
    k.inverse_sqrt_correction2 = static_cast<S>(adapts ? 1 / __builtin_sqrt(bias_correction(beta2, step)) : 0);
    k.eps = static_cast<S>(adapts ? options[kEps] : 1);
    k.weight_decay = static_cast<S>(info.weight_decay);
    k.decays = info.weight_decay != 0;
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T p, T g, T* state) {
    T& z = state[0];
    T& v = state[1];
    v = averaged_square(k.second, v, g);
    T u = g / (square_root(v) * T(k.inverse_sqrt_correction2) + T(k.eps));
    if (k.decays) u = u + p * T(k.weight_decay);  // 0 times an infinite p would be NaN
    const T change = (p - z) * T(k.share) + u * T(k.step_of_y);
    z = z - u * T(k.lr);
    return change;
  }
};

}  // namespace trainopt
