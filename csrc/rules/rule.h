// What an optimizer's rule is: the arithmetic of one element, and what the engine must know of it.
//
// A rule is a struct with
//   kName                     its name in the engine's table
//   kOptions, enum Option     the hyper-parameters it reads from a parameter group, as doubles ("betas.0" is the first
//   of
//                             a pair); those that all rules share (lr, weight_decay, maximize, l1, noise) are the
//                             engine's
//   kStates                   the names of its states in torch's state dict, in the order of `state` below
//   kCountsSteps              whether it needs the number of steps of each parameter
//   states_needed(options)    how many of its states these options need: all, or all but the last
//   takes(options)            whether the arithmetic is torch's for these options; where it is not, torch's own path
//   has to
//                             find the result, or the error
//   decay(options)            where weight decay belongs
//   Scalars<S>, prepare<S>    what it needs once for each parameter and step, computed in double
//   update(scalars, p, g, s)  one element: changes parameter p and states s by gradient g. T is float or double, or a
//                             vector of these whose lanes are elements.
// Its functions are TRAINOPT_INLINE, which lets them run on a GPU too.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace trainopt {

constexpr int kMaxStates = 4;
constexpr int kMaxOptions = 12;

// Where weight decay goes: into the gradient (L2 regularisation, torch's Adam and SGD) or onto the parameter before the
// update (decoupled, torch's AdamW).
enum class Decay { kGradient, kParameter };

// One parameter's place in its training, for `prepare`.
struct Moment {
  double lr;
  bool single_lr;  // the learning rate is a float32 tensor: torch rounds what it makes of it to float32
  double step;     // 1 in the first step
  bool first;      // the states hold nothing yet

  TRAINOPT_INLINE double rounded(double x) const { return single_lr ? static_cast<double>(static_cast<float>(x)) : x; }
};

}  // namespace trainopt
