// A small SIMT machine on the CPU, so that CUDA kernels can be compiled by an ordinary C++ compiler and run where there
// is no GPU. Each thread of a block is a fiber; it runs until it meets a barrier or a warp operation, and goes on when
// all that it waits for have come. Blocks run one after the other, and launches when somebody waits for them.
//
// Beside results it finds faults that a GPU would hide: two threads that touch one slot of shared memory without a
// barrier between them, a slot read before it was written, an index out of bounds, a barrier that not all threads
// reach, a warp operation whose mask names lanes that do not come, a 16-byte word that is not aligned. Each is kept as
// a Fault; take_faults() hands them out. Global memory is the process's own: AddressSanitizer watches it.
//
// Included by csrc/cuda/launch.h in place of the CUDA headers when TRAINOPT_SIMT is defined. One-dimensional grids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__ &  // const T __grid_constant__ name: not copied for each thread
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace simt {

enum class FaultKind { kRace, kUninitialised, kOutOfBounds, kBarrier, kWarp, kAlignment, kLaunch };
struct Fault {
  FaultKind kind;
  std::string text;
};
// The faults since the last call; at most the first hundred are kept.
std::vector<Fault> take_faults();

// The order in which blocks and a block's threads run: a right kernel gives the same bits in each.
enum class Order { kAscending, kDescending };
void set_order(Order);

// How many blocks each launch since the last call had.
std::vector<unsigned> take_launches();
// Of the launches to come, only these blocks run; all, if there are none. For grids that would take too long.
void set_blocks(const std::vector<unsigned>& only);
// Whether the launches to come do nothing but count: for timing what the host does.
void skip_launches(bool);

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
// Of a block, of which so much may be arrays of a fixed size, and of a multiprocessor: as little as most GPUs have.
constexpr size_t kMaxSharedBytes = 99 * 1024, kMaxStaticBytes = 48 * 1024, kMultiprocessorSharedBytes = 100 * 1024;

struct Index {
  unsigned x = 0;
};

// Whether a launch is one that is to run: it is counted, and may be refused.
bool begins(int64_t blocks, int threads, size_t shared_bytes, const void* stream);
// Has `body` run once for each thread of each block, when the stream comes to it (queue.h); at once where the stream is
// null. Launches of several threads of the host follow one another.
void launch(int64_t blocks, int threads, size_t shared_bytes, const void* stream, std::function<void()> body);
// Called when a launch is made, by the thread of the host that makes it; and before and after the kernel runs: for
// memory that kernels alone may use.
struct Surroundings {
  void (*admit)(const void* stream) = nullptr;
  void (*before)(const void* stream) = nullptr;
  void (*after)() = nullptr;
};
void set_surroundings(const Surroundings&);
// A fault of the launch itself.
void report_launch(const std::string& what);

// Where in the sources something happens.
struct Site {
  const char* file;
  int line;
};

void barrier(Site);
void warp_barrier(unsigned mask, Site);
// Hands in 8 bytes and returns what each lane of the warp handed in.
const uint64_t* exchange(unsigned mask, uint64_t value, Site);
// What lane `source` handed in: poison, and a fault, if that lane is not in the mask.
uint64_t from_lane(const uint64_t* exchanged, unsigned mask, unsigned source, Site);
unsigned lane();

// Shared memory -------------------------------------------------------------------------------------------------------

enum class Use { kRead, kWrite, kAtomic };
struct Memory;  // one array of a block, with a record of who used which slot
Memory* static_memory(const char* name, size_t count, size_t width, Site);
Memory* dynamic_memory(const char* name, size_t width, Site);
// The slot's bytes, or those of a spare one if there is no such slot.
void* touch(Memory*, size_t index, Use);

template <class T>
class Element {
 public:
  Element(Memory* memory, size_t index) : memory_(memory), index_(index) {}
  operator T() const {
    T value;
    std::memcpy(static_cast<void*>(&value), touch(memory_, index_, Use::kRead), sizeof value);
    return value;
  }
  const Element& operator=(T value) const {
    std::memcpy(touch(memory_, index_, Use::kWrite), &value, sizeof value);
    return *this;
  }
  const Element& operator=(const Element& other) const { return *this = static_cast<T>(other); }
  const Element& operator+=(T value) const { return *this = static_cast<T>(*this) + value; }
  const Element* operator&() const { return this; }
  T* atomic() const { return static_cast<T*>(touch(memory_, index_, Use::kAtomic)); }

 private:
  Memory* memory_;
  size_t index_;
};

template <class T>
class Shared {
 public:
  explicit Shared(Memory* memory) : memory_(memory) {}
  Element<T> operator[](size_t index) const { return Element<T>(memory_, index); }

 private:
  Memory* memory_;
};

template <class T>
T* address(T* global) {
  return global;
}
template <class T>
T* address(const Element<T>* shared) {
  return shared->atomic();
}

// The address of a 16-byte word: a fault if it is not aligned, of which the compiler is to assume nothing.
void report_alignment(const void* address);
inline void* aligned(const void* word) {
  uintptr_t address = reinterpret_cast<uintptr_t>(word);
  asm volatile("" : "+r"(address));
  void* const found = reinterpret_cast<void*>(address);
  if (address % 16 != 0) report_alignment(found);
  return found;
}

template <class T>
uint64_t pack(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}
template <class T>
T unpack(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace simt

// `__shared__ T name[count]` and `extern __shared__ T name[]`, watched.
#define TRAINOPT_SHARED(T, name, count) \
  const simt::Shared<T> name(simt::static_memory(#name, count, sizeof(T), {__FILE__, __LINE__}))
#define TRAINOPT_DYNAMIC_SHARED(T, name) \
  const simt::Shared<T> name(simt::dynamic_memory(#name, sizeof(T), {__FILE__, __LINE__}))

// CUDA's names --------------------------------------------------------------------------------------------------------

inline simt::Index threadIdx, blockIdx, blockDim, gridDim;

// Copied in one access, whose address must be a multiple of 16.
struct __attribute__((aligned(16), may_alias)) uint4 {
  unsigned x, y, z, w;

  uint4() = default;
  uint4(unsigned a, unsigned b, unsigned c, unsigned d) : x(a), y(b), z(c), w(d) {}
  uint4(const uint4& other) { *this = other; }
  uint4& operator=(const uint4& other) {
    std::memcpy(simt::aligned(this), simt::aligned(&other), sizeof other);
    return *this;
  }
};

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_SITE) { simt::barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) { simt::warp_barrier(mask, {file, line}); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, SIMT_SITE) {
  const uint64_t* all = simt::exchange(mask, simt::pack(value), {file, line});
  return simt::unpack<T>(simt::from_lane(all, mask, static_cast<unsigned>(source) & 31, {file, line}));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, SIMT_SITE) {
  return __shfl_sync(mask, value, static_cast<int>(simt::lane()) ^ bits, file, line);
}
// Lanes without a source keep their own value.
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, SIMT_SITE) {
  const unsigned source = simt::lane() + distance;
  return __shfl_sync(mask, value, static_cast<int>(source < simt::kWarpSize ? source : simt::lane()), file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, SIMT_SITE) {
  const unsigned lane = simt::lane();
  return __shfl_sync(mask, value, static_cast<int>(lane >= distance ? lane - distance : lane), file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  const uint64_t* all = simt::exchange(mask, predicate != 0, {file, line});
  unsigned votes = 0;
  for (unsigned l = 0; l < simt::kWarpSize; ++l)
    if (mask >> l & 1 && all[l] == 1) votes |= 1u << l;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIMT_SITE) {
  const uint64_t* all = simt::exchange(mask, value, {file, line});
  unsigned sum = 0;
  for (unsigned l = 0; l < simt::kWarpSize; ++l)
    if (mask >> l & 1) sum += static_cast<unsigned>(all[l]);
  return sum;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIMT_SITE) {
  const uint64_t* all = simt::exchange(mask, value, {file, line});
  unsigned most = 0;
  for (unsigned l = 0; l < simt::kWarpSize; ++l)
    if (mask >> l & 1 && all[l] > most) most = static_cast<unsigned>(all[l]);
  return most;
}
#undef SIMT_SITE

// The host, which is the machine, sees every store at once.
inline void __threadfence_system() {}

template <class Pointer, class T>
T atomicAdd(Pointer where, T value) {
  auto* at = simt::address(where);
  const T old = *at;
  *at = old + value;
  return old;
}
template <class Pointer, class T>
T atomicMax(Pointer where, T value) {
  auto* at = simt::address(where);
  const T old = *at;
  *at = old < value ? value : old;
  return old;
}
template <class Pointer, class T>
T atomicExch(Pointer where, T value) {
  auto* at = simt::address(where);
  const T old = *at;
  *at = value;
  return old;
}
