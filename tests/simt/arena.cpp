#include "arena.h"

#include <execinfo.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>

namespace simt {
namespace {

constexpr size_t kAlignment = 512, kPage = 4096;
constexpr size_t kReserved = size_t{1} << 36;  // addresses, not memory
constexpr size_t kKeptBack = size_t{8} << 20;
constexpr size_t kHuge = size_t{1} << 30;  // is not poisoned: what nobody touches takes no memory

size_t rounded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The same memory at two addresses: the device's, which is shut, and the host's.
class Arena {
 public:
  explicit Arena(int device) : device_(device) {
    const int file = memfd_create("simt", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, kReserved) != 0) throw std::runtime_error("no memory for an emulated device");
    device_base_ = map(file, PROT_NONE);
    host_base_ = map(file, PROT_READ | PROT_WRITE);
    close(file);
  }

  bool contains(const void* address) const { return device_base_ <= address && address < device_base_ + kReserved; }
  char* host_address(const void* address) const {
    return host_base_ + (static_cast<const char*>(address) - device_base_);
  }

  void* allocate(size_t bytes) {
    const size_t whole = rounded(bytes) + kAlignment;
    char* memory = take_back(whole);
    if (memory == nullptr) {
      if (used_ + whole > kReserved) throw std::runtime_error("an emulated device is out of memory");
      memory = device_base_ + used_;
      used_ += whole;
      const size_t clean = bytes < kHuge ? 0 : bytes;
      std::memset(host_address(memory) + clean, kMemoryPoison, whole - clean);
    }
    live_[memory] = bytes;
    ++statistics.allocations;
    statistics.allocated_bytes += bytes;
    statistics.peak_bytes = std::max(statistics.peak_bytes, statistics.allocated_bytes);
    return memory;
  }

  // The bytes that were asked for.
  size_t retire(void* memory) {
    const auto found = live_.find(static_cast<char*>(memory));
    if (found == live_.end()) throw std::runtime_error("memory of an emulated device is given back twice");
    statistics.allocated_bytes -= found->second;
    return found->second;
  }

  void release(void* memory) {
    const auto found = live_.find(static_cast<char*>(memory));
    const auto [begin, bytes] = *found;
    const size_t whole = rounded(bytes) + kAlignment;
    find_damage(begin, bytes, whole);
    live_.erase(found);
    if (bytes >= kHuge) {  // its addresses are not used again
      const size_t before = (kPage - reinterpret_cast<uintptr_t>(begin) % kPage) % kPage;
      madvise(host_address(begin) + before, (whole - before) / kPage * kPage, MADV_REMOVE);
      return;
    }
    std::memset(host_address(begin), kMemoryPoison, whole);
    kept_back_[whole].push_back(begin);
    kept_back_bytes_ += whole;
  }

  void find_damage() {
    for (const auto& [begin, bytes] : live_) find_damage(begin, bytes, rounded(bytes) + kAlignment);
    for (const auto& [whole, blocks] : kept_back_)
      for (char* begin : blocks) find_damage(begin, 0, whole);
  }

  void open() {
    if (depth_++ == 0) protect(PROT_READ | PROT_WRITE);
  }
  void shut() {
    if (--depth_ == 0) protect(PROT_NONE);
  }

  MemoryStatistics statistics;
  std::vector<std::string> damage;

 private:
  int device_, depth_ = 0;
  char *device_base_, *host_base_;
  size_t used_ = 0, kept_back_bytes_ = 0;
  std::map<char*, size_t> live_;                   // the bytes asked for
  std::map<size_t, std::deque<char*>> kept_back_;  // by size, the oldest first

  static char* map(int file, int protection) {
    void* base = mmap(nullptr, kReserved, protection, MAP_SHARED | MAP_NORESERVE, file, 0);
    if (base == MAP_FAILED) throw std::runtime_error("no addresses for an emulated device");
    return static_cast<char*>(base);
  }

  void protect(int protection) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = (used_ + page - 1) / page * page;
    if (bytes != 0 && mprotect(device_base_, bytes, protection) != 0) throw std::runtime_error("mprotect failed");
  }

  char* take_back(size_t whole) {
    if (kept_back_bytes_ <= kKeptBack) return nullptr;
    const auto found = kept_back_.find(whole);
    if (found == kept_back_.end() || found->second.empty()) return nullptr;
    char* memory = found->second.front();
    found->second.pop_front();
    kept_back_bytes_ -= whole;
    find_damage(memory, 0, whole);
    return memory;
  }

  // Bytes [from, to) of a block that should be as they were poisoned. They are poisoned anew: one finding each.
  void find_damage(char* begin, size_t from, size_t to) {
    unsigned char* bytes = reinterpret_cast<unsigned char*>(host_address(begin));
    for (size_t i = from; i < to; ++i) {
      if (bytes[i] == kMemoryPoison) continue;
      char text[128];
      std::snprintf(text, sizeof text, "device %d: byte %zu was written to, of %s of %zu bytes", device_, i,
                    from == 0 ? "memory that was given back," : "an allocation", from == 0 ? to : from);
      damage.push_back(text);
      std::memset(bytes + from, kMemoryPoison, to - from);
      return;
    }
  }
};

struct Arenas {
  Arena of_device[kDevices] = {Arena(0), Arena(1)};
  std::recursive_mutex mutex;
  const pid_t owner = getpid();  // a forked process shares the memory, and must leave it alone
};

struct sigaction after_ours;

Arenas& arenas();

void on_fault(int signal, siginfo_t* info, void*) {
  for (int device = 0; device < kDevices; ++device) {
    if (!arenas().of_device[device].contains(info->si_addr)) continue;
    char text[160];
    const int length = std::snprintf(text, sizeof text,
                                     "the host, or a kernel on another device, touched memory of emulated device %d, "
                                     "or a kernel went past what it has\n",
                                     device);
    (void)!write(STDERR_FILENO, text, static_cast<size_t>(length));
    void* frames[64];
    backtrace_symbols_fd(frames, backtrace(frames, 64), STDERR_FILENO);
    std::abort();
  }
  sigaction(signal, &after_ours, nullptr);  // the instruction is run again, for whoever was here before
}

// Never destroyed: tensors may outlive everything.
Arenas& arenas() {
  static Arenas* const all = [] {
    auto* made = new Arenas;
    void* frame;
    backtrace(&frame, 1);  // loads what it needs, while that is allowed
    struct sigaction ours{};
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &ours, &after_ours);
    return made;
  }();
  return *all;
}

}  // namespace

void* allocate(int device, size_t bytes) {
  if (bytes == 0) return nullptr;
  const std::lock_guard lock(arenas().mutex);
  return arenas().of_device[device].allocate(bytes);
}

size_t retire(int device, void* memory) {
  if (memory == nullptr || getpid() != arenas().owner) return 0;
  const std::lock_guard lock(arenas().mutex);
  return arenas().of_device[device].retire(memory);
}

void release(int device, void* memory) {
  if (memory == nullptr || getpid() != arenas().owner) return;
  const std::lock_guard lock(arenas().mutex);
  arenas().of_device[device].release(memory);
}

void* host_address(const void* memory) {
  for (const Arena& arena : arenas().of_device)
    if (arena.contains(memory)) return arena.host_address(memory);
  return nullptr;
}

MemoryStatistics memory_statistics(int device) {
  const std::lock_guard lock(arenas().mutex);
  return arenas().of_device[device].statistics;
}

void reset_peak(int device) {
  const std::lock_guard lock(arenas().mutex);
  MemoryStatistics& statistics = arenas().of_device[device].statistics;
  statistics.peak_bytes = statistics.allocated_bytes;
}

std::vector<std::string> take_damage() {
  const std::lock_guard lock(arenas().mutex);
  std::vector<std::string> result;
  for (Arena& arena : arenas().of_device) {
    arena.find_damage();
    result.insert(result.end(), arena.damage.begin(), arena.damage.end());
    arena.damage.clear();
  }
  return result;
}

Open::Open(int device) : device_(device) {
  arenas().mutex.lock();
  arenas().of_device[device].open();
}

Open::~Open() {
  arenas().of_device[device_].shut();
  arenas().mutex.unlock();
}

}  // namespace simt
