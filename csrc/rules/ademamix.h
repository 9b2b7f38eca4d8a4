// AdEMAMix: Pagliardini et al. 2024, arXiv:2409.03137. AdamW with a second, slow average of the gradient, whose weight
// and beta may rise to theirs over the first steps.
#pragma once

#include "core/math.h"
#include "rules/moments.h"
#include "rules/rule.h"

namespace trainopt {

struct AdEMAMix {
  static constexpr const char* kName = "ademamix";
  enum Option { kBeta1, kBeta2, kBeta3, kAlpha, kBeta3Warmup, kAlphaWarmup, kEps };
  static constexpr const char* kOptions[] = {"betas.0",      "betas.1",      "betas.2", "alpha",
                                             "beta3_warmup", "alpha_warmup", "eps"};
  static constexpr const char* kStates[] = {"exp_avg_fast", "exp_avg_slow", "exp_avg_sq"};
  static constexpr StateSet kStateSets[] = {0b111};
  static constexpr StateSet kUnsigned = 0b100;
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b111; }
  TRAINOPT_INLINE static bool takes(const double* options) { return are_betas(options, kBeta1, kBeta3); }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kParameter; }

  // How far a warm-up of so many steps has come.
  TRAINOPT_INLINE static double share_of(double warmup, double step) { return step < warmup ? step / warmup : 1; }

  // The steps after which an average with this beta has forgotten half, less one. The authors' package adds the 1e-8.
  TRAINOPT_INLINE static double half_life(double beta) { return kLogOfHalf / __builtin_log(beta + 1e-8) - 1; }

  // 1 - beta3 at this step. On the way the average's half-life rises evenly from that of beta1.
  TRAINOPT_INLINE static double one_minus_slow_beta(const double* options, double step) {
    const double share = share_of(options[kBeta3Warmup], step);
    if (share == 1) return 1 - options[kBeta3];
    const double half = (1 - share) * half_life(options[kBeta1]) + share * half_life(options[kBeta3]);
    return -__builtin_expm1(kLogOfHalf / (half + 1));
  }

  template <class S>
  struct Scalars {
    AverageWeights<S> fast, slow, squares;
    S lr, alpha, eps, inverse_correction1, inverse_sqrt_correction2;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    const double beta1 = options[kBeta1], beta2 = options[kBeta2], one_minus = one_minus_slow_beta(options, info.step);
    Scalars<S> k;
    k.lr = static_cast<S>(info.lr);
    k.fast = weights_of<S>(beta1);
    k.slow = weights_of<S>(1 - one_minus, one_minus);
    k.squares = weights_of<S>(beta2);
    k.alpha = static_cast<S>(options[kAlpha] * share_of(options[kAlphaWarmup], info.step));
    k.eps = static_cast<S>(options[kEps]);
    k.inverse_correction1 = static_cast<S>(1 / bias_correction(beta1, info.step));
    k.inverse_sqrt_correction2 = static_cast<S>(1 / __builtin_sqrt(bias_correction(beta2, info.step)));
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    T& fast = state[0];
    T& slow = state[1];
    T& v = state[2];
    fast = averaged_sum(k.fast, fast, g);
    slow = averaged_sum(k.slow, slow, g);
    v = averaged_square(k.squares, v, g);
    return (fast * T(k.inverse_correction1) + slow * T(k.alpha)) /
           (square_root(v) * T(k.inverse_sqrt_correction2) + T(k.eps)) * T(k.lr);
  }

 private:
  static constexpr double kLogOfHalf = -0.693147180559945309417232121458;
};

}  // namespace trainopt
