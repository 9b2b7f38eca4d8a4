#include "device/memory.h"

#include <c10/core/DeviceGuard.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "arena.h"
#include "device/streams.h"

namespace simt {
namespace {

// Memory in use.
struct Block {
  const void* stream;              // that it was asked for on
  std::vector<const void*> users;  // other streams that it has been told of
  std::weak_ptr<Pool> pool;
  std::shared_ptr<bool> has_gone;  // in the capture that it was made in: each replay finds it uninitialised
};

struct Blocks {
  std::mutex mutex;
  std::unordered_map<void*, Block> all;
  std::weak_ptr<Pool> captured;
  const pid_t owner = getpid();
};

Blocks& blocks() {
  static Blocks* const one = new Blocks;
  return *one;
}

void poison(void* memory, size_t bytes) { std::memset(host_address(memory), kMemoryPoison, bytes); }

// Bytes that tensors have given back, and that wait for their streams: not too many.
std::atomic<size_t> waiting_bytes{0};
constexpr size_t kMostWaitingBytes = size_t{16} << 20;

void* allocate_in_order(int device, size_t bytes) {
  void* memory = allocate(device, bytes);
  if (memory == nullptr) return memory;
  Block block{current_stream_of(device_of(device)), {}, {}, nullptr};
  const std::lock_guard lock(blocks().mutex);
  if (is_capturing(block.stream)) {
    block.pool = blocks().captured;
    const std::shared_ptr<bool> gone = block.has_gone = std::make_shared<bool>(false);
    enqueue(block.stream, [=] {
      if (*gone) poison(memory, bytes);
    });
  }
  blocks().all[memory] = std::move(block);
  return memory;
}

// What has been issued on its streams by now may still use it.
void release_in_order(int device, void* memory) {
  if (memory == nullptr || getpid() != blocks().owner) return;
  size_t bytes = 0;
  {
    const std::lock_guard lock(blocks().mutex);
    const auto found = blocks().all.find(memory);
    const Block block = std::move(found->second);
    blocks().all.erase(found);
    bytes = retire(device, memory);
    const std::shared_ptr<Pool> pool = block.pool.lock();
    std::vector<Event> events;
    const bool in_capture = pool != nullptr && pool->graph == nullptr;
    const auto last = in_capture ? last_captured : last_issued;
    events.push_back(last(block.stream));
    for (const void* user : block.users) events.push_back(last(user));
    if (pool != nullptr) {
      pool->given_back.emplace_back(device, memory);
      if (!in_capture || events.front() == nullptr) return;
      *block.has_gone = true;
      return enqueue_after(events, [=] { poison(memory, bytes); });
    }
    waiting_bytes += bytes;
    enqueue_after(events, [=] {
      release(device, memory);
      waiting_bytes -= bytes;
    });
  }
  if (waiting_bytes > kMostWaitingBytes) finish_all();
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const int device = current_device();
    void* memory = allocate_in_order(device, bytes);
    return {memory, memory, device == 0 ? &release_on<0> : &release_on<1>, device_of(device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_on<0>; }  // what is on device 1 counts as strange
  void copy_data(void* to, const void* from, size_t bytes) const override {
    enqueue(current_stream(), [=] { std::memcpy(host_address(to), host_address(from), bytes); });
  }
  template <int kDevice>
  static void release_on(void* memory) {
    release_in_order(kDevice, memory);
  }
} allocator;
static_assert(kDevices == 2);

}  // namespace

c10::Allocator* device_allocator() { return &allocator; }

void record_use(const c10::DataPtr& memory, const void* stream) {
  const std::lock_guard lock(blocks().mutex);
  const auto found = blocks().all.find(memory.get_context());
  if (found != blocks().all.end()) found->second.users.push_back(stream);
}

void resize_storage(c10::StorageImpl* storage, size_t bytes) {
  const c10::DeviceGuard on(storage->device());
  c10::DataPtr grown = allocator.allocate(bytes);
  if (const size_t kept = std::min(bytes, storage->nbytes()); kept != 0)
    allocator.copy_data(grown.get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(grown));
  storage->set_nbytes(bytes);
}

Pool::~Pool() {
  for (const auto& [device, memory] : given_back)
    enqueue_after({graph != nullptr ? last_replay(*graph) : nullptr}, [=] { release(device, memory); });
}

std::shared_ptr<Pool> begin_pool() {
  auto pool = std::make_shared<Pool>();
  const std::lock_guard lock(blocks().mutex);
  blocks().captured = pool;
  return pool;
}

}  // namespace simt
