// Adan: Xie et al. 2022, arXiv:2208.06677, with the conventions of the authors' package: the update divides by the
// decay, and the first step has no difference of gradients.
#pragma once

#include "core/math.h"
#include "rules/moments.h"
#include "rules/rule.h"

namespace trainopt {

struct Adan {
  static constexpr const char* kName = "adan";
  enum Option { kBeta1, kBeta2, kBeta3, kEps, kNoProx };
  static constexpr const char* kOptions[] = {"betas.0", "betas.1", "betas.2", "eps", "no_prox"};
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"};
  static constexpr StateSet kStateSets[] = {0b1111};
  static constexpr StateSet kUnsigned = 0b0100;
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b1111; }
  TRAINOPT_INLINE static bool takes(const double* options) { return are_betas(options, kBeta1, kBeta3); }
  TRAINOPT_INLINE static Decay decay(const double* options) {
    return options[kNoProx] != 0 ? Decay::kParameter : Decay::kUpdate;
  }

  template <class S>
  struct Scalars {
    AverageWeights<S> first, second, third;  // of the three averages
    S inverse_sqrt_correction3, eps;
    S step_size, step_size_of_difference;  // lr over each average's bias correction
    S has_before;                          // 0 in the first step, where there is no gradient before
    S decay, shrinking;                    // lr * weight_decay, and the inverse of 1 + that
    bool decays;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    const double beta1 = options[kBeta1], beta2 = options[kBeta2], beta3 = options[kBeta3];
    const double decay = options[kNoProx] != 0 ? 0 : info.lr * info.weight_decay;
    Scalars<S> k;
    k.first = weights_of<S>(beta1);
    k.second = weights_of<S>(beta2);
    k.third = weights_of<S>(beta3);
    k.inverse_sqrt_correction3 = static_cast<S>(1 / __builtin_sqrt(bias_correction(beta3, info.step)));
    k.eps = static_cast<S>(options[kEps]);
    k.step_size = static_cast<S>(info.lr / bias_correction(beta1, info.step));
    k.step_size_of_difference = static_cast<S>(info.lr * beta2 / bias_correction(beta2, info.step));
    k.has_before = info.first ? S(0) : S(1);
    k.decay = static_cast<S>(decay);
    k.shrinking = static_cast<S>(1 / (1 + decay));
    k.decays = decay != 0;
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T p, T g, T* state) {
    T& m = state[0];
    T& d = state[1];
    T& v = state[2];
    const T difference = (g + state[3]) * T(k.has_before);
    const T ahead = g + difference * T(k.second.beta);
    m = averaged_sum(k.first, m, g);
    d = averaged_sum(k.second, d, difference);
    v = averaged_square(k.third, v, ahead);
    state[3] = T(S(0)) - g;
    const T change = (m * T(k.step_size) + d * T(k.step_size_of_difference)) /
                     (square_root(v) * T(k.inverse_sqrt_correction3) + T(k.eps));
    return k.decays ? (change + p * T(k.decay)) * T(k.shrinking) : change;
  }
};

}  // namespace trainopt
