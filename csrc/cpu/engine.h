// The CPU engine: runs a rule over any list of parameters in one call.
//
// The work is counted in blocks of 256 elements, each parameter from its own element 0. Any cut of the blocks among
// threads gives the same bits: an element's result depends on nothing but itself.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/random.h"
#include "core/step_stats.h"
#include "core/sum.h"
#include "core/tensor_view.h"
#include "rules/rule.h"
#include "rules/stages.h"
#include "rules/task.h"

namespace trainopt::cpu {

constexpr int64_t kBlock = 256;

using trainopt::Scalars;

// What a chunk has shown while a step works on it: sums of squares, lane by lane, and what is left of a block.
struct ChunkStats {
  double param[kSumLanes] = {}, gradient[kSumLanes] = {}, update[kSumLanes] = {};
  int64_t nonfinite = 0;
  // Of the arithmetic's type: the largest absolute elements of the gradient, in as many lanes as a vector has, and the
  // parameters of a block as they were before.
  alignas(64) unsigned char largest[64] = {}, before[kBlock * sizeof(double)];
};

struct TensorTask : trainopt::TensorTask {
  const Scalars* scalars;
  const Numbers* numbers = nullptr;  // as `prepare` has left them, of a rule that has any
  bool is_measured = false;          // the step finds out what StepStats has
  ChunkStats* stats = nullptr;       // where a kernel leaves it, of a task that is measured
};

// Runs a rule over elements [begin, end) of a task; begin is a multiple of kBlock.
using Kernel = void (*)(const TensorTask&, int64_t begin, int64_t end);

// What elements [begin, end) of a task, one chunk, add to each sum of a pass.
using GatherKernel = void (*)(const TensorTask&, int64_t begin, int64_t end, Sum* sums);

// What a rule's scalars say of its averages over rows and columns: the weight of what is new in them, and the least
// that the mean of a matrix's rows counts as.
struct FactorSettings {
  double weight, least;
};

// A rule as the layers above see it.
struct Rule {
  const char* name;
  const char* const* options;
  int option_count;
  OptionSet true_options, options_or_none;  // true where a group has not got them; None or a number
  const char* const* states;
  int state_count;
  StateSet unsigned_states;
  StateSet factors;  // the averages over rows and columns, the rows' first; 0 for a rule that has none
  Slots slots() const { return {state_count}; }
  const char* const* sums;
  int sum_count;  // 0 without sums of its own
  bool sums_over_all;
  int sums_in(Pass pass) const { return pass == kOwnSums ? sum_count : 2; }
  const char* const* numbers;
  int number_count;
  bool counts_steps, needs_lr, has_differentiable;
  StateSet (*states_needed)(const double* options);
  int (*numbers_needed)(const double* options);
  bool (*takes)(const double* options);
  Decay (*decay)(const double* options);
  double (*rate)(const double* options);
  // After the stages. Moves the numbers on as well, of a rule that has any; here and below.
  void (*prepare)(const double* options, const StepInfo&, bool is_float64, Scalars*, Numbers*);
  // Puts what follows from a pass's sums into the scalars; null for sums that the rule has not.
  void (*finish[kPasses])(const Sum* sums, bool is_float64, Scalars*, Numbers*);
  // Tells the scalars of a tensor's own what it is; null for a rule without factors, as the next.
  void (*complete)(const TensorTask&, bool is_float64, Scalars*);
  FactorSettings (*factor_settings)(const Scalars&, bool is_float64, DType param);
  int index;  // in the kernel tables
};

const Rule* find_rule(const char* name);  // null if there is none
const Rule* rule_at(int index);           // null past the last

// Blocks [first, last) of all tasks' blocks one after the other; starts[i] is the first block of task i, starts[count]
// their total. `is_float64` selects float64 arithmetic.
struct Update {
  const TensorTask* tasks;
  const int64_t* starts;
  size_t count;
  const Rule* rule;
  bool is_float64;
  const Sum* sums[kPasses] = {};  // of the passes that have been made: those of each task, one after the other
};

// `stats`, if it is not null, has a place for every chunk (see places_of). Tasks that are measured are then cut at
// their chunks, of which those that begin in these blocks are this call's.
void run_blocks(const Update& update, int64_t first, int64_t last, StepStats* stats = nullptr);
StepStats stats_of(const Update& update, size_t task, const StepStats* stats);

// A pass of the reduce phase: what the chunks that begin in blocks [first, last) add to its sums. Every chunk has a
// place of its own among the partial sums, which is as many numbers as the pass has sums; then the sums of a whole
// task.
void gather_blocks(const Update& update, Pass pass, int64_t first, int64_t last, Sum* partials);
void sums_of(const Update& update, Pass pass, size_t task, const Sum* partials, Sum* sums);
// The numbers of a task as the step leaves them, once its own sums, if the rule has any, are in `update`.
Numbers numbers_of(const Update& update, size_t task);
size_t places_of(const Update& update);

inline int64_t blocks_of(int64_t numel) { return (numel + kBlock - 1) / kBlock; }

// Standard normal values for elements [begin, begin + count) of a tensor at a step; and the 16 bits that each is
// rounded by at random.
void gaussian(float* out, int64_t begin, int64_t count, const TensorKey& key);
void rounding_bits(uint16_t* out, int64_t begin, int64_t count, const TensorKey& key);

// The SIMD variants in this binary, the plainest first.
enum class Variant { kBaseline, kAvx2, kAvx512 };
constexpr int kVariants = 3;
const char* name_of(Variant);
bool supported(Variant);  // compiled in, and the processor can run it
Variant current_variant();
void set_variant(Variant);  // the caller has checked that it is supported

}  // namespace trainopt::cpu
