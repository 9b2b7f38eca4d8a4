// How cross-entropy's rows are shared among threads, and the kernels for each way.
#pragma once

#include "cuda/cross_entropy.h"

namespace trainopt::cuda {

// By the number of classes, the options and how the rows lie, never by the device or by how many rows there are: so a
// row's bits depend on nothing but the row.
struct Sharing {
  enum Way { kThread, kWarp, kBlock } way;  // who has a row
  int threads;                              // of a block
  int64_t at_once;                          // rows that a block works on at one time
  int64_t each;                             // rows that a thread, warp or block takes, one after the other
  int64_t blocks;
};
Sharing sharing_of(const CrossEntropyTask&);

// Labels, and nothing else that a class's term depends on but the logit: the target's masses beside the label's are all
// alike, and the logits are those of the softmax, neither capped nor scaled.
bool is_plain(const CrossEntropyTask&);

void rows_by_row(const RowsWork&, const Sharing&, Stream);

// A thread a row: for few classes, and for rows that lie side by side, class by class.
void rows_by_column(const RowsWork&, const Sharing&, Stream);

}  // namespace trainopt::cuda
