// torch's memory on the emulated devices: given out and taken back in the order of streams, as its caching allocator
// for CUDA has it, and kept by the graphs that it was captured in.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/StorageImpl.h>

#include <memory>
#include <utility>
#include <vector>

#include "queue.h"

namespace simt {

// On the current device and its current stream.
c10::Allocator* device_allocator();

// A stream other than the one that the memory was asked for on uses it: it is given back after that stream's work, too.
void record_use(const c10::DataPtr&, const void* stream);

void resize_storage(c10::StorageImpl*, size_t bytes);

// What a graph's tensors lie in: theirs as long as the graph lives, so that each replay finds it.
struct Pool {
  std::shared_ptr<Graph> graph;  // null while it is captured
  std::vector<std::pair<int, void*>> given_back;

  ~Pool();
};

// What is asked for on streams that are captured lies in this pool, until there is a newer one.
std::shared_ptr<Pool> begin_pool();

}  // namespace simt
