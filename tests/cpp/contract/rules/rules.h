// In the tests of the engines this file stands before csrc/rules/rules.h. Of the rules there it has those that ask for
// something of an engine that the others do not, and it adds some that have all that a rule may have and no optimizer
// has yet. The other rules' arithmetic is judged from Python; to compile them here would take minutes.
#pragma once

#define TRAINOPT_FOR_EACH_RULE(DO) DO(Sgd) DO(Adam) DO(Lamb) DO(Lars) DO(Adafactor) DO(Eight) DO(Four)
#include_next "rules/rules.h"

namespace trainopt {

// Eight states in four sets, and decay in each of its places. Each state is an average of the gradient with a weight of
// its own.
struct Eight {
  static constexpr const char* kName = "eight";
  enum Option { kSet, kDecay };
  static constexpr const char* kOptions[] = {"set", "decay"};
  static constexpr const char* kStates[] = {"a", "b", "c", "d", "e", "f", "g", "h"};
  static constexpr StateSet kStateSets[] = {0, 0b10000001, 0b01010110, 0b11111111};
  static constexpr bool kCountsSteps = true;

  // A set that is not among kStateSets for a number beyond them.
  TRAINOPT_INLINE static StateSet states_needed(const double* options) {
    return options[kSet] == 0   ? 0
           : options[kSet] == 1 ? 0b10000001
           : options[kSet] == 2 ? 0b01010110
           : options[kSet] == 3 ? 0b11111111
                                : 0b1;
  }
  TRAINOPT_INLINE static bool takes(const double*) { return true; }
  TRAINOPT_INLINE static Decay decay(const double* options) {
    return options[kDecay] == 0 ? Decay::kGradient : options[kDecay] == 1 ? Decay::kParameter : Decay::kUpdate;
  }

  template <class S>
  struct Scalars {
    S lr, decay;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    return {static_cast<S>(info.lr), static_cast<S>(decay(options) == Decay::kUpdate ? info.weight_decay : 0)};
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T p, T g, T* state) {
    T sum = p * T(k.decay);
    for (int i = 0; i < 8; ++i) {
      state[i] = state[i] * T(S(0.5)) + g * T(S(1) / static_cast<S>(1 << i));
      sum = sum + state[i];
    }
    return sum * T(k.lr);
  }
};

// As many sums as there may be, of all kinds: of a number, of products, of what only the update writes, and of ones.
struct Four {
  static constexpr const char* kName = "four";
  enum Option { kDecay };
  static constexpr const char* kOptions[] = {"decay"};
  static constexpr const char* kStates[] = {"a"};
  static constexpr StateSet kStateSets[] = {0b1};
  static constexpr const char* kSums[] = {"the parameter", "its product with the gradient",
                                          "that of state and gradient", "elements"};
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b1; }
  TRAINOPT_INLINE static bool takes(const double*) { return true; }
  TRAINOPT_INLINE static Decay decay(const double* options) {
    return options[kDecay] == 0 ? Decay::kGradient : Decay::kParameter;
  }

  template <class S>
  struct Scalars {
    S lr, shift;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double*, const StepInfo& info) {
    return {static_cast<S>(info.lr), S(0)};
  }

  template <class T, class S>
  TRAINOPT_INLINE static void gather(const Scalars<S>&, T p, T g, T* state, Term<T>* terms) {
    const T one(S(1));
    terms[0] = {p, one};
    terms[1] = {p, g};
    terms[2] = {state[0] * T(S(0.5)) + g, g};
    terms[3] = {one, one};
  }

  template <class S>
  TRAINOPT_INLINE static void finish(Scalars<S>& k, const double* sums) {
    k.shift = static_cast<S>((sums[0] + sums[1] - sums[2]) / sums[3]);
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    state[0] = state[0] * T(S(0.5)) + g;
    return (state[0] + T(k.shift)) * T(k.lr);
  }
};

}  // namespace trainopt
