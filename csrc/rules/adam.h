// Adam and AdamW: Kingma & Ba 2015, arXiv:1412.6980; decoupled decay: Loshchilov & Hutter 2019, arXiv:1711.05101;
// amsgrad: Reddi, Kale, Kumar 2018, arXiv:1904.09237. Conventions are torch.optim's: epsilon is added after the bias
// correction, and amsgrad's maximum is taken of the uncorrected second moment.
#pragma once

#include "rules/moments.h"
#include "rules/rule.h"

namespace trainopt {

struct Adam {
  static constexpr const char* kName = "adam";
  enum Option { kBeta1, kBeta2, kEps, kAmsgrad, kDecoupled, kBiasCorrection };
  static constexpr const char* kOptions[] = {"betas.0",        "betas.1", "eps", "amsgrad", "decoupled_weight_decay",
                                             "bias_correction"};
  static constexpr OptionSet kTrueByDefault = 1u << kBiasCorrection;
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr StateSet kStateSets[] = {0b011, 0b111};
  static constexpr StateSet kUnsigned = 0b110;
  static constexpr bool kCountsSteps = true;

  TRAINOPT_INLINE static StateSet states_needed(const double* options) {
    return options[kAmsgrad] != 0 ? 0b111 : 0b011;
  }
  TRAINOPT_INLINE static bool takes(const double* options) { return are_betas(options, kBeta1, kBeta2); }
  TRAINOPT_INLINE static Decay decay(const double* options) {
    return options[kDecoupled] != 0 ? Decay::kParameter : Decay::kGradient;
  }

  template <class S>
  struct Scalars {
    AverageWeights<S> first, second;  // of the two moments
    S step_size, inverse_sqrt_correction2, eps;
    bool amsgrad;
  };

  template <class S>
  TRAINOPT_INLINE static Scalars<S> prepare(const double* options, const StepInfo& info) {
    const auto correction = [&](double beta) {
      return options[kBiasCorrection] != 0 ? bias_correction(beta, info.step) : 1.0;
    };
    Scalars<S> k;
    k.first = weights_of<S>(options[kBeta1]);
    k.second = weights_of<S>(options[kBeta2]);
    k.step_size = static_cast<S>(info.rounded(info.lr / info.rounded(correction(options[kBeta1]))));
    k.inverse_sqrt_correction2 = static_cast<S>(1 / __builtin_sqrt(correction(options[kBeta2])));
    k.eps = static_cast<S>(options[kEps]);
    k.amsgrad = options[kAmsgrad] != 0;
    return k;
  }

  template <class T, class S>
  TRAINOPT_INLINE static T update(const Scalars<S>& k, T, T g, T* state) {
    T& m = state[0];
    T& v = state[1];
    m = averaged(k.first, m, g);
    v = averaged_square(k.second, v, g);
    T v_max = v;
    if (k.amsgrad) v_max = state[2] = maximum(state[2], v);
    return m * T(k.step_size) / (square_root(v_max) * T(k.inverse_sqrt_correction2) + T(k.eps));
  }
};

}  // namespace trainopt
