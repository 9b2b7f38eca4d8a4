// NovoGrad: Ginsburg et al. 2019, arXiv:1905.11286. Momentum of gradients that are divided by the root of an average of
// their whole tensor's squares, which is one number. Conventions are those of NVIDIA's own code, which timm has: the
// average begins with the first squares that are not 0, and the momentum at 0.
#pragma once

#include "core/math.h"
#include "rules/rule.h"

namespace trainopt {

struct NovoGrad {
  static constexpr const char* kName = "novograd";
  enum Option { kBeta1, kBeta2, kEps, kGradAveraging, kAmsgrad, kDecoupled };
  static constexpr const char* kOptions[] = {"betas.0",        "betas.1", "eps",
                                             "grad_averaging", "amsgrad", "decoupled_decay"};
  static constexpr const char* kStates[] = {"exp_avg"};
  static constexpr StateSet kStateSets[] = {0b1};
  static constexpr const char* kNumbers[] = {"exp_avg_sq", "max_exp_avg_sq"};
  static constexpr const char* kSums[] = {"squares of the gradient"};
  static constexpr uint32_t kSquares = 0b1;
  static constexpr StateSet kSumsOfStates = 0;
  static constexpr bool kSumsOfParam = false;
  static constexpr bool kCountsSteps = false;

  TRAINOPT_INLINE static StateSet states_needed(const double*) { return 0b1; }
  TRAINOPT_INLINE static int numbers_needed(const double* options) { return options[kAmsgrad] != 0 ? 2 : 1; }
  TRAINOPT_INLINE static bool takes(const double*) { return true; }
  TRAINOPT_INLINE static Decay decay(const double* options) {
    return options[kDecoupled] != 0 ? Decay::kParameter : Decay::kUpdate;
  }

  template <class S>
  struct Scalars {
    S lr, beta1, share, weight_decay;
    S root;  // of the average square or, with amsgrad, of the largest so far, from `finish` on
    bool decays, keeps_largest;
    double beta2, eps;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info, Numbers&) {
    Scalars<S> k;
    k.lr = static_cast<S>(info.lr);
    k.beta1 = static_cast<S>(options[kBeta1]);
    k.share = static_cast<S>(options[kGradAveraging] != 0 ? 1 - options[kBeta1] : 1.0);
    k.weight_decay = static_cast<S>(info.weight_decay);
    k.root = S(1);
    k.decays = info.weight_decay != 0 && options[kDecoupled] == 0;
    k.keeps_largest = options[kAmsgrad] != 0;
    k.beta2 = options[kBeta2];
    k.eps = options[kEps];
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static void gather(const Scalars<S>&, T, T g, T*, Term<T>* terms) {
    terms[0] = {g, g};
  }

  template <class S>
  TRAINOPT_INLINE static void finish(Scalars<S>& k, const double* sums, Numbers& numbers) {
    double &average = numbers.at[0], &largest = numbers.at[1];
    average = numbers.rounded(average == 0 ? sums[0] : k.beta2 * average + (1 - k.beta2) * sums[0]);
    largest = k.keeps_largest ? maximum(largest, average) : average;
    k.root = static_cast<S>(__builtin_sqrt(largest) + k.eps);
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T p, T g, T* state) {
    T& m = state[0];
    T u = g / T(k.root);
    if (k.decays) u = u + p * T(k.weight_decay);  // 0 times an infinite p would be NaN
    m = m * T(k.beta1) + u * T(k.share);
    return m * T(k.lr);
  }
};

}  // namespace trainopt
