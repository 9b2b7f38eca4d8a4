// Prodigy: Mishchenko & Defazio 2023, arXiv:2306.06101. Adam whose learning rate is multiplied by d, an estimate of the
// distance from where the parameters began to the solution, as the authors' package has it. d grows from what all
// parameters say together, so that there are sums over all of them before any is moved.
#pragma once

#include "core/math.h"
#include "rules/moments.h"
#include "rules/rule.h"

namespace trainopt {

struct Prodigy {
  static constexpr const char* kName = "prodigy";
  enum Option {
    kBeta1,
    kBeta2,
    kBeta3,
    kEps,
    kDecouple,
    kUseBiasCorrection,
    kSafeguardWarmup,
    kD,
    kD0,
    kDMax,
    kDNumerator,
    kDCoef,
    kGrowthRate,
    kK
  };
  static constexpr const char* kOptions[] = {
      "betas.0", "betas.1", "beta3", "eps",         "decouple", "use_bias_correction", "safeguard_warmup",
      "d",       "d0",      "d_max", "d_numerator", "d_coef",   "growth_rate",         "k"};
  static constexpr OptionSet kMayBeNone = 1u << kBeta3;  // the root of beta2
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq", "s", "p0"};
  static constexpr StateSet kStateSets[] = {0b1111, 0b1110};
  static constexpr StateSet kUnsigned = 0b10;
  static constexpr StateSet kConstant = 0b1000;
  static constexpr const char* kSums[] = {"the gradient times the way back", "absolute values of s"};
  static constexpr StateSet kSumsOfStates = 0b1100;
  static constexpr bool kSumsOverAll = true;
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double* options) {
    return options[kBeta1] != 0 ? 0b1111 : 0b1110;
  }
  TRAINOPT_INLINE static double beta3(const double* options) {
    return options[kBeta3] == options[kBeta3] ? options[kBeta3] : __builtin_sqrt(options[kBeta2]);
  }
  TRAINOPT_INLINE static bool takes(const double* options) {
    return are_betas(options, kBeta1, kBeta2) && beta3(options) >= 0 && beta3(options) < 1 && options[kD] > 0 &&
           options[kD0] > 0;
  }
  TRAINOPT_INLINE static Decay decay(const double* options) {
    return options[kDecouple] != 0 ? Decay::kParameter : Decay::kGradient;
  }
  TRAINOPT_INLINE static double rate(const double* options) {
    if (options[kUseBiasCorrection] == 0) return options[kD];
    const double step = options[kK] + 1;
    return options[kD] * __builtin_sqrt(bias_correction(options[kBeta2], step)) /
           bias_correction(options[kBeta1], step);
  }

  template <class S>
  struct Scalars {
    S lr, beta1, g_share, beta2, squares_share, beta3, s_share;
    S eps;  // from `finish` on
    bool rests, starts;
    double d, d_max, growth_rate, d_coef, numerator, numerator_share, exact_eps;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    const double d = options[kD], by_start = d / options[kD0];
    Scalars<S> k;
    k.lr = static_cast<S>(info.lr);
    k.beta1 = static_cast<S>(options[kBeta1]);
    k.g_share = static_cast<S>(d * (1 - options[kBeta1]));
    k.beta2 = static_cast<S>(options[kBeta2]);
    k.squares_share = static_cast<S>(d * d * (1 - options[kBeta2]));
    k.beta3 = static_cast<S>(beta3(options));
    k.s_share = static_cast<S>(by_start * (options[kSafeguardWarmup] != 0 ? d : info.lr));
    k.eps = 0;
    k.rests = info.lr == 0;
    k.starts = d == options[kD0];
    k.d = d;
    k.d_max = options[kDMax];
    k.growth_rate = options[kGrowthRate];
    k.d_coef = options[kDCoef];
    k.numerator = beta3(options) * options[kDNumerator];
    k.numerator_share = by_start * info.lr;
    k.exact_eps = options[kEps];
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T new_s(const Scalars<S>& k, T g, T s) {
    return s * T(k.beta3) + g * T(k.s_share);
  }

  template <class T, class S>
  TRAINOPT_INLINE static void gather(const Scalars<S>& k, T p, T g, T* state, Term<T>* terms) {
    const T s = new_s(k, g, state[2]), zero(S(0));
    terms[0] = {g, state[3] - p};
    terms[1] = {s, sign_of(s)};
    if (k.rests) terms[0] = terms[1] = {zero, zero};
  }

  template <class S>
  TRAINOPT_INLINE static void finish(Scalars<S>& k, const double* sums) {
    double d = k.d;
    if (sums[1] != 0) {
      const double found = k.d_coef * (k.numerator + k.numerator_share * sums[0]) / sums[1];
      if (k.starts && found > d) d = found;
      const double most = found > k.d_max ? found : k.d_max, limit = d * k.growth_rate;
      d = limit < most ? limit : most;
    } else {
      k.lr = 0;  // no gradient so far says where to go
    }
    k.eps = static_cast<S>(d * k.exact_eps);
    if (k.beta1 == 0) k.g_share = static_cast<S>(d);  // the authors' code takes no average then, and the new d
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    if (k.rests) return T(S(0));
    T& m = state[0];
    T& v = state[1];
    m = m * T(k.beta1) + g * T(k.g_share);
    v = v * T(k.beta2) + g * T(k.squares_share) * g;
    state[2] = new_s(k, g, state[2]);
    return m * T(k.lr) / (square_root(v) + T(k.eps));
  }
};

}  // namespace trainopt
