// Adafactor: Shazeer & Stern 2018, arXiv:1804.04235. Conventions are torch.optim's: decoupled weight decay, an update
// that is scaled by the parameter's root mean square, which is taken before any decay, and no momentum. The second
// moment of a matrix is the product of two averages, those of its rows and of its columns; anything of one dimension
// has one for each element.
#pragma once

#include "core/math.h"
#include "rules/moments.h"
#include "rules/rule.h"

namespace trainopt {

struct Adafactor {
  static constexpr const char* kName = "adafactor";
  enum Option { kBeta2Decay, kEps1, kEps2, kClipping };
  static constexpr const char* kOptions[] = {"beta2_decay", "eps.0", "eps.1", "d"};
  static constexpr OptionSet kMayBeNone = 1u << kEps1;  // the epsilon of the parameter's type
  static constexpr bool kDifferentiable = false;
  static constexpr const char* kStates[] = {"row_var", "col_var", "variance"};
  static constexpr StateSet kStateSets[] = {0b001, 0b100};
  static constexpr StateSet kFactors = 0b011;
  static constexpr StateSet kConstant = 0b011;
  static constexpr StateSet kUnsigned = 0b111;
  static constexpr const char* kSums[] = {"squares of the parameter", "squares of the update"};
  static constexpr uint32_t kSquares = 0b11;
  static constexpr bool kSumsBeforeDecay = true;
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b111; }
  TRAINOPT_INLINE static bool takes(const double* options) { return options[kClipping] > 0; }
  TRAINOPT_INLINE static Decay decay(const double*) { return Decay::kParameter; }

  template <class S>
  struct Scalars {
    AverageWeights<S> second;
    S least;      // of the second moment
    S most;       // one over its root
    S step_size;  // from `finish` on
    bool is_factored, rounds;
    double weight, rate, eps1, eps2, clipping, count;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    const double longest = 1 / __builtin_sqrt(info.step);
    Scalars<S> k;
    k.weight = __builtin_pow(info.step, options[kBeta2Decay]);
    k.second = weights_of<S>(1 - k.weight, k.weight);
    k.least = k.most = k.step_size = S(0);
    k.is_factored = false;
    k.rounds = info.single_lr && !(longest < info.lr);
    k.rate = longest < info.lr ? longest : info.lr;
    k.eps1 = options[kEps1];
    k.eps2 = options[kEps2];
    k.clipping = options[kClipping];
    k.count = 0;
    return k;
  }

  // None stands for the epsilon of the parameter's type.
  template <class S>
  TRAINOPT_INLINE static double eps1_of(const Scalars<S>& k, DType dtype) {
    return k.eps1 == k.eps1 ? k.eps1 : epsilon_of(dtype);
  }
  template <class S>
  TRAINOPT_INLINE static void for_tensor(Scalars<S>& k, bool is_factored, DType dtype, int64_t numel) {
    k.count = static_cast<double>(numel);
    k.least = static_cast<S>(eps1_of(k, dtype) * eps1_of(k, dtype));
    k.most = static_cast<S>(1 / eps1_of(k, dtype));
    k.is_factored = is_factored;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T direction(const Scalars<S>& k, T g, T* state) {
    if (k.is_factored) return g * minimum(T(k.most), state[0]);
    state[2] = averaged(k.second, state[2], g * g);
    return g / square_root(maximum(T(k.least), state[2]));
  }

  template <class T, class S>
  TRAINOPT_INLINE static void gather(const Scalars<S>& k, T p, T g, T* state, Term<T>* terms) {
    const T u = direction(k, g, state);
    terms[0] = {p, p};
    terms[1] = {u, u};
  }

  template <class S>
  TRAINOPT_INLINE static void finish(Scalars<S>& k, const double* sums) {
    const double size = __builtin_sqrt(sums[0] / k.count);
    const double excess = __builtin_sqrt(sums[1] / k.count) / k.clipping;
    const double scale = size > k.eps2 ? size : k.eps2, divisor = excess > 1 ? excess : 1;
    // In float32 where the learning rate is, as torch has it.
    const float single = static_cast<float>(scale) * static_cast<float>(k.rate) / static_cast<float>(divisor);
    k.step_size = static_cast<S>(k.rounds ? static_cast<double>(single) : scale * k.rate / divisor);
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    return direction(k, g, state) * T(k.step_size);
  }
};

}  // namespace trainopt
