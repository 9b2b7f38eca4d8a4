#include "simt.h"

#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "fiber.h"
#include "queue.h"

namespace simt {
namespace {

// Warp `w` of a block has counted `warp_epochs[w]` warp barriers since the block's last barrier: memory that is
// shared between threads is ordered by either.
struct Access {
  unsigned thread;
  unsigned block_epoch, warp_epoch;
  bool atomic;
};

struct Slot {
  bool written = false;
  std::vector<Access> writes, reads;  // since the last barrier
};

constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point type

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Thread {
  Fiber fiber;
  State state;
  Site site;
  unsigned mask;
  bool orders_memory;
  uint64_t value, received[kWarpSize];
};

struct Block {
  const std::function<void()>* body;
  unsigned threads, epoch;
  size_t dynamic_bytes, static_bytes;
  unsigned warp_epochs[kMaxThreads / kWarpSize];
  std::vector<std::unique_ptr<Memory>> memories;
};

std::recursive_mutex mutex;  // held while a kernel runs
Surroundings surroundings;
std::vector<Fault> faults;
Order order = Order::kAscending;
std::vector<unsigned> launches, only_blocks;
bool launches_are_skipped = false;
std::deque<Thread> threads;
Fiber scheduler;
Block block;
unsigned running;  // the thread that runs

bool are_same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

std::string text_of(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

void report(FaultKind kind, const std::string& what) {
  if (faults.size() < 100) faults.push_back({kind, "block " + std::to_string(blockIdx.x) + ": " + what});
}

void report_thread(FaultKind kind, const std::string& what) {
  report(kind, "thread " + std::to_string(running) + ": " + what);
}

void wait(State state, Site site) {
  Thread& thread = threads[running];
  thread.state = state;
  thread.site = site;
  thread.fiber.hand_over(scheduler);
}

void run_body() {
  Fiber::arrive(nullptr);
  (*block.body)();
  wait(State::kDone, {"", 0});
}

void resume(unsigned thread) {
  running = threadIdx.x = thread;
  scheduler.hand_over(threads[thread].fiber);
}

// Lets every warp operation go on whose lanes have all come; whether there was one.
bool release_warps() {
  bool any = false;
  for (unsigned first = 0; first < block.threads; first += kWarpSize) {
    for (unsigned l = 0; l < kWarpSize && first + l < block.threads; ++l) {
      const Thread& one = threads[first + l];
      if (one.state != State::kAtWarp) continue;
      bool complete = true;
      for (unsigned m = 0; m < kWarpSize; ++m) {
        if (!(one.mask >> m & 1)) continue;
        const Thread* other = first + m < block.threads ? &threads[first + m] : nullptr;
        complete = complete && other != nullptr && other->state == State::kAtWarp && other->mask == one.mask &&
                   are_same(other->site, one.site);
      }
      if (!complete) continue;
      uint64_t values[kWarpSize];
      const unsigned mask = one.mask;
      const bool orders_memory = one.orders_memory;
      for (unsigned m = 0; m < kWarpSize; ++m) values[m] = mask >> m & 1 ? threads[first + m].value : 0;
      for (unsigned m = 0; m < kWarpSize; ++m) {
        if (!(mask >> m & 1)) continue;
        std::memcpy(threads[first + m].received, values, sizeof values);
        threads[first + m].state = State::kReady;
      }
      if (orders_memory) ++block.warp_epochs[first / kWarpSize];
      any = true;
    }
  }
  return any;
}

// Lets the threads at the barrier go on, if that is where all are; false if some wait for what will not come.
bool release_barrier() {
  unsigned waiting = 0, done = 0;
  const Thread* first = nullptr;
  bool same = true;
  for (unsigned t = 0; t < block.threads; ++t) {
    const Thread& thread = threads[t];
    done += thread.state == State::kDone;
    if (thread.state != State::kAtBarrier) continue;
    ++waiting;
    if (first == nullptr) first = &thread;
    same = same && are_same(thread.site, first->site);
  }
  if (waiting + done != block.threads) return false;
  if (done != 0)
    report(FaultKind::kBarrier, std::to_string(done) + " threads ended without the barrier at " + text_of(first->site));
  if (!same) report(FaultKind::kBarrier, "threads wait at different barriers, one at " + text_of(first->site));
  ++block.epoch;
  for (unsigned t = 0; t < block.threads; ++t)
    if (threads[t].state == State::kAtBarrier) threads[t].state = State::kReady;
  return true;
}

void report_stuck() {
  for (unsigned t = 0; t < block.threads; ++t) {
    if (threads[t].state != State::kAtWarp) continue;
    char mask[16];
    std::snprintf(mask, sizeof mask, "%08x", threads[t].mask);
    return report(FaultKind::kWarp, "thread " + std::to_string(t) + " waits at " + text_of(threads[t].site) +
                                        " for lanes of the mask " + mask + " that do not come");
  }
}

void run_block() {
  while (threads.size() < block.threads) threads.emplace_back();
  for (unsigned t = 0; t < block.threads; ++t) {
    threads[t].state = State::kReady;
    threads[t].fiber.begin(run_body);
  }
  for (;;) {
    bool any = false;
    unsigned done = 0;
    for (unsigned i = 0; i < block.threads; ++i) {
      const unsigned t = order == Order::kAscending ? i : block.threads - 1 - i;
      if (threads[t].state == State::kReady) {
        any = true;
        resume(t);
      }
      done += threads[t].state == State::kDone;
    }
    if (done == block.threads) return;
    if (any || release_warps() || release_barrier()) continue;
    return report_stuck();  // the block is given up; its threads are begun anew by the next
  }
}

}  // namespace

struct Memory {
  const char* name;
  Site site;
  size_t count, width;
  std::vector<Slot> slots;
  std::vector<unsigned char> bytes;  // one slot more, for what lies outside

  Memory(const char* n, Site s, size_t c, size_t w)
      : name(n), site(s), count(c), width(w), slots(c), bytes((c + 1) * w, kPoison) {}
};

namespace {

Memory* find_memory(const char* name, size_t count, size_t width, Site site, bool is_static) {
  for (const std::unique_ptr<Memory>& memory : block.memories)
    if (are_same(memory->site, site) && std::strcmp(memory->name, name) == 0) return memory.get();
  block.memories.push_back(std::make_unique<Memory>(name, site, count, width));
  if (is_static) block.static_bytes += count * width;
  if (block.static_bytes > kMaxStaticBytes || block.static_bytes + block.dynamic_bytes > kMaxSharedBytes)
    report(FaultKind::kLaunch, std::to_string(block.static_bytes + block.dynamic_bytes) + " bytes of shared memory");
  return block.memories.back().get();
}

bool conflicts(const Access& before, const Access& now) {
  if (before.thread == now.thread || before.block_epoch != now.block_epoch || (before.atomic && now.atomic))
    return false;
  return before.thread / kWarpSize != now.thread / kWarpSize || before.warp_epoch == now.warp_epoch;
}

void check_conflicts(const Memory& memory, size_t index, const std::vector<Access>& accesses, const Access& now,
                     const char* what) {
  for (const Access& before : accesses)
    if (conflicts(before, now))
      return report_thread(FaultKind::kRace, std::string(what) + memory.name + "[" + std::to_string(index) +
                                                 "] that thread " + std::to_string(before.thread) +
                                                 " used since the last barrier");
}

void remember(std::vector<Access>& accesses, const Access& now) {
  if (!accesses.empty() && accesses.front().block_epoch != now.block_epoch) accesses.clear();
  for (const Access& before : accesses)
    if (before.thread == now.thread && before.warp_epoch == now.warp_epoch) return;
  accesses.push_back(now);
}

}  // namespace

namespace {

void run(unsigned blocks, unsigned block_threads, size_t shared_bytes, const void* stream,
         const std::function<void()>& body) {
  const std::lock_guard lock(mutex);
  if (surroundings.before != nullptr) surroundings.before(stream);
  gridDim.x = blocks;
  blockDim.x = block_threads;
  const unsigned count = only_blocks.empty() ? gridDim.x : static_cast<unsigned>(only_blocks.size());
  for (unsigned i = 0; i < count; ++i) {
    const unsigned place = order == Order::kAscending ? i : count - 1 - i;
    blockIdx.x = only_blocks.empty() ? place : only_blocks[place];
    block = Block{&body, blockDim.x, 0, shared_bytes, 0, {}, {}};
    run_block();
  }
  if (surroundings.after != nullptr) surroundings.after();
}

}  // namespace

bool begins(int64_t blocks, int threads, size_t shared_bytes, const void* stream) {
  if (blocks <= 0 || blocks > 0x7fffffff || threads <= 0 || threads > static_cast<int>(kMaxThreads) ||
      shared_bytes > kMaxSharedBytes) {
    report_launch(std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads and " +
                  std::to_string(shared_bytes) + " bytes of dynamic shared memory");
    return false;
  }
  {
    const std::lock_guard lock(mutex);
    launches.push_back(static_cast<unsigned>(blocks));
    if (launches_are_skipped) return false;
  }
  if (surroundings.admit != nullptr) surroundings.admit(stream);
  return true;
}

void launch(int64_t blocks, int threads, size_t shared_bytes, const void* stream, std::function<void()> body) {
  const unsigned grid = static_cast<unsigned>(blocks), size = static_cast<unsigned>(threads);
  if (stream == nullptr) return run(grid, size, shared_bytes, stream, body);
  enqueue(stream, [=, body = std::move(body)] { run(grid, size, shared_bytes, stream, body); });
}

void set_surroundings(const Surroundings& wanted) { surroundings = wanted; }

void report_alignment(const void* address) {
  char text[64];
  std::snprintf(text, sizeof text, "uses 16 bytes at %p, which are not aligned", address);
  report_thread(FaultKind::kAlignment, text);
}

void report_launch(const std::string& what) {
  const std::lock_guard lock(mutex);
  report(FaultKind::kLaunch, what);
}

void barrier(Site site) { wait(State::kAtBarrier, site); }

const uint64_t* exchange(unsigned mask, uint64_t value, Site site) {
  Thread& thread = threads[running];
  if (!(mask >> lane() & 1)) report_thread(FaultKind::kWarp, "is not in its own mask at " + text_of(site));
  thread.mask = mask;
  thread.value = value;
  thread.orders_memory = false;
  wait(State::kAtWarp, site);
  return thread.received;
}

uint64_t from_lane(const uint64_t* exchanged, unsigned mask, unsigned source, Site site) {
  if (mask >> source & 1) return exchanged[source];
  report_thread(FaultKind::kWarp, "asks lane " + std::to_string(source) + ", outside the mask, at " + text_of(site));
  return ~uint64_t{0};
}

void warp_barrier(unsigned mask, Site site) {
  Thread& thread = threads[running];
  thread.mask = mask;
  thread.value = 0;
  thread.orders_memory = true;
  wait(State::kAtWarp, site);
}

unsigned lane() { return running % kWarpSize; }

Memory* static_memory(const char* name, size_t count, size_t width, Site site) {
  return find_memory(name, count, width, site, true);
}

Memory* dynamic_memory(const char* name, size_t width, Site site) {
  return find_memory(name, block.dynamic_bytes / width, width, site, false);
}

void* touch(Memory* memory, size_t index, Use use) {
  if (index >= memory->count) {
    report_thread(FaultKind::kOutOfBounds,
                  memory->name + std::string("[") + std::to_string(index) + "] of " + std::to_string(memory->count));
    return &memory->bytes[memory->count * memory->width];
  }
  Slot& slot = memory->slots[index];
  const Access now{running, block.epoch, block.warp_epochs[running / kWarpSize], use == Use::kAtomic};
  if (use != Use::kWrite && !slot.written)
    report_thread(FaultKind::kUninitialised,
                  memory->name + std::string("[") + std::to_string(index) + "] is read before it is set");
  check_conflicts(*memory, index, slot.writes, now, use == Use::kRead ? "reads " : "writes ");
  if (use != Use::kRead) {
    check_conflicts(*memory, index, slot.reads, now, "writes ");
    slot.written = true;
  }
  remember(use == Use::kRead ? slot.reads : slot.writes, now);
  return &memory->bytes[index * memory->width];
}

std::vector<Fault> take_faults() {
  finish_all();
  const std::lock_guard lock(mutex);
  std::vector<Fault> result;
  result.swap(faults);
  return result;
}

void set_order(Order wanted) {
  finish_all();
  const std::lock_guard lock(mutex);
  order = wanted;
}

void skip_launches(bool skip) { launches_are_skipped = skip; }

std::vector<unsigned> take_launches() {
  const std::lock_guard lock(mutex);
  std::vector<unsigned> result;
  result.swap(launches);
  return result;
}

void set_blocks(const std::vector<unsigned>& only) {
  finish_all();
  const std::lock_guard lock(mutex);
  only_blocks = only;
}

}  // namespace simt
