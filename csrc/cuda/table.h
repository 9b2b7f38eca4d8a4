// The list of tensors that one launch works on. It travels in the kernel's parameters, so its capacity follows from
// their size in bytes. Every tensor is cut into chunks from its own element 0, and a block takes one chunk; which, it
// finds by the first chunk of each tensor. So tensors of any sizes share a launch, and only their number is limited.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/launch.h"

namespace trainopt::cuda {

// Elements of a block, and of a thread at a time. A warp's 32 * 8 elements are one block of 256, the unit that states
// with a scale of their own are counted in.
constexpr int kThreads = 256;
constexpr int kItem = 8;
constexpr int64_t kChunk = 16384;
static_assert(32 * kItem == 256 && kChunk % (kThreads * kItem) == 0);

// `Header` is what all tensors of a launch share, `Row` what each has.
template <class Header, class Row, size_t kBytes>
struct Table {
  static constexpr size_t kFixedBytes = sizeof(Header) + 2 * sizeof(int32_t) + 2 * alignof(Header) + alignof(Row);
  static constexpr int kCapacity = static_cast<int>((kBytes - kFixedBytes) / (sizeof(Row) + sizeof(int32_t)));
  static_assert(kBytes > kFixedBytes && kCapacity >= 1);

  Header header;
  int32_t count;
  int32_t first_chunk[kCapacity + 1];  // of each tensor; then the number of all chunks
  Row rows[kCapacity];
};

// How many chunks a tensor is cut into; one without elements has none.
inline int64_t chunks_of(int64_t numel) { return numel / kChunk + (numel % kChunk != 0); }

// Fills tables, and hands each to `launch` when it has room for no more tensors or a grid for no more chunks.
template <class Table, class Launch>
class Filler {
 public:
  Filler(Table& table, Launch launch) : table_(table), launch_(launch) { clear(); }

  // Launches what there is, if a tensor of so many chunks does not fit in.
  void make_room(int64_t chunks) {
    if (table_.count == Table::kCapacity || total_ + chunks > kMaxChunks) flush();
  }

  // A place for that tensor.
  auto& add(int64_t chunks) {
    table_.first_chunk[table_.count] = static_cast<int32_t>(total_);
    total_ += chunks;
    return table_.rows[table_.count++];
  }

  void flush() {
    if (table_.count > 0) {
      table_.first_chunk[table_.count] = static_cast<int32_t>(total_);
      launch_(table_, total_);
    }
    clear();
  }

 private:
  static constexpr int64_t kMaxChunks = 0x7fffffff;
  Table& table_;
  Launch launch_;
  int64_t total_;

  void clear() { table_.count = 0, total_ = 0; }
};

// The tensor that chunk `chunk` of the launch belongs to: the last that begins at or before it.
template <class Table>
__device__ inline int find_row(const Table& table, int32_t chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk) {  // tests break this: a neighbour's chunk
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Which of a row's blocks this one is, of a launch with a chunk for each block.
template <class Table>
__device__ __forceinline__ int64_t block_in(const Table& table, int row) {
  return static_cast<int32_t>(blockIdx.x) - table.first_chunk[row];
}

}  // namespace trainopt::cuda
