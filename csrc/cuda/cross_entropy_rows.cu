// Cross-entropy where a row's classes lie side by side, and are more than a few: a warp a row, or a block a row.
#include "cuda/cross_entropy_kernels.h"
#include "cuda/cross_entropy_row.h"

namespace trainopt::cuda {
namespace {

// How many elements of a row come before the first at which all its tensors are aligned to 16 bytes.
struct Head {
  int elements = 0, period = 1;
  bool exists = true;

  __device__ __forceinline__ void align(const Rows& rows, int64_t start) {
    const int shift = rows.dtype == DType::kFloat64 ? 3 : rows.dtype == DType::kFloat32 ? 2 : 1;  // of a size in bytes
    const int mine = static_cast<int>(sizeof(uint4)) >> shift;
    const uint64_t address = reinterpret_cast<uint64_t>(rows.data) + (static_cast<uint64_t>(start) << shift);
    const int wanted = static_cast<int>((0 - address) % sizeof(uint4)) >> shift;
    const int shorter = mine < period ? mine : period;
    if (((wanted ^ elements) & (shorter - 1)) != 0) exists = false;
    if (mine <= period) return;
    elements = wanted;
    period = mine;
  }
};

// Deals a row's classes to its threads: eight at a time in 16-byte words, and those before and after one by one; or, if
// the tensors are not aligned alike, eight that lie so far apart as there are threads.
template <int kRowThreads, class Use>
__device__ __forceinline__ void for_each_item(int64_t classes, const Head& head, int thread, Use use) {
  if (!head.exists) {
    for (int64_t at = thread; at < classes; at += kRowThreads * kItem) {
      const int64_t rest = (classes - at + kRowThreads - 1) / kRowThreads;
      use(Apart<kItem, kRowThreads>{at, rest < kItem ? static_cast<int>(rest) : kItem});
    }
    return;
  }
  const int64_t before = head.elements < classes ? head.elements : classes;
  const int64_t items = (classes - before) / kItem, end = before + items * kItem;
  for (int64_t i = thread; i < items; i += kRowThreads) use(Together{before + i * kItem});
  const int64_t single = thread < before ? thread : end + thread - before;
  if (single < classes && (single < before || single >= end)) use(Apart<1, 1>{single, 1});
}

template <int kRowWarps>
constexpr int kBlockThreads = kRowWarps == 1 ? 256 : 32 * kRowWarps;

// Blocks that a multiprocessor should hold at least: it bounds the registers of a thread, at 128 and 255.
template <class S, int kRowWarps>
constexpr int kMinBlocks = sizeof(S) == sizeof(float) && kBlockThreads<kRowWarps> == 256 ? 2 : 1;

// Which rows a warp or block takes: `each` that follow each other.
struct Share {
  int64_t first, last;

  __device__ __forceinline__ Share(int64_t worker, int64_t each, int64_t rows) : first(worker * each) {
    last = first + each < rows ? first + each : rows;
  }
};

template <class S, int kRowThreads>
__device__ __forceinline__ RowSums<S, S> sum_row(const CrossEntropyTask& task, const Constants<S>& constants,
                                                 int64_t row, int thread) {
  const int64_t start = start_of(task, task.logits, row), probabilities_start = row * task.probabilities.stride;
  Head head;
  head.align(task.logits, start);
  if (task.labels == nullptr) head.align(task.probabilities, probabilities_start);
  RowSums<S, S> sums;
  for_each_item<kRowThreads>(task.classes, head, thread,
                             [&](const auto& item) { sums.add(task, constants, start, probabilities_start, item); });
  return combine_sums(sums, constants.has_mass);
}

template <class S>
__global__ void __launch_bounds__(kBlockThreads<1>, kMinBlocks<S, 1>)
    cross_entropy_warp_forward_kernel(const ForwardWork __grid_constant__ work,
                                      const Constants<S> __grid_constant__ constants, int64_t each) {
  constexpr int kWarps = kBlockThreads<1> / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Share share(static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, each, work.task.rows);
  LossSums all;
  // 32 rows are summed, each to a lane, before all lanes finish theirs.
  for (int64_t first = share.first; first < share.last; first += 32) {
    const int count = static_cast<int>(share.last - first < 32 ? share.last - first : 32);
    RowSums<S, S> mine;
    for (int i = 0; i < count; ++i) {
      const RowSums<S, S> sums = sum_row<S, 32>(work.task, constants, first + i, lane);
      if (i == lane) mine = sums;
    }
    if (lane < count) finish_row(work, constants, first + lane, mine, all);
  }
  write_partial<kWarps>(work, all);
}

template <class S, int kRowWarps>
__global__ void __launch_bounds__(kBlockThreads<kRowWarps>, kMinBlocks<S, kRowWarps>)
    cross_entropy_block_forward_kernel(const ForwardWork __grid_constant__ work,
                                       const Constants<S> __grid_constant__ constants, int64_t each) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  // Two sets, in turn: the next row's sums are written while the last one's may still be read.
  TRAINOPT_SHARED(S, largest, 2 * kRowWarps);
  TRAINOPT_SHARED(S, exponentials, 2 * kRowWarps);
  TRAINOPT_SHARED(S, mass, 2 * kRowWarps);
  TRAINOPT_SHARED(S, mass_times_logit, 2 * kRowWarps);
  const Share share(blockIdx.x, each, work.task.rows);
  LossSums all;
  for (int64_t row = share.first; row < share.last; ++row) {
    RowSums<S, S> sums = sum_row<S, 32 * kRowWarps>(work.task, constants, row, static_cast<int>(threadIdx.x));
    const int set = static_cast<int>(row % 2) * kRowWarps;
    if (lane == 0) {
      largest[set + warp] = sums.largest;
      exponentials[set + warp] = sums.exponentials;
      mass[set + warp] = sums.mass;
      mass_times_logit[set + warp] = sums.mass_times_logit;
    }
    __syncthreads();
    if (warp != 0) continue;
    sums = {};
    if (lane < kRowWarps) {
      sums.largest = largest[set + lane];
      sums.shift = sums.largest == -kInfinity<S> ? S(0) : static_cast<S>(sums.largest);
      sums.exponentials = exponentials[set + lane];
      sums.mass = mass[set + lane];
      sums.mass_times_logit = mass_times_logit[set + lane];
    }
    sums = combine_sums(sums, constants.has_mass);
    if (lane == 0) finish_row(work, constants, row, sums, all);
  }
  if (threadIdx.x == 0) work.partials[blockIdx.x] = {all.loss, all.z, all.denominator, all.rows, all.bad};
}

// The mass of all classes of a row of probabilities, to every thread of the row.
template <class S, int kRowWarps>
__device__ __forceinline__ double total_mass(const CrossEntropyTask& task, const Constants<S>& constants, int64_t row) {
  const auto plus = [](S a, S b) { return a + b; };
  const int64_t start = row * task.probabilities.stride;
  const int thread = static_cast<int>(threadIdx.x % (32 * kRowWarps));
  Head head;
  head.align(task.probabilities, start);
  S sum = 0;
  for_each_item<32 * kRowWarps>(task.classes, head, thread, [&](const auto& item) {
    S mass[std::decay_t<decltype(item)>::kCount];
    load_masses(task, constants, start, item, mass);
    sum += sum_of(mass);
  });
  if constexpr (kRowWarps == 1) {
    return static_cast<double>(combine_warp(sum, plus));
  } else {
    TRAINOPT_SHARED(S, of_warp, kRowWarps);
    TRAINOPT_SHARED(S, of_row, 1);
    __syncthreads();  // the last row's has been read
    sum = combine_block<kRowWarps>(sum, of_warp, plus);
    if (threadIdx.x == 0) of_row[0] = sum;
    __syncthreads();
    return static_cast<double>(static_cast<S>(of_row[0]));
  }
}

template <class S, int kRowWarps>
__global__ void __launch_bounds__(kBlockThreads<kRowWarps>, kMinBlocks<S, kRowWarps>)
    cross_entropy_row_backward_kernel(const BackwardWork __grid_constant__ work,
                                      const Constants<S> __grid_constant__ constants, int64_t each) {
  constexpr int kRowThreads = 32 * kRowWarps, kRowsAtOnce = kBlockThreads<kRowWarps> / kRowThreads;
  const CrossEntropyTask& task = work.task;
  const TargetTotals totals = work.on_device != nullptr ? *work.on_device : work.totals;
  const Share share(static_cast<int64_t>(blockIdx.x) * kRowsAtOnce + threadIdx.x / kRowThreads, each, task.rows);
  for (int64_t row = share.first; row < share.last; ++row) {
    const double mass = task.labels == nullptr ? total_mass<S, kRowWarps>(task, constants, row) : 0;
    const RowSlopes<S> slopes(work, constants, totals, row, mass);
    const int64_t start = start_of(task, task.logits, row), probabilities_start = row * task.probabilities.stride;
    const int64_t gradient_start = row * work.gradient.stride;
    Head head;
    head.align(task.logits, start);
    head.align(work.gradient, gradient_start);
    if (task.labels == nullptr) head.align(task.probabilities, probabilities_start);
    for_each_item<kRowThreads>(task.classes, head, static_cast<int>(threadIdx.x % kRowThreads), [&](const auto& item) {
      slopes.write(work, constants, start, probabilities_start, gradient_start, item);
    });
  }
}

// On the host
// ----------------------------------------------------------------------------------------------------------

template <class S, class Kernel, class Work>
void start(Kernel kernel, const Work& work, const Sharing& sharing, Stream stream) {
  launch(kernel, {sharing.blocks, sharing.threads}, stream, work, Constants<S>(work.task), sharing.each);
}

template <class S>
void forward_of(const ForwardWork& work, const Sharing& sharing, Stream stream) {
  if (sharing.way == Sharing::kWarp) return start<S>(cross_entropy_warp_forward_kernel<S>, work, sharing, stream);
  start<S>(cross_entropy_block_forward_kernel<S, kBlockWarps>, work, sharing, stream);
}

template <class S>
void backward_of(const BackwardWork& work, const Sharing& sharing, Stream stream) {
  if (sharing.way == Sharing::kWarp) return start<S>(cross_entropy_row_backward_kernel<S, 1>, work, sharing, stream);
  start<S>(cross_entropy_row_backward_kernel<S, kBlockWarps>, work, sharing, stream);
}

}  // namespace

void forward_by_row(const ForwardWork& work, const Sharing& sharing, Stream stream) {
  if (work.task.wide) return forward_of<double>(work, sharing, stream);
  if (sharing.way == Sharing::kLargeBlock)
    return start<float>(cross_entropy_block_forward_kernel<float, kLargeBlockWarps>, work, sharing, stream);
  forward_of<float>(work, sharing, stream);
}

void backward_by_row(const BackwardWork& work, const Sharing& sharing, Stream stream) {
  if (work.task.wide) return backward_of<double>(work, sharing, stream);
  if (sharing.way == Sharing::kLargeBlock)
    return start<float>(cross_entropy_row_backward_kernel<float, kLargeBlockWarps>, work, sharing, stream);
  backward_of<float>(work, sharing, stream);
}

}  // namespace trainopt::cuda
