#include "device/pinned_memory.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>

#include "arena.h"
#include "queue.h"

namespace simt {
namespace {

struct Pinned {
  std::mutex mutex;
  std::map<const char*, size_t> live;  // with their bytes
  std::deque<void*> kept_back;
};

Pinned& pinned() {
  static Pinned* const one = new Pinned;
  return *one;
}

// Poisoned, and kept back for long. A copy of torch's holds its tensor, as torch's own allocator has it; a kernel that
// comes later than that reads poison, and what it writes is lost.
void release_pinned(void* memory) {
  const std::lock_guard lock(pinned().mutex);
  const auto found = pinned().live.find(static_cast<char*>(memory));
  std::memset(memory, kMemoryPoison, found->second);
  pinned().live.erase(found);
  std::deque<void*>& kept_back = pinned().kept_back;
  kept_back.push_back(memory);
  if (kept_back.size() < 1000) return;
  std::free(kept_back.front());
  kept_back.pop_front();
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (is_any_capturing()) forbid_while_capturing("operation not permitted when stream is capturing");
    if (bytes == 0) return {nullptr, c10::Device(c10::kCPU)};
    char* memory = static_cast<char*>(std::aligned_alloc(512, (bytes + 511) / 512 * 512));
    const std::lock_guard lock(pinned().mutex);
    pinned().live[memory] = bytes;
    return {memory, memory, &release_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} pinned_memory;

}  // namespace

c10::Allocator* pinned_allocator() { return &pinned_memory; }

bool is_pinned(const void* memory) {
  const std::lock_guard lock(pinned().mutex);
  auto after = pinned().live.upper_bound(static_cast<const char*>(memory));
  return after != pinned().live.begin() && (--after, memory < after->first + after->second);
}

}  // namespace simt
