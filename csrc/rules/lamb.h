// LAMB: You et al. 2020, arXiv:1904.00962. Adam's update with weight decay in it, scaled for each tensor by the ratio
// of the parameter's norm to the update's, as NVIDIA's apex and timm have it. The ratio is 1 where either norm is 0.
#pragma once

#include "core/math.h"
#include "rules/moments.h"
#include "rules/rule.h"

namespace trainopt {

struct Lamb {
  static constexpr const char* kName = "lamb";
  enum Option { kBeta1, kBeta2, kEps, kTrustClip, kAlwaysAdapt, kBiasCorrection, kGradAveraging, kDecoupled };
  static constexpr const char* kOptions[] = {"betas.0",        "betas.1",        "eps",
                                             "trust_clip",     "always_adapt",   "bias_correction",
                                             "grad_averaging", "decoupled_decay"};
  static constexpr OptionSet kTrueByDefault = 1u << kBiasCorrection | 1u << kGradAveraging;
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr StateSet kStateSets[] = {0b11};
  static constexpr StateSet kUnsigned = 0b10;
  static constexpr const char* kSums[] = {"squares of the parameter", "squares of the update"};
  static constexpr uint32_t kSquares = 0b11;
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b11; }
  TRAINOPT_INLINE static bool takes(const double* options) { return are_betas(options, kBeta1, kBeta2); }
  TRAINOPT_INLINE static Decay decay(const double* options) {
    return options[kDecoupled] != 0 ? Decay::kParameter : Decay::kUpdate;
  }

  template <class S>
  struct Scalars {
    AverageWeights<S> first, second;  // of the two moments
    S inverse_correction1, inverse_sqrt_correction2, eps, weight_decay;
    S step_size;  // lr, and from `finish` on lr times the trust ratio
    bool decays, adapts, clips;
    double lr;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    const auto correction = [&](double beta) {
      return options[kBiasCorrection] != 0 ? bias_correction(beta, info.step) : 1.0;
    };
    Scalars<S> k;
    k.first = weights_of<S>(options[kBeta1], options[kGradAveraging] != 0 ? 1 - options[kBeta1] : 1.0);
    k.second = weights_of<S>(options[kBeta2]);
    k.inverse_correction1 = static_cast<S>(1 / correction(options[kBeta1]));
    k.inverse_sqrt_correction2 = static_cast<S>(1 / __builtin_sqrt(correction(options[kBeta2])));
    k.eps = static_cast<S>(options[kEps]);
    k.weight_decay = static_cast<S>(info.weight_decay);
    k.step_size = static_cast<S>(info.lr);
    k.decays = info.weight_decay != 0 && options[kDecoupled] == 0;
    k.adapts = info.weight_decay != 0 || options[kAlwaysAdapt] != 0;
    k.clips = options[kTrustClip] != 0;
    k.lr = info.lr;
    return k;
  }

  // The update before the learning rate and the trust ratio; moves the moments on.
  template <class T, class S>
  TRAINOPT_INLINE static T direction(const Scalars<S>& k, T p, T g, T* state) {
    T& m = state[0];
    T& v = state[1];
    m = averaged_sum(k.first, m, g);
    v = averaged_square(k.second, v, g);
    T u = m * T(k.inverse_correction1) / (square_root(v) * T(k.inverse_sqrt_correction2) + T(k.eps));
    if (k.decays) u = u + p * T(k.weight_decay);  // 0 times an infinite p would be NaN
    return u;
  }

  // The update's norm is that of moments which only the second pass writes: they are computed twice, which costs less
  // than to store them.
  template <class T, class S>
  TRAINOPT_INLINE static void gather(const Scalars<S>& k, T p, T g, T* state, Term<T>* terms) {
    const T u = direction(k, p, g, state);
    terms[0] = {p, p};
    terms[1] = {u, u};
  }

  template <class S>
  TRAINOPT_INLINE static void finish(Scalars<S>& k, const double* sums) {
    double ratio = 1;
    if (k.adapts && sums[0] != 0 && sums[1] != 0) ratio = __builtin_sqrt(sums[0]) / __builtin_sqrt(sums[1]);
    if (k.clips && ratio > 1) ratio = 1;
    k.step_size = static_cast<S>(k.lr * ratio);
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T p, T g, T* state) {
    return direction(k, p, g, state) * T(k.step_size);
  }
};

}  // namespace trainopt
