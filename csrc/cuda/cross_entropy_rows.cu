// Cross-entropy where a row's classes lie side by side, and are more than a few: a warp a row, or a block a row.
#include "cuda/cross_entropy_kernels.h"
#include "cuda/cross_entropy_plain.h"
#include "cuda/cross_entropy_row.h"

namespace trainopt::cuda {
namespace {

// Everything that Plain has not: any types, capped or scaled logits, masses of each class.
template <class Arithmetic>
struct General {
  using S = Arithmetic;
  static constexpr int kWords = 1;

  // Deals a row's classes to threads: eight at a time in 16-byte words, and those before and after one by one; or, if
  // the tensors are not aligned alike, one by one.
  template <class Use>
  static __device__ __forceinline__ void for_each_item(int64_t classes, const Head& head, int thread, int threads,
                                                       Use use) {
    const int64_t before = !head.exists || classes < head.elements ? classes : head.elements;
    const int64_t items = (classes - before) / kItem, end = before + items * kItem;
    for (int64_t i = thread; i < items; i += threads) use(Together{before + i * kItem});
    for (int64_t s = thread; s < before + classes - end; s += threads)
      use(Strided{s < before ? s : end + (s - before), 1});
  }

  static __device__ __forceinline__ Head head_of(const RowsWork& work, int64_t row) {
    const CrossEntropyTask& task = work.task;
    Head head;
    head.align(task.logits, start_of(task, task.logits, row));
    if (task.labels == nullptr) head.align(task.probabilities, row * task.probabilities.stride);
    return head;
  }

  static __device__ __forceinline__ RowSums<S> sum_row(const RowsWork& work, const Constants<S>& constants, int64_t row,
                                                       int thread, int threads, const Kept&) {
    const CrossEntropyTask& task = work.task;
    const int64_t start = start_of(task, task.logits, row), probabilities_start = row * task.probabilities.stride;
    RowSums<S> sums;
    for_each_item(task.classes, head_of(work, row), thread, threads,
                  [&](const auto& item) { sums.add(task, constants, start, probabilities_start, item); });
    return sums;
  }

  // For a row whose sums are known, which leaves its masses.
  static __device__ __forceinline__ S sum_masses(const RowsWork& work, const Constants<S>& constants, int64_t row,
                                                 int thread, int threads) {
    const CrossEntropyTask& task = work.task;
    S sum = 0;
    for_each_item(task.classes, head_of(work, row), thread, threads, [&](const auto& item) {
      S mass[std::decay_t<decltype(item)>::kCount];
      load_masses(task, constants, row * task.probabilities.stride, item, mass);
      sum += sum_of(mass);
    });
    return sum;
  }

  static __device__ __forceinline__ void weigh(RowSums<S>&, const Constants<S>&) {}

  static __device__ __forceinline__ void write_row(const RowsWork& work, const Constants<S>& constants,
                                                   const RowGradient<S>& of_row, int64_t row, int thread, int threads,
                                                   const Kept&) {
    const CrossEntropyTask& task = work.task;
    const int64_t start = start_of(task, task.logits, row), probabilities_start = row * task.probabilities.stride;
    for_each_item(task.classes, head_of(work, row), thread, threads, [&](const auto& item) {
      of_row.write(work, constants, start, probabilities_start, row * work.gradient.stride, item);
    });
  }
};

constexpr int64_t kWordBytes = sizeof(uint4);

template <class Way>
constexpr bool kIsGeneral = false;
template <class S>
constexpr bool kIsGeneral<General<S>> = true;

// Threads that a block has at most, and blocks that a multiprocessor should hold at least: they bound the registers of
// a thread.
template <class Way>
constexpr int kMostThreads = !kIsGeneral<Way>                           ? 1024
                             : sizeof(typename Way::S) == sizeof(float) ? 512
                                                                        : 256;
constexpr int kWarpThreads = 256, kMostWarps = 32;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 860
constexpr int kPlainBlocks = 2;  // with three, nvcc 13.0 spills 16-bit rows: 220 bytes for sm_75, 8 for sm_80
#else
constexpr int kPlainBlocks = 3;
#endif
template <class Way>
constexpr int kMinBlocks = !kIsGeneral<Way>                           ? kPlainBlocks
                           : sizeof(typename Way::S) == sizeof(float) ? 2
                                                                      : 1;

// Which rows a warp or block takes: `each` that follow each other.
struct RowRange {
  int64_t first, last;

  __device__ __forceinline__ RowRange(int64_t worker, int64_t each, int64_t rows) : first(worker * each) {
    last = first + each < rows ? first + each : rows;
  }
};

template <class Way>
__global__ void __launch_bounds__(kWarpThreads, kMinBlocks<Way>)
    cross_entropy_warp_kernel(const RowsWork __grid_constant__ work,
                              const Constants<typename Way::S> __grid_constant__ constants, int64_t each,
                              int kept_words) {
  using S = typename Way::S;
  constexpr int kWarps = kWarpThreads / 32;
  if (is_done(work)) return;
  const CrossEntropyTask& task = work.task;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const RowRange range(static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, each, task.rows);
  const Scales<S> scales(work, constants);
  TRAINOPT_DYNAMIC_SHARED(uint4, shared_words);
  const Kept kept{shared_words, static_cast<int>(threadIdx.x), kWarpThreads, kept_words};
  LossSums all;
  // What 32 rows have beside their classes is read, and what comes of their sums is worked out, by a lane each.
  for (int64_t first = range.first; first < range.last; first += 32) {
    const int count = static_cast<int>(range.last - first < 32 ? range.last - first : 32);
    RowTarget<S> my_target;
    RowSums<S> mine;
    S my_logit = 0;
    if (lane < count) {
      my_target = RowTarget<S>(task, label_at(task, first + lane));
      if (work.forward) {
        my_logit = my_target.logit(task, constants, first + lane);
      } else {
        mine.largest = static_cast<S>(task.peak[first + lane]);
        mine.exponentials = static_cast<S>(task.sum[first + lane]);
      }
    }
    for (int i = 0; i < count; ++i) {
      RowTarget<S> target;
      target.label = __shfl_sync(kAllLanes, my_target.label, i);
      target.weight = __shfl_sync(kAllLanes, my_target.weight, i);
      const int flags = __shfl_sync(kAllLanes, my_target.ignored + 2 * my_target.bad, i);
      target.ignored = (flags & 1) != 0;
      target.bad = (flags & 2) != 0;
      RowSums<S> sums;
      if (!work.forward) {
        sums.largest = __shfl_sync(kAllLanes, mine.largest, i);
        sums.exponentials = __shfl_sync(kAllLanes, mine.exponentials, i);
        if constexpr (kIsGeneral<Way>)
          if (task.labels == nullptr)
            sums.mass =
                combine_warp(Way::sum_masses(work, constants, first + i, lane, 32), [](S a, S b) { return a + b; });
      } else if (target.ignored) {
        sums.set_ignored();
      } else {
        sums = combine_sums(Way::sum_row(work, constants, first + i, lane, 32, kept), constants.has_mass);
        Way::weigh(sums, constants);
      }
      if (work.forward && i == lane) mine = sums;
      if (work.gradient.data == nullptr) continue;
      Way::write_row(work, constants,
                     RowGradient<S>(work, scales, first + i, sums.largest, sums.exponentials, target, sums.mass),
                     first + i, lane, 32, kept);
    }
    if (work.forward && lane < count) finish_row(work, constants, first + lane, mine, my_target, my_logit, all);
  }
  if (work.forward) write_partial<kWarps>(work, all);
}

template <class Way>
__global__ void __launch_bounds__(kMostThreads<Way>)
    cross_entropy_block_kernel(const RowsWork __grid_constant__ work,
                               const Constants<typename Way::S> __grid_constant__ constants, int64_t each,
                               int kept_words) {
  using S = typename Way::S;
  if (is_done(work)) return;
  const CrossEntropyTask& task = work.task;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  // Two sets, in turn: the next row's sums are written while the last one's may still be read.
  TRAINOPT_SHARED(S, largest, 2 * kMostWarps);
  TRAINOPT_SHARED(S, exponentials, 2 * kMostWarps);
  TRAINOPT_SHARED(S, mass, 2 * kMostWarps);
  TRAINOPT_SHARED(S, mass_times_logit, 2 * kMostWarps);
  // The sums of all threads, to every thread.
  const auto combine_all = [&](RowSums<S> sums, int64_t row) {
    const int set = static_cast<int>(row % 2) * kMostWarps;  // tests break this: slots of the row before
    sums = combine_sums(sums, constants.has_mass);
    if (lane == 0) {
      largest[set + warp] = sums.largest;
      exponentials[set + warp] = sums.exponentials;
      mass[set + warp] = sums.mass;
      mass_times_logit[set + warp] = sums.mass_times_logit;
    }
    __syncthreads();  // tests break this: a row's missing barrier
    sums = {};
    if (lane < warps) {  // tests break this: slots of the next set
      sums.largest = largest[set + lane];
      sums.shift = sums.largest == -kInfinity<S> ? S(0) : static_cast<S>(sums.largest);
      sums.exponentials = exponentials[set + lane];
      sums.mass = mass[set + lane];
      sums.mass_times_logit = mass_times_logit[set + lane];
    }
    return combine_sums(sums, constants.has_mass);
  };
  TRAINOPT_DYNAMIC_SHARED(uint4, shared_words);
  const Kept kept{shared_words, thread, threads, kept_words};
  const RowRange range(blockIdx.x, each, task.rows);
  const Scales<S> scales(work, constants);
  LossSums all;
  int64_t label = label_at(task, range.first);
  for (int64_t row = range.first; row < range.last; ++row) {
    const RowTarget<S> target(task, label);
    if (row + 1 < range.last) label = label_at(task, row + 1);  // early: the next row waits for it
    RowSums<S> sums;
    if (!work.forward) {
      sums.largest = static_cast<S>(task.peak[row]);
      sums.exponentials = static_cast<S>(task.sum[row]);
      if constexpr (kIsGeneral<Way>) {
        if (task.labels == nullptr) {
          RowSums<S> of_masses;
          of_masses.mass = Way::sum_masses(work, constants, row, thread, threads);
          sums.mass = combine_all(of_masses, row).mass;
        }
      }
    } else {
      // Before a gradient may be written over it.
      const S logit = thread == 0 ? target.logit(task, constants, row) : S(0);
      if (target.ignored) {
        sums.set_ignored();
      } else {
        sums = combine_all(Way::sum_row(work, constants, row, thread, threads, kept), row);
        Way::weigh(sums, constants);
      }
      if (thread == 0) finish_row(work, constants, row, sums, target, logit, all);
    }
    if (work.gradient.data == nullptr) continue;
    Way::write_row(work, constants,
                   RowGradient<S>(work, scales, row, sums.largest, sums.exponentials, target, sums.mass), row, thread,
                   threads, kept);
  }
  if (work.forward && thread == 0) work.partials[blockIdx.x] = {all.loss, all.z, all.denominator, all.rows, all.bad};
}

// On the host -------------------------------------------------------------------------------------------------------

// How many words of a row a thread keeps in shared memory: as many as leave room for all the blocks that a
// multiprocessor has registers for.
template <class Way>
int kept_words(const RowsWork& work, const Sharing& sharing) {
  if (kIsGeneral<Way> || !work.forward || work.gradient.data == nullptr) return 0;
  constexpr int64_t kThreadsAtOnce = 1024, kOfBlock = 2048;  // what a block has beside: its own, and the system's
  const int64_t blocks = kThreadsAtOnce / sharing.threads;
  const int64_t words = (shared_bytes_of_multiprocessor() / blocks - kOfBlock) / (sharing.threads * kWordBytes);
  const int64_t of_row = sharing.way == Sharing::kWarp ? 32 : sharing.threads;
  const int64_t row_words = work.task.classes * size_of(work.task.logits.dtype) / kWordBytes;
  // A whole number of batches.
  const int64_t wanted = (row_words / of_row / Way::kWords + 1) * Way::kWords, most = words / Way::kWords * Way::kWords;
  return static_cast<int>(wanted < most ? wanted : most);
}

template <class Way>
void start(const RowsWork& work, Sharing sharing, Stream stream) {
  if (sharing.threads > kMostThreads<Way>) sharing.threads = kMostThreads<Way>;
  const int kept = kept_words<Way>(work, sharing);
  const bool is_warp = sharing.way == Sharing::kWarp;
  launch(is_warp ? "cross_entropy_warp" : "cross_entropy_block",
         is_warp ? cross_entropy_warp_kernel<Way> : cross_entropy_block_kernel<Way>,
         {sharing.blocks, sharing.threads, static_cast<size_t>(kept * kWordBytes * sharing.threads)}, stream, work,
         Constants<typename Way::S>(work.task), sharing.each, kept);
}

}  // namespace

void rows_by_row(const RowsWork& work, const Sharing& sharing, Stream stream) {
  if (work.task.is_float64) return start<General<double>>(work, sharing, stream);
  const DType from = work.task.logits.dtype, to = work.gradient.data != nullptr ? work.gradient.dtype : from;
  const bool is_known = from == to || (from == DType::kFloat32 && to != DType::kFloat64);
  if (!is_plain(work.task) || !is_known) return start<General<float>>(work, sharing, stream);
  switch (from) {
    case DType::kBFloat16: return start<Plain<BFloat16, BFloat16>>(work, sharing, stream);
    case DType::kFloat16: return start<Plain<Float16, Float16>>(work, sharing, stream);
    default: break;
  }
  switch (to) {
    case DType::kBFloat16: return start<Plain<float, BFloat16>>(work, sharing, stream);
    case DType::kFloat16: return start<Plain<float, Float16>>(work, sharing, stream);
    default: return start<Plain<float, float>>(work, sharing, stream);
  }
}

}  // namespace trainopt::cuda
