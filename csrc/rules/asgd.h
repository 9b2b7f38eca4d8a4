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
  // Beside lambd, which is one more decay.
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kUpdate; }

  template <class S>
  struct Scalars {
    S eta, decay, mu;
    bool copies;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info, Numbers& numbers) {
    double &eta = numbers.at[kEta], &mu = numbers.at[kMu];
    if (info.first) eta = numbers.rounded(info.lr);  // whatever it was when the states were made
    const Scalars<S> k{static_cast<S>(eta), static_cast<S>(options[kLambd] + info.weight_decay), static_cast<S>(mu),
                       mu == 1};
    const double growth = info.rounded(1 + info.rounded(options[kLambd] * info.lr) * info.step);
    const double since = info.step - options[kT0];
    eta = numbers.rounded(info.lr / __builtin_pow(growth, options[kAlpha]));
    mu = numbers.rounded(1 / (since > 1 ? since : 1.0));
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T p, T g, T*) {
    return (g + p * T(k.decay)) * T(k.eta);
  }

  // Copied, the average has none of what was there before, which may not be finite.
  template <class T, class S>
  TRAINOPT_INLINE static void settle(const Scalars<S>& k, T p, T* state) {
    T& average = state[0];
    average = k.copies ? p : average + (p - average) * T(k.mu);
  }
};

}  // namespace trainopt
