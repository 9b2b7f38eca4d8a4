// The CPU engine: runs a rule over any list of parameters in one call.
//
// The work is counted in blocks of 256 elements, each parameter from its own element 0. Any cut of the blocks among
// threads gives the same bits: an element's result depends on nothing but itself.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/tensor_view.h"
#include "rules/rule.h"

namespace trainopt::cpu {

constexpr int64_t kBlock = 256;

// What happens to an element before and after the rule, whatever the rule: the same for all parameters of a group at
// one step. S is the arithmetic's type.
template <class S>
struct Stages {
  bool scaled, negate, decay_gradient, l1_gradient, l1_proximal, noisy, write_gradient;
  S gradient_scale;  // the gradient is divided by it
  S weight_decay;    // L2: added to the gradient, times the parameter
  S keep;            // decoupled decay: the parameter is multiplied by it; else 1
  S l1;              // added to the gradient, times the parameter's sign
  S threshold;       // the proximal form: the parameter is moved to 0 by this
  S noise;           // standard deviation
  uint64_t seed;     // of the noise, and
  uint32_t step;     // the step that it belongs to
};

constexpr size_t kRuleScalarBytes = 128;

// All that the kernel needs beside the tensors; one for each group and step count.
struct Scalars {
  union {
    Stages<float> stages32;
    Stages<double> stages64;
  };
  alignas(16) unsigned char rule[kRuleScalarBytes];
};

// One parameter in a step.
struct Task {
  Task() {}  // left unset: millions are made, and each is filled in place
  int64_t numel;
  TensorView param, gradient;
  TensorView state[kMaxStates];  // without data where the rule needs none
  const Scalars* scalars;
  uint32_t tensor;  // its index in the optimizer, for the random numbers
};

// Runs a rule over elements [begin, end) of a task; begin is a multiple of kBlock.
using Kernel = void (*)(const Task&, int64_t begin, int64_t end);

// A rule as the layers above see it.
struct Rule {
  const char* name;
  const char* const* options;
  int option_count;
  const char* const* states;
  int state_count;
  bool counts_steps;
  int (*states_needed)(const double* options);
  Decay (*decay)(const double* options);
  void (*prepare)(const double* options, const Moment&, bool wide, Scalars*);
  int index;  // in the kernel tables
};

const Rule* find_rule(const char* name);  // null if there is none
const Rule* rule_at(int index);           // null past the last

// Blocks [first, last) of all tasks' blocks one after the other; starts[i] is the first block of task i, starts[count]
// their total. `wide` selects float64 arithmetic.
struct Run {
  const Task* tasks;
  const int64_t* starts;
  size_t count;
  const Rule* rule;
  bool wide;
};
void run_blocks(const Run& run, int64_t first, int64_t last);

inline int64_t blocks_of(int64_t numel) { return (numel + kBlock - 1) / kBlock; }

// Standard normal values for elements [begin, begin + count) of a tensor at a step.
void gaussian(float* out, int64_t begin, int64_t count, uint64_t seed, uint32_t step, uint32_t tensor);

// The SIMD variants in this binary, the plainest first.
enum class Variant { kBaseline, kAvx2, kAvx512 };
constexpr int kVariants = 3;
const char* name_of(Variant);
bool supported(Variant);  // compiled in, and the processor can run it
Variant current_variant();
void set_variant(Variant);  // the caller has checked that it is supported

}  // namespace trainopt::cpu
