// Averaged SGD: Polyak & Juditsky 1992. Conventions are torch.optim's: the step size eta and the weight mu of the
// parameter in the average are those that the step before has computed.
#pragma once

#include "core/math.h"
#include "rules/rule.h"

namespace trainopt {

struct Asgd {
  static constexpr const char* kName = "asgd";
  enum Option { kLambd, kAlpha, kT0 };
  static constexpr const char* kOptions[] = {"lambd", "alpha", "t0"};
  static constexpr const char* kStates[] = {"ax"};
  static constexpr StateSet kStateSets[] = {0b1};
  enum Number { kEta, kMu };
  static constexpr const char* kNumbers[] = {"eta", "mu"};
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b1; }
  // Else 1 + lambd * lr * step may be below 0, which has no power that is a number.
  TRAINOPT_INLINE static bool takes(const double* options) { return options[kLambd] >= 0; }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kGradient; }

  template <class S>
  struct Scalars {
    S eta, mu, factor;
    bool copies;
  };

  // torch makes these numbers as float32 ones, whatever tensor it then puts them into.
  TRAINOPT_INLINE static double single(double x) { return static_cast<double>(static_cast<float>(x)); }

  TRAINOPT_INLINE static double next_size(const double* options, const StepInfo& info) {
    if (!info.single_lr) return info.lr / __builtin_pow(1 + options[kLambd] * info.lr * info.step, options[kAlpha]);
    const auto lr = static_cast<float>(info.lr);
    const float growth = 1 + static_cast<float>(options[kLambd]) * lr * static_cast<float>(info.step);
    return lr / static_cast<float>(__builtin_pow(growth, static_cast<float>(options[kAlpha])));
  }

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info, Numbers& numbers) {
    double &eta = numbers.at[kEta], &mu = numbers.at[kMu];
    if (info.first) eta = single(info.lr);  // whatever it was when the states were made
    const Scalars<S> k{static_cast<S>(eta), static_cast<S>(mu), static_cast<S>(1 - options[kLambd] * eta), mu == 1};
    const double since = info.step - options[kT0];
    eta = single(next_size(options, info));
    mu = single(1 / (since > 1 ? since : 1.0));
    return k;
  }

  template <class S>
  TRAINOPT_INLINE static S decay_factor(const Scalars<S>& k) {
    return k.factor;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T*) {
    return g * T(k.eta);
  }

  // Copied, the average has none of what was there before, which may not be finite.
  template <class T, class S>
  TRAINOPT_INLINE static void settle(const Scalars<S>& k, T p, T* state) {
    T& average = state[0];
    average = k.copies ? p : average + (p - average) * T(k.mu);
  }
};

}  // namespace trainopt
