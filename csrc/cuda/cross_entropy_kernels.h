// How cross-entropy's rows are shared among threads, and the kernels for each way.
#pragma once

#include "cuda/cross_entropy.h"

namespace trainopt::cuda {

constexpr int kBlockWarps = 8, kLargeBlockWarps = 16;

// By the number of classes and how they lie, never by the device or by how many rows there are: so a row's bits depend
// on nothing but the row.
struct Sharing {
  enum Way { kThread, kWarp, kBlock, kLargeBlock } way;  // who has a row; the last in float32 only
  int threads;                                           // of a block
  int64_t at_once;                                       // rows that a block works on at one time
  int64_t each;                                          // rows that a thread, warp or block takes, one after the other
  int64_t blocks;
};
Sharing sharing_of(const CrossEntropyTask&);

void forward_by_row(const ForwardWork&, const Sharing&, Stream);
void backward_by_row(const BackwardWork&, const Sharing&, Stream);

// A thread a row: for few classes, and for rows that lie side by side, class by class.
void forward_by_column(const ForwardWork&, const Sharing&, Stream);
void backward_by_column(const BackwardWork&, const Sharing&, Stream);

}  // namespace trainopt::cuda
