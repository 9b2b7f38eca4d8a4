// Cross-entropy over rows of logits on the device, forward and backward. See losses/softmax_cross_entropy.h for the
// formulas.
//
// Nothing here waits for the device: what the target says (how many rows count, what their classes weigh, whether a
// class is out of range) is found and used there. All memory is the caller's, and so is the stream; the caller has made
// the tensors' device the current one. Results have the same bits in every run: no atomics, and sums in one order.
//
// A row whose label is no class has the loss NaN, and so has its gradient. Nothing is read for such a label.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "cuda/stream.h"
#include "losses/cross_entropy_batch.h"

namespace trainopt::cuda {

// What a batch's target says as a whole.
struct TargetTotals {
  double loss_factor;  // of each row's loss in the reduced one: 1 / the weight of all counted rows' classes
  double z_factor;     // of each row's z-loss: 1 / how many rows are counted
  double weight;       // of all classes
  double rest;         // see CountWork::defer
};

struct CrossEntropyTask : CrossEntropyBatch {
  int64_t rows;
  bool is_float64;     // float64 arithmetic
  const void* weight;  // of each class, in the type of the arithmetic; or absent
  // Of each row, kept from forward to backward: the softmax's largest logit, and the sum of e^(x - peak). The
  // sum itself and not its logarithm: what probabilities are divided by has all its digits then.
  double *peak, *sum;
};

// Totals ------------------------------------------------------------------------------------------------------------

struct CountPartial {
  double denominator, rows, weight;
};

// For the mean over rows with labels, and where the weight of all classes must be known.
struct CountWork {
  CrossEntropyTask task;  // rows, classes, labels, ignore_index and weight
  bool mean;              // otherwise loss_factor and z_factor are 1
  // Leaves the mean's division to whoever multiplies the gradients by `rest` afterwards (0 where no row is counted):
  // gradients of losses that are not divided yet are neither too small nor too large for 16 bits. loss_factor is 1.
  bool defer;
  CountPartial* partials;  // count_blocks of them
  TargetTotals* out;
};
int64_t count_blocks(int64_t rows);
void count_targets(const CountWork&, Stream);

// Rows --------------------------------------------------------------------------------------------------------------

// The sums over the rows of one block.
struct LossPartial {
  double loss, z, denominator, rows;
  int64_t bad;  // the first row whose label is no class, or kNoRow
};
constexpr int64_t kNoRow = INT64_MAX;

// One pass over the rows of a launch: forward, backward, or both at once, which reads the logits from the device's
// memory once. A row that is ignored is not read, and its peak and sum are 0 and 1.
struct RowsWork {
  CrossEntropyTask task;

  bool forward;        // writes peak and sum; else reads them
  TensorView loss, z;  // each row's loss with its z-loss, and its z-loss, where they are wanted: without data, absent
  LossPartial* partials;  // rows_blocks of them
  int64_t first_row;      // of a chunk of a larger batch: added to `bad`

  Rows gradient;         // may be the logits themselves; without data, absent
  const void* upstream;  // the gradient of the loss; or of each row's, `upstream_stride` apart; absent: 1
  DType upstream_dtype;
  int64_t upstream_stride;
  bool unless_one;                // writes no gradient where the one upstream gradient is 1
  int64_t* scaled;                // in memory that the host sees, or null: whether the one upstream gradient is not 1
  TargetTotals totals;            // where the host knows them
  const TargetTotals* on_device;  // or, if not null, these
};
int64_t rows_blocks(const CrossEntropyTask&);  // no more than rows
constexpr int64_t kMostBlocks = 4096;          // so that one block can put together what they leave
void cross_entropy_rows(const RowsWork&, Stream);

// What is known of a target that is no class, in memory that the host sees too.
struct BadTarget {
  int64_t found;  // 0: none. Written last
  int64_t value, classes;
  int64_t ndim;  // of the position, in the shape of the targets
  int64_t position[kMaxDims];
};

using LossReduction = Reduction;

// Puts the partial sums of a batch together.
struct FinishWork {
  const LossPartial* partials;
  int64_t count;
  Reduction reduction;
  bool empty_is_zero;     // the mean of no rows is 0
  TensorView loss, z;     // one number each, as in RowsWork, but for kNone
  const int64_t* labels;  // of the whole batch; or absent
  int64_t classes;
  int ndim;  // of the targets' shape
  int64_t sizes[kMaxDims];
  BadTarget* bad;
};
void cross_entropy_finish(const FinishWork&, Stream);

}  // namespace trainopt::cuda
