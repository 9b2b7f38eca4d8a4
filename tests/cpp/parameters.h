// A parameter's tensors in memory: all that a step reads and writes.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "arrays.h"
#include "checks.h"
#include "settings.h"

namespace trainopt {

// The places and types of one parameter's tensors.
struct Arrangement {
  DType param_dtype, gradient_dtype, state_dtype;
  Placement param, gradient, state;
  bool guarded;
};

// Tensors of one parameter, with the same values for the same number.
struct Parameter {
  Array param, gradient;
  Array* states[kMaxViews];  // then the average; null for those that are not there
  int64_t numel;

  Parameter(int64_t n, int64_t number, SlotSet set, const Arrangement& a)
      : param(a.param_dtype, n, a.param, a.guarded), gradient(a.gradient_dtype, n, a.gradient, a.guarded), numel(n) {
    for (int s = 0; s < kMaxViews; ++s)
      states[s] = contains(set, s) ? new Array(a.state_dtype, n, a.state, a.guarded) : nullptr;
    RandomNumbers numbers{static_cast<uint64_t>(number)};
    const bool expanded = std::strcmp(a.gradient.name, "expanded") == 0;
    for (int64_t i = 0; i < n; ++i) {
      param.set(i, numbers.value());
      const double g = numbers.value();
      if (!expanded || i < a.gradient.columns) gradient.set(i, g);
      for (Array* state : states) {
        if (state == nullptr) continue;
        const double value = numbers.value();
        state->set(i, state == states[0] ? value : std::fabs(value));
      }
    }
  }
  Parameter(const Parameter&) = delete;
  Parameter& operator=(const Parameter&) = delete;
  ~Parameter() {
    for (Array* state : states) delete state;
  }

  // What every engine's task has of it.
  template <class TensorTask>
  void describe(TensorTask* task) const {
    task->numel = numel;
    task->param = param.view();
    task->gradient = gradient.view();
    for (int s = 0; s < kMaxViews; ++s) task->state[s] = states[s] == nullptr ? TensorView{} : states[s]->view();
  }

  bool is_intact() const {
    bool intact = param.is_intact() && gradient.is_intact();
    for (const Array* state : states) intact = intact && (state == nullptr || state->is_intact());
    return intact;
  }
};

using Parameters = std::vector<Parameter*>;

// 3 divides all, so that each is so many rows of three.
constexpr int64_t kSizes[] = {3, 6, 9, 15, 18, 33, 255, 258, 510, 513, 1029};

inline Parameters make(const Setting& s, const Arrangement& arrangement) {
  Parameters result;
  for (const int64_t size : kSizes) result.push_back(new Parameter(size, size, states_of(s), arrangement));
  return result;
}

inline void drop(Parameters& parameters) {
  for (Parameter* parameter : parameters) delete parameter;
}

inline bool same_bits(const Parameters& a, const Parameters& b, bool with_gradient) {
  for (size_t t = 0; t < a.size(); ++t)
    for (int64_t i = 0; i < a[t]->numel; ++i) {
      if (a[t]->param.bits(i) != b[t]->param.bits(i)) return false;
      if (with_gradient && a[t]->gradient.bits(i) != b[t]->gradient.bits(i)) return false;
      for (int s = 0; s < kMaxViews; ++s)
        if (a[t]->states[s] != nullptr && a[t]->states[s]->bits(i) != b[t]->states[s]->bits(i)) return false;
    }
  return true;
}

inline bool is_intact(const Parameters& parameters) {
  for (const Parameter* parameter : parameters)
    if (!parameter->is_intact()) return false;
  return true;
}

}  // namespace trainopt
