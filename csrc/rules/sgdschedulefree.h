// Schedule-free stochastic gradient descent, as rules/adamschedulefree.h has AdamW: Defazio et al. 2024.
#pragma once

#include "rules/adamschedulefree.h"
#include "rules/rule.h"

namespace trainopt {

struct SgdScheduleFree {
  static constexpr const char* kName = "sgd_schedule_free";
  enum Option { kMomentum, kStepsBefore, kLr, kLrMax, kWeightSum, kPower, kLrPower };
  static constexpr const char* kOptions[] = {"momentum",   "k", "scheduled_lr",   "lr_max",
                                             "weight_sum", "r", "weight_lr_power"};
  static constexpr const char* kStates[] = {"z"};
  static constexpr StateSet kStateSets[] = {0b1};
  static constexpr bool kCountsSteps = false;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b1; }
  TRAINOPT_INLINE static bool takes(const double* options) { return options[kMomentum] >= 0 && options[kMomentum] < 1; }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kUpdate; }

  template <class S>
  struct Scalars {
    S lr, share, step_of_y, weight_decay;
    bool decays;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    const double share = AdamScheduleFree::share_of(options[kStepsBefore] + 1, options[kPower], options[kLrMax],
                                                    options[kLrPower], options[kWeightSum]);
    const double step_of_y = options[kLr] * AdamScheduleFree::part_of(options[kMomentum], share);
    return {static_cast<S>(options[kLr]), static_cast<S>(share), static_cast<S>(step_of_y),
            static_cast<S>(info.weight_decay), info.weight_decay != 0};
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T p, T g, T* state) {
    T& z = state[0];
    if (k.decays) g = g + p * T(k.weight_decay);
    const T change = (p - z) * T(k.share) + g * T(k.step_of_y);
    z = z - g * T(k.lr);
    return change;
  }
};

}  // namespace trainopt
