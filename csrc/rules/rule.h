// What an optimizer's rule is: the arithmetic of one element, and what the engine must know of it. The struct is the
// one place where these facts stand; Python asks the module for them.
//
// A rule is a struct with
//   kName                    its name in the engine's table
//   kOptions, enum Option    the hyper-parameters that it reads from a parameter group, as doubles; "betas.0" is the
//                            first of a pair. Those that all rules share (lr, weight_decay, maximize, l1, noise) are
//                            the engine's
//   kTrueByDefault           if it is there: the options that are true where a group does not have them, as not every
//                            class of the rule has; 1 << an option for each
//   kMayBeNone               if it is there: likewise those that may be None, which is a NaN here
//   kDifferentiable          if it is there, it is false: torch's class has no option of that name
//   kStates                  the names of its states in torch's state dict, eight at most
//   kStateSets               the sets of states that its options can call for; each is compiled into kernels of its own
//   kCountsSteps             whether it needs the number of steps of each parameter
//   states_needed(options)   the set of states that these options call for, one of kStateSets
//   kUnsigned                if it is there: the states that are never below 0, which tells how 8 bits hold them
//   kConstant                if it is there: the states that `update` leaves as they are, which are not written
//   rate(options)            if it is there: what the learning rate is multiplied by, wherever it is used
//   kNeedsLr                 if it is there, it is false: the learning rate is read in a parameter's first step alone
//   takes(options)           whether the arithmetic is torch's for these options; where it is not, torch's own path has
//                            to find the result, or the error
//   decay(options)           where weight decay belongs
//   Scalars<S>, prepare<S>   what it needs once for each parameter and step, computed in double
//   update(scalars, p, g, s) one element: moves the states s on by gradient g, and returns what is to be taken from the
//                            parameter p. s[i] is the state kStates[i]; one that is not in the set is 0, and what is
//                            written to it is dropped. T is float or double, or a vector of these whose lanes are
//                            elements.
//   decay_factor(scalars)    if it is there: what the parameter is multiplied by before the update, once its decay is
//   in
//                            the gradient
//   settle(scalars, p, s)    if it is there: what the states s take from the parameter as the rule's step leaves it,
//                            as the average of ASGD does. What is done to it after the rule, the proximal form of L1
//                            and noise, comes later
// where a state is one number for the whole parameter, as the count of its steps is (the products of NAdam's momenta):
//   kNumbers                 the names of these numbers in torch's state dict, kMaxNumbers at most. Then
//                            prepare<S>(options, info, numbers) is given them as the step before left them, and moves
//                            them on
//   numbers_needed(options)  if it is there: how many of them these options call for, one at least and the first ones.
//                            In place of each other stands the first again, and the rule has to leave both alike
// and, where an element's step depends on the whole tensor (the norms of LAMB and LARS), a reduce phase:
//   kSums                    the names of the tensor's sums, kMaxSums at most
//   gather(scalars, p, g, s, terms)
//                            what one element adds to each sum, as a product of two numbers; p, g and s are what
//                            `update` will be given, and nothing is written. With kSumsOverAll p is what it is before
//                            any decay
//   kSquares                 if it is there: the sums of squares, whose terms are a number twice; 1 << a sum for each
//   finish(scalars, sums)    puts what follows from the tensor's sums into its scalars, before any of its updates; with
//                            kNumbers finish(scalars, sums, numbers), which may move these on as well
//   kSumsOfStates            if it is there: the states that `gather` reads; the others are 0 for it, and not loaded
//   kSumsOfParam             if it is there, it is false: `gather` does not read p, which is 0 then
//   kSumsOverAll             if it is there, it is true: the sums are those over all tensors of the step
//   kSumsBeforeDecay         if it is there, it is true: p is what it is before any decay here too
// and, where what a matrix has in place of a state is one average for each of its rows and one for each of its columns
// (Adafactor):
//   kFactors                 the two states that these averages are, the rows' first. A tensor of two dimensions and
//                            more has them, and of the others none; any other has the others. `update` is given, as
//                            the first state, one over the root of their product, with the rows' divided by their mean,
//                            and moves on neither: the engine does, with the squares of g
//   Scalars::weight          of a mean of squares in its average
//   for_tensor(scalars, is_factored, dtype, numel)
//                            puts into the scalars which of both the tensor is, and what its type and its size say;
//                            the size is that of the whole in `finish`, and elsewhere it may be that of a shard
//   eps1_of(scalars, dtype)  the least that the mean of a matrix's rows counts as
// A rule without kSums has one pass over its tensors, and costs what it did; so does one without kNumbers.
// Its functions are TRAINOPT_INLINE, which lets them run on a GPU too.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace trainopt {

constexpr int kMaxStates = 8;
constexpr int kMaxViews = kMaxStates + 1;  // of a parameter: its states, then its moving average, which is the engine's
constexpr int kMaxOptions = 14;
using OptionSet = uint32_t;  // bit i stands for kOptions[i]
static_assert(kMaxOptions <= 8 * sizeof(OptionSet));
constexpr int kMaxSums = 4;
constexpr int kMaxNumbers = 2;

// A set of a rule's states: bit i stands for kStates[i].
using StateSet = uint8_t;
static_assert(kMaxStates <= 8 * sizeof(StateSet));

TRAINOPT_FUNCTION constexpr bool contains(uint32_t set, int state) { return (set >> state & 1) != 0; }

TRAINOPT_FUNCTION constexpr int count_of(StateSet set) {
  int count = 0;
  for (int state = 0; state < kMaxStates; ++state) count += contains(set, state);
  return count;
}

template <class Rule>
constexpr int kStateCount = sizeof(Rule::kStates) / sizeof(Rule::kStates[0]);
template <class Rule>
constexpr StateSet kAllStates = static_cast<StateSet>((1 << kStateCount<Rule>)-1);
// The place of the moving average among a parameter's states: after the rule's.
template <class Rule>
constexpr int kAverage = kStateCount<Rule>;
template <class Rule>
constexpr int kSetCount = sizeof(Rule::kStateSets) / sizeof(Rule::kStateSets[0]);

// A fact that a rule's header may leave out: its `member`, or else `otherwise`.
#define TRAINOPT_FACT(type, name, member, otherwise) \
  template <class Rule, class = void>                \
  constexpr type name = otherwise;                   \
  template <class Rule>                              \
  constexpr type name<Rule, decltype(void(Rule::member))> = Rule::member

// The options of a rule that are true by default, and those that may be None.
TRAINOPT_FACT(OptionSet, kTrueOptions, kTrueByDefault, 0);
TRAINOPT_FACT(OptionSet, kOptionsOrNone, kMayBeNone, 0);

// Whether groups have the option `differentiable`.
TRAINOPT_FACT(bool, kHasDifferentiable, kDifferentiable, true);

// The states of a rule that are never below 0.
TRAINOPT_FACT(StateSet, kUnsignedStates, kUnsigned, 0);

// The states of a rule that its updates only read.
TRAINOPT_FACT(StateSet, kConstantStates, kConstant, 0);
// Of a set, those that they write.
template <class Rule, StateSet kSet>
constexpr StateSet kWrittenStates = kSet & ~kConstantStates<Rule>;

// The states of a rule that are averages over rows and columns.
TRAINOPT_FACT(StateSet, kFactorStates, kFactors, 0);
// Of the states that options call for, those that a parameter has.
TRAINOPT_FUNCTION constexpr StateSet states_of_one(StateSet needed, StateSet factors, int64_t dimensions) {
  return static_cast<StateSet>(dimensions > 1 && factors != 0 ? needed & factors : needed & ~factors);
}
// Tells the scalars which of both a tensor with these states is.
template <class Rule, class Scalars>
TRAINOPT_INLINE void complete_for_tensor(Scalars& scalars, StateSet states, DType dtype, int64_t numel) {
  if constexpr (kFactorStates<Rule> != 0) Rule::for_tensor(scalars, (states & kFactorStates<Rule>) != 0, dtype, numel);
}

// Whether every step needs a learning rate.
TRAINOPT_FACT(bool, kAlwaysNeedsLr, kNeedsLr, true);

// The number of a rule's sums; 0 for one that has no reduce phase.
template <class Rule, class = void>
constexpr int kSumCount = 0;
template <class Rule>
constexpr int kSumCount<Rule, decltype(void(Rule::kSums))> = sizeof(Rule::kSums) / sizeof(Rule::kSums[0]);

// What its sums are made of beside the gradient.
TRAINOPT_FACT(StateSet, kGatheredStates, kSumsOfStates, kAllStates<Rule>);
TRAINOPT_FACT(bool, kGathersParam, kSumsOfParam, true);
// Those of them that are of squares.
TRAINOPT_FACT(uint32_t, kSumsOfSquares, kSquares, 0);

// The number of a rule's numbers.
template <class Rule, class = void>
constexpr int kNumberCount = 0;
template <class Rule>
constexpr int kNumberCount<Rule, decltype(void(Rule::kNumbers))> = sizeof(Rule::kNumbers) / sizeof(Rule::kNumbers[0]);
// Whether sums are over all tensors of a step.
TRAINOPT_FACT(bool, kSumsAreOverAll, kSumsOverAll, false);

// Whether sums are taken of the parameter before any decay.
TRAINOPT_FACT(bool, kSumsAreBeforeDecay, kSumsBeforeDecay, kSumsAreOverAll<Rule>);

#undef TRAINOPT_FACT

// How many of a rule's numbers options call for.
template <class Rule, class = void>
constexpr bool kChoosesNumbers = false;
template <class Rule>
constexpr bool kChoosesNumbers<Rule, decltype(void(Rule::numbers_needed(nullptr)))> = true;
template <class Rule>
TRAINOPT_FUNCTION int numbers_needed_by(const double* options) {
  if constexpr (kChoosesNumbers<Rule>) {
    return Rule::numbers_needed(options);
  } else {
    return kNumberCount<Rule>;
  }
}

// What the learning rate is multiplied by.
template <class Rule, class = void>
constexpr bool kHasRate = false;
template <class Rule>
constexpr bool kHasRate<Rule, decltype(void(Rule::rate(nullptr)))> = true;
template <class Rule>
TRAINOPT_FUNCTION double rate_of(const double* options) {
  if constexpr (kHasRate<Rule>) {
    return Rule::rate(options);
  } else {
    return 1;
  }
}

// What an element adds to a sum: the product, taken in double, where that of two floats is exact and overflows nowhere.
template <class T>
struct Term {
  T a, b;
};

// The tensors that a parameter's state dict holds for the engine, by number: the rule's states, in its order; then what
// is the engine's own, whatever the rule.
struct Slots {
  int states;
  constexpr int average() const { return states; }
  constexpr int master() const { return states + 1; }                  // what a 16-bit parameter lacks of a float32
  constexpr int scale(int state) const { return states + 2 + state; }  // of a state that is stored in 8 bits
  constexpr int count() const { return 2 * states + 2; }
};
constexpr int kMaxSlots = Slots{kMaxStates}.count();
using SlotSet = uint32_t;
static_assert(kMaxSlots <= 8 * sizeof(SlotSet));

// A set as a type, for what is compiled once for each.
template <StateSet kStates>
struct SetOf {
  static constexpr StateSet kSet = kStates;
};

// Calls `use` with each of a rule's sets, as a SetOf; on the host.
template <class Rule, int kIndex = 0, class Use>
static constexpr void for_each_set(const Use& use) {
  if constexpr (kIndex < kSetCount<Rule>) {
    use(SetOf<Rule::kStateSets[kIndex]>());
    for_each_set<Rule, kIndex + 1>(use);
  }
}

// Where weight decay goes: into the gradient (L2 regularisation, torch's Adam and SGD); onto the parameter before the
// update (decoupled, torch's AdamW); into the update (LAMB), which the rule does itself, with StepInfo::weight_decay;
// or nowhere, and groups have no such option (Rprop).
enum class Decay { kGradient, kParameter, kUpdate, kNone };

// Which step of a parameter it is, and the group's values that `prepare` may need.
struct StepInfo {
  double lr;       // times the rule's rate, if it has one
  bool single_lr;  // the learning rate is a float32 tensor: torch rounds what it makes of it to float32
  double weight_decay;
  double step;  // 1 in the first step
  bool first;   // the states hold nothing yet

  TRAINOPT_INLINE double rounded(double x) const { return single_lr ? static_cast<double>(static_cast<float>(x)) : x; }
};

// The numbers of a parameter, in the order of kNumbers.
struct Numbers {
  double at[kMaxNumbers];
  bool are_float32;  // as the state holds them, in which case torch computes them in float32

  TRAINOPT_INLINE double rounded(double x) const {
    return are_float32 ? static_cast<double>(static_cast<float>(x)) : x;
  }
  bool operator==(const Numbers& other) const {
    bool same = are_float32 == other.are_float32;
    for (int n = 0; n < kMaxNumbers; ++n) same = same && at[n] == other.at[n];
    return same;
  }
};

// A rule's own scalars, of which only one with numbers is given them.
template <class Rule, class S>
TRAINOPT_INLINE typename Rule::template Scalars<S> prepared_by(const double* options, const StepInfo& info,
                                                               Numbers& numbers) {
  if constexpr (kNumberCount<Rule> > 0) {
    return Rule::template prepare<S>(options, info, numbers);
  } else {
    return Rule::template prepare<S>(options, info);
  }
}

// Likewise what follows from its sums.
template <class Rule, class S>
TRAINOPT_INLINE void finish_by(typename Rule::template Scalars<S>& scalars, const double* sums, Numbers& numbers) {
  if constexpr (kNumberCount<Rule> > 0) {
    Rule::finish(scalars, sums, numbers);
  } else {
    Rule::finish(scalars, sums);
  }
}

// 1 - beta^step, without the cancellation that few steps bring.
TRAINOPT_FUNCTION double bias_correction(double beta, double step) {
  return beta > 0 ? -__builtin_expm1(step * __builtin_log(beta)) : 1.0;
}

}  // namespace trainopt
