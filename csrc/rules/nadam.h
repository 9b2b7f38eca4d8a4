// NAdam, Adam with Nesterov's momentum: Dozat 2016. Conventions are torch.optim's: the momentum rises by 0.96 to a
// power of the step, and its product over all steps is the correction of its bias.
#pragma once

#include "core/math.h"
#include "rules/moments.h"
#include "rules/rule.h"

namespace trainopt {

struct NAdam {
  static constexpr const char* kName = "nadam";
  enum Option { kBeta1, kBeta2, kEps, kMomentumDecay, kDecoupled };
  static constexpr const char* kOptions[] = {"betas.0", "betas.1", "eps", "momentum_decay", "decoupled_weight_decay"};
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr StateSet kStateSets[] = {0b11};
  static constexpr StateSet kUnsigned = 0b10;
  static constexpr const char* kNumbers[] = {"mu_product"};
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b11; }
  TRAINOPT_INLINE static bool takes(const double* options) { return are_betas(options, kBeta1, kBeta2); }
  TRAINOPT_INLINE static Decay decay(const double* options) {
    return options[kDecoupled] != 0 ? Decay::kParameter : Decay::kGradient;
  }

  template <class S>
  struct Scalars {
    AverageWeights<S> first, second;  // of the two moments
    S gradient_size, average_size, inverse_correction2, eps;
  };

  TRAINOPT_INLINE static double momentum(const double* options, double step) {
    return options[kBeta1] * (1 - 0.5 * __builtin_pow(0.96, step * options[kMomentumDecay]));
  }

  // In float32 where the learning rate is, as torch has it.
  TRAINOPT_INLINE static double size(const StepInfo& info, double share, double rest) {
    if (info.single_lr) return static_cast<float>(info.lr) * static_cast<float>(share) / static_cast<float>(rest);
    return info.lr * share / rest;
  }

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info, Numbers& numbers) {
    const double now = momentum(options, info.step), next = momentum(options, info.step + 1);
    double& product = numbers.at[0];
    product = numbers.rounded(product * numbers.rounded(now));
    Scalars<S> k;
    k.first = weights_of<S>(options[kBeta1]);
    k.second = weights_of<S>(options[kBeta2]);
    k.gradient_size = static_cast<S>(size(info, 1 - now, 1 - product));
    k.average_size = static_cast<S>(size(info, next, 1 - product * next));
    k.inverse_correction2 = static_cast<S>(1 / bias_correction(options[kBeta2], info.step));
    k.eps = static_cast<S>(options[kEps]);
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    T& m = state[0];
    T& v = state[1];
    m = averaged(k.first, m, g);
    v = averaged_square(k.second, v, g);
    const T ahead = g * T(k.gradient_size) + m * T(k.average_size);
    return ahead / (square_root(v * T(k.inverse_correction2)) + T(k.eps));
  }
};

}  // namespace trainopt
