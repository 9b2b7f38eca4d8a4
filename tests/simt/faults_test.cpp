// The SIMT machine can fail: small kernels with one seeded fault each, which must be found, beside the same kernels
// without it, which must pass and give the right result. The last line tells what passed and failed.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpp/checks.h"
#include "cuda/launch.h"
#include "queue.h"

namespace {

using trainopt::check;
using trainopt::failed;
using trainopt::passed;
using trainopt::cuda::launch;

// A fault may bring others with it: a slot that is written too late is read unset.
bool found(simt::FaultKind kind) {
  bool any = false;
  for (const simt::Fault& fault : simt::take_faults()) any = any || fault.kind == kind;
  return any;
}

bool found_nothing() {
  const std::vector<simt::Fault> faults = simt::take_faults();
  for (const simt::Fault& fault : faults) std::printf("unexpected: %s\n", fault.text.c_str());
  return faults.empty();
}

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

// A sum over each block in the ordinary way, with a place for each fault.
enum class Seed { kNone, kNoBarrier, kTail, kMask, kUninitialised, kDiverging, kExchange, kDynamic };

template <Seed kSeed>
__global__ void __launch_bounds__(kThreads) sum_kernel(const int* values, int count, int* sums) {
  TRAINOPT_SHARED(int, partial, kWarps);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  int sum = i < count ? values[i] : 0;
  if (kSeed == Seed::kMask) {
    // The upper half does not come.
    if (threadIdx.x % 32 < 16) sum += __shfl_xor_sync(kAll, sum, 8);
  } else if (kSeed == Seed::kExchange) {
    sum += __shfl_xor_sync(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u, sum, 16);
  } else {
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  }
  const unsigned warp = threadIdx.x / 32;
  const bool writes = kSeed == Seed::kUninitialised ? warp != 1 : true;
  if (threadIdx.x % 32 == 0 && writes) partial[warp] = sum;
  if (kSeed == Seed::kDiverging) {
    if (warp == 0) __syncthreads();
  } else if (kSeed != Seed::kNoBarrier) {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    int total = 0;
    for (int w = 0; w < kWarps + (kSeed == Seed::kTail); ++w) total += partial[static_cast<size_t>(w)];
    sums[blockIdx.x] = total;
  }
}

template <Seed kSeed>
bool gives_right_sums() {
  std::vector<int> values(1000), sums(8, -1), expected(8, 0);
  for (int i = 0; i < 1000; ++i) expected[static_cast<size_t>(i / kThreads)] += values[static_cast<size_t>(i)] = i * i;
  launch("sum", sum_kernel<kSeed>, {8, kThreads}, nullptr, values.data(), 1000, sums.data());
  return sums == expected;
}

// Each thread takes what its neighbour wrote: ordered by a barrier of the block or, inside a warp, of the warp.
template <bool kWarpOnly, bool kOrdered>
__global__ void neighbour_kernel(int* out) {
  TRAINOPT_DYNAMIC_SHARED(int, slots);
  slots[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kOrdered && kWarpOnly) __syncwarp();
  if (kOrdered && !kWarpOnly) __syncthreads();
  const unsigned of = kWarpOnly ? threadIdx.x ^ 1 : (threadIdx.x + 1) % blockDim.x;
  out[threadIdx.x] = slots[of];
}

template <bool kWarpOnly, bool kOrdered>
bool neighbours_are_right(size_t slots) {
  std::vector<int> out(kThreads);
  launch("neighbour", neighbour_kernel<kWarpOnly, kOrdered>, {1, kThreads, slots * sizeof(int)}, nullptr, out.data());
  for (int t = 0; t < kThreads; ++t)
    if (out[static_cast<size_t>(t)] != (kWarpOnly ? t ^ 1 : (t + 1) % kThreads)) return false;
  return true;
}

// Every thread counts; and two threads write one slot.
template <bool kAtomic>
__global__ void count_kernel(unsigned* total) {
  TRAINOPT_SHARED(unsigned, counter, 1);
  if (threadIdx.x == 0) counter[0] = 0u;
  __syncthreads();
  if (kAtomic) {
    atomicAdd(&counter[0], 1u);
  } else {
    counter[0] += 1u;
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(total, static_cast<unsigned>(counter[0]));
}

__global__ void vote_kernel(unsigned* out) {
  const bool odd = threadIdx.x % 2 == 1;
  const bool right =
      __ballot_sync(kAll, odd) == 0xaaaaaaaau && __any_sync(kAll, odd) && !__all_sync(kAll, odd) &&
      __all_sync(kAll, true) && !__any_sync(kAll, false) && __reduce_add_sync(kAll, threadIdx.x % 32) == 496 &&
      __reduce_max_sync(kAll, threadIdx.x % 32) == 31 && __shfl_sync(kAll, threadIdx.x % 32, 7) == 7 &&
      __shfl_down_sync(kAll, threadIdx.x % 32, 30) ==
          (threadIdx.x % 32 < 2 ? threadIdx.x % 32 + 30 : threadIdx.x % 32) &&
      __shfl_up_sync(kAll, threadIdx.x % 32, 30) == (threadIdx.x % 32 < 30 ? threadIdx.x % 32 : threadIdx.x % 32 - 30);
  atomicAdd(out, right ? 1u : 0u);
}

__global__ void greedy_kernel() {
  TRAINOPT_SHARED(double, much, 6145);
  much[threadIdx.x] = 0.0;
}

__global__ void copy_kernel(const unsigned* from, unsigned* to) {
  reinterpret_cast<uint4*>(to)[threadIdx.x] = reinterpret_cast<const uint4*>(from)[threadIdx.x];
}

// The words' copy, from and to so many numbers behind an aligned address.
bool copies_words(int from, int to) {
  alignas(16) unsigned source[20], target[20] = {};
  for (unsigned i = 0; i < 20; ++i) source[i] = i;
  launch("copy", copy_kernel, {1, 4}, nullptr, source + from, target + to);
  return std::equal(source + from, source + from + 16, target + to);
}

void test_all() {
  check(gives_right_sums<Seed::kNone>() && found_nothing(), "the kernel without a fault");
  gives_right_sums<Seed::kNoBarrier>();
  check(found(simt::FaultKind::kRace), "a missing barrier");
  gives_right_sums<Seed::kTail>();
  check(found(simt::FaultKind::kOutOfBounds), "one slot too many");
  gives_right_sums<Seed::kMask>();
  check(found(simt::FaultKind::kWarp), "a mask with lanes that do not come");
  gives_right_sums<Seed::kExchange>();
  check(found(simt::FaultKind::kWarp), "a lane outside the mask is asked");
  check(!gives_right_sums<Seed::kUninitialised>() && found(simt::FaultKind::kUninitialised),
        "a slot that is read before it is set");
  gives_right_sums<Seed::kDiverging>();
  check(found(simt::FaultKind::kBarrier), "a barrier that only one warp reaches");

  check(neighbours_are_right<false, true>(kThreads) && found_nothing(), "neighbours with a barrier");
  check(neighbours_are_right<true, true>(kThreads) && found_nothing(), "neighbours in a warp with its barrier");
  neighbours_are_right<true, false>(kThreads);
  check(found(simt::FaultKind::kRace), "neighbours in a warp without its barrier");
  neighbours_are_right<false, true>(kThreads - 1);
  check(found(simt::FaultKind::kOutOfBounds), "too little dynamic shared memory");

  unsigned total = 0;
  launch("count", count_kernel<true>, {3, kThreads}, nullptr, &total);
  check(total == 3 * kThreads && found_nothing(), "atomic counting");
  launch("count", count_kernel<false>, {1, kThreads}, nullptr, &total);
  check(found(simt::FaultKind::kRace), "counting without atomics");

  unsigned right = 0;
  launch("vote", vote_kernel, {1, kThreads}, nullptr, &right);
  check(right == kThreads && found_nothing(), "votes, reductions and shuffles");

  check(copies_words(0, 4) && found_nothing(), "words that are aligned");
#if !defined(__SANITIZE_ADDRESS__)  // the sanitizer of undefined behaviour stops at these
  check(copies_words(1, 0) && found(simt::FaultKind::kAlignment), "an unaligned word is loaded");
  check(copies_words(0, 1) && found(simt::FaultKind::kAlignment), "an unaligned word is stored");
#endif

  launch("greedy", greedy_kernel, {1, kThreads}, nullptr);
  check(found(simt::FaultKind::kLaunch), "more shared memory than there is");
  launch("vote", vote_kernel, {1, 1025}, nullptr, &right);
  check(found(simt::FaultKind::kLaunch), "more threads than a block may have");
  launch("vote", vote_kernel, {0, 32}, nullptr, &right);
  check(found(simt::FaultKind::kLaunch), "a grid of no blocks");
  launch("vote", vote_kernel, {(int64_t{1} << 32) + 1, 32}, nullptr, &right);
  check(found(simt::FaultKind::kLaunch), "a grid of too many blocks");
}

// Streams -------------------------------------------------------------------------------------------------------------

using trainopt::cuda::Stream;

__global__ void set_kernel(int* to, int value) {
  if (threadIdx.x == 0) *to = value;
}

__global__ void assign_kernel(const int* from, int* to) {
  if (threadIdx.x == 0) *to = *from;
}

// No default streams.
char handles[2];
const Stream kOne = reinterpret_cast<Stream>(&handles[0]), kOther = reinterpret_cast<Stream>(&handles[1]);

void set(int& to, int value, Stream stream) { launch("set", set_kernel, {1, 32}, stream, &to, value); }
void assign(int& to, int& from, Stream stream) { launch("assign", assign_kernel, {1, 32}, stream, &from, &to); }

bool throws(const std::string& message, const std::function<void()>& work) {
  try {
    work();
  } catch (const std::runtime_error& error) {
    return std::string(error.what()).find(message) != std::string::npos;
  }
  return false;
}

enum class OrderSeed { kNone, kNoWait, kOtherStream, kEarlyEvent, kNoSynchronisation };

// What one stream has written is taken by the other, and read by the host.
bool hands_over(OrderSeed seed) {
  int first = 0, second = 0;
  simt::Event event = simt::record(kOne);
  set(first, 1, kOne);
  if (seed != OrderSeed::kEarlyEvent) event = simt::record(kOne);
  if (seed != OrderSeed::kNoWait) simt::wait(kOther, event);
  assign(second, first, seed == OrderSeed::kOtherStream ? kOne : kOther);
  if (seed != OrderSeed::kNoSynchronisation) simt::finish_stream(kOther);
  const bool good = second == 1;
  simt::finish_all();
  return good;
}

// Memory that is given back on one stream while the other still reads it.
bool is_kept_long_enough(bool is_told_of_the_other) {
  int memory = 0, found = 0;
  set(memory, 1, kOne);
  simt::wait(kOther, simt::record(kOne));
  assign(found, memory, kOther);
  std::vector<simt::Event> users{simt::last_issued(kOne)};
  if (is_told_of_the_other) users.push_back(simt::last_issued(kOther));
  simt::enqueue_after(users, [&] { memory = -1; });
  simt::finish_all();
  return found == 1 && memory == -1;
}

// A graph of two streams, of which each replay has another number to copy.
bool graph_copies(bool reads_by_host, bool joins) {
  int number = 5, between = 0, found = 0;
  simt::begin_capture(kOne);
  if (reads_by_host) {
    set(between, number, kOne);
  } else {
    assign(between, number, kOne);
  }
  simt::wait(kOther, simt::record(kOne));
  assign(found, between, kOther);
  if (joins) simt::wait(kOne, simt::record(kOther));
  const std::shared_ptr<simt::Graph> graph = simt::end_capture(kOne);
  bool good = found == 0;
  for (number = 6; number < 9; ++number) {
    simt::replay(graph, kOther);
    simt::finish_stream(kOther);
    good = good && found == number;
  }
  return good;
}

// Does something that a capture does not permit, and ends it.
bool is_refused(const std::string& message, const std::function<void()>& work) {
  simt::begin_capture(kOne);
  const bool good = throws(message, work) && throws("previous error", [] { simt::end_capture(kOne); });
  return good && !simt::is_any_capturing();
}

void test_order() {
  check(hands_over(OrderSeed::kNone) && found_nothing(), "streams that an event orders");
  check(!hands_over(OrderSeed::kNoWait), "an event that nobody waits for");
  check(!hands_over(OrderSeed::kOtherStream), "a stream mistaken");
  check(!hands_over(OrderSeed::kEarlyEvent), "an event that is recorded too early");
  check(!hands_over(OrderSeed::kNoSynchronisation), "a host that does not wait");
  check(is_kept_long_enough(true), "memory that both streams are known to use");
  check(!is_kept_long_enough(false), "memory given back while another stream uses it");

  check(graph_copies(false, true) && found_nothing(), "a graph of two streams");
  check(!graph_copies(true, true), "a graph that keeps a host's value");
  check(throws("unjoined work", [] { graph_copies(false, false); }), "a graph of which a stream does not come back");
  int number = 0;
  check(is_refused("not permitted", [] { simt::finish_stream(kOne); }), "a captured stream is waited for");
  check(is_refused("not permitted", [] { simt::finish_streams([](const void*) { return true; }); }),
        "a device is waited for");
  check(is_refused("not permitted", [] { simt::query(simt::record(kOne)); }), "a captured event is asked for");
  check(is_refused("legacy", [&] { set(number, 1, reinterpret_cast<Stream>(1)); }), "work on the legacy stream");
  const simt::Event before = simt::record(kOther);
  check(is_refused("uncaptured", [&] { simt::wait(kOne, before); }), "an event from before the capture");
  simt::finish_all();
  check(number == 0, "what is refused is not done");
}

}  // namespace

int main() {
  for (const simt::Order order : {simt::Order::kAscending, simt::Order::kDescending}) {
    simt::set_order(order);
    test_all();
  }
  for (const uint64_t seed : {0, 0}) {  // twice: nothing is left behind
    simt::set_seed(seed);
    test_order();
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
