// Rprop: Riedmiller & Braun 1993. Conventions are torch.optim's: an element whose gradient has turned is left where it
// is for a step, and its gradient is forgotten. A NaN moves nothing.
#pragma once

#include "core/math.h"
#include "rules/rule.h"

namespace trainopt {

struct Rprop {
  static constexpr const char* kName = "rprop";
  enum Option { kEtaMinus, kEtaPlus, kSmallest, kLargest };
  static constexpr const char* kOptions[] = {"etas.0", "etas.1", "step_sizes.0", "step_sizes.1"};
  static constexpr const char* kStates[] = {"prev", "step_size"};
  static constexpr StateSet kStateSets[] = {0b11};
  static constexpr StateSet kUnsigned = 0b10;
  static constexpr bool kNeedsLr = false;
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b11; }
  // Beyond this range torch takes one of the three factors for another.
  TRAINOPT_INLINE static bool takes(const double* options) {
    return 0 < options[kEtaMinus] && options[kEtaMinus] < 1 && 1 < options[kEtaPlus];
  }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kNone; }

  template <class S>
  struct Scalars {
    S begin, slower, faster, smallest, largest;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    return {static_cast<S>(info.first ? info.lr : 0), static_cast<S>(options[kEtaMinus]),
            static_cast<S>(options[kEtaPlus]), static_cast<S>(options[kSmallest]), static_cast<S>(options[kLargest])};
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    T& before = state[0];
    T& size = state[1];
    const T one(S(1));
    // The first step: a size is the learning rate where it is 0, as states are made.
    if (k.begin != 0) size = size + (one - sign_of(size) * sign_of(size)) * T(k.begin);
    const T agreement = sign_of(g) * sign_of(before);
    // The three factors, of which two are 0. So written, nvcc 13.0 keeps all in registers.
    size = size * (where_same_sign(agreement, one, T(k.faster)) + where_same_sign(agreement, -one, T(k.slower)) +
                   (one - agreement * agreement));
    size = -maximum(-maximum(size, T(k.smallest)), -T(k.largest));
    before = g = where_signs_agree(agreement, one, g);
    return sign_of(g) * size;
  }
};

}  // namespace trainopt
