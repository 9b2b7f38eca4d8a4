// The moving averages of a step's parameters: after it, in a launch of their own, which reads the parameters from the
// second-level cache as far as they are still there.
#pragma once

#include "cuda/access.h"
#include "cuda/step_table.h"
#include "cuda/table.h"
#include "cuda/two_parts.h"
#include "rules/average.h"

namespace trainopt::cuda {
namespace {

// A parameter, and its average; Coded or Strided.
template <class Storage>
using AverageTable = TableOf<Storage, 2>;

// One block, one chunk.
template <class S, class Storage>
__global__ void __launch_bounds__(kThreads) average_kernel(const AverageTable<Storage> __grid_constant__ table) {
  if (table.header.found_inf != nullptr && *table.header.found_inf != 0) return;
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const auto& row = table.rows[index];
  const Prepared* on_device = table.header.on_device;
  // Each read where it lies: by one reference to either, nvcc 13.0 spills 8 bytes for sm_100.
  const S weight = on_device != nullptr ? stages_of(on_device[row.prepared].scalars, S()).average_weight
                                        : stages_of(table.header.prepared[row.prepared].scalars, S()).average_weight;
  void* const average = row.data[1];
  int64_t at = static_cast<int64_t>(static_cast<int32_t>(blockIdx.x) - table.first_chunk[index]) * kChunk;
  const int64_t end = at + kChunk < row.numel ? at + kChunk : row.numel;
  // tests break this: an average of half a parameter
  const auto param = [&](int64_t i) { return load_one<S>(row.data[0], row.beside[0], row.dtype[0], i); };
  if constexpr (kIsStrided<Storage>) {
    const auto place = [&](int role, int64_t i) {
      return row.layout[role].ndim == 0 ? i : offset_of(row.layout[role], i);
    };
    for (at += threadIdx.x; at < end; at += kThreads) {
      S moved = load_one<S>(average, row.dtype[1], place(1, at));
      move_average(weight, param(place(0, at)), moved);
      store_one(average, row.dtype[1], place(1, at), moved);
    }
  } else {
    int64_t whole = at;
    if (row.vectorisable) {
      whole += (end - at) / kItem * kItem;
      for_each_batch<1, kItem, kThreads>(at, whole, [&](const Batch<1, kItem>& batch) {
        const auto of_param = fetch_param<S>(row.data[0], row.beside[0], row.dtype[0], batch.first);
        const Words<S> of_average = fetch(average, row.dtype[1], batch.first, S());
        S p[kItem], moved[kItem];
        unpack_param(of_param, row.dtype[0], p);
        unpack_words(of_average, row.dtype[1], moved);
#pragma unroll
        for (int i = 0; i < kItem; ++i) move_average(weight, p[i], moved[i]);
        store_item(average, row.dtype[1], batch.first, moved);
      });
    }
    // tests break this: an average's tail, one element too long
    for (at = whole + threadIdx.x; at < end; at += kThreads) {
      S moved = load_one<S>(average, row.dtype[1], at);
      move_average(weight, param(at), moved);
      store_one(average, row.dtype[1], at, moved);
    }
  }
}

}  // namespace
}  // namespace trainopt::cuda
