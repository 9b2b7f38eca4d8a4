// Cross-entropy around its row kernels: what is counted before, what is put together after.
#include "cuda/access.h"
#include "cuda/cross_entropy.h"
#include "cuda/cross_entropy_kernels.h"
#include "cuda/reduce.h"

namespace trainopt::cuda {
namespace {

constexpr int kWarps = 16, kCountThreads = 32 * kWarps;
constexpr int64_t kLabelsPerBlock = 8192, kMostCountBlocks = 256;

// Three numbers of all threads, summed; thread 0 has the result.
__device__ __forceinline__ CountPartial sum_block(CountPartial sums) {
  const auto plus = [](double a, double b) { return a + b; };
  TRAINOPT_SHARED(double, denominators, kWarps);
  TRAINOPT_SHARED(double, counts, kWarps);
  TRAINOPT_SHARED(double, weights, kWarps);
  return {combine_block<kWarps>(sums.denominator, denominators, plus), combine_block<kWarps>(sums.rows, counts, plus),
          combine_block<kWarps>(sums.weight, weights, plus)};
}

__device__ __forceinline__ TargetTotals totals_of(const CountPartial& sums, bool mean, bool defer) {
  if (!mean) return {1, 1, sums.weight, 1};
  if (!defer) return {1 / sums.denominator, 1 / sums.rows, sums.weight, 1};
  const double rest = sums.rows == 0 ? 0 : 1 / sums.denominator;
  return {1, sums.denominator / sums.rows, sums.weight, rest};
}

// A block counts a run of `each` labels; the first adds up the classes' weights too. One block alone writes the totals.
template <class S>
__global__ void __launch_bounds__(kCountThreads)
    cross_entropy_count_kernel(const CountWork __grid_constant__ work, int64_t each) {
  const CrossEntropyTask& task = work.task;
  const S* weight = static_cast<const S*>(task.weight);
  CountPartial sums{0, 0, 0};
  const int64_t first = static_cast<int64_t>(blockIdx.x) * each;
  const int64_t last = first + each < task.rows ? first + each : task.rows;
#pragma unroll 8
  for (int64_t row = first + threadIdx.x; row < last; row += kCountThreads) {
    const int64_t label = task.labels == nullptr ? 0 : task.labels[row];
    if (task.labels != nullptr && label == task.ignore_index) continue;
    sums.rows += 1;
    if (task.labels == nullptr || weight == nullptr)
      sums.denominator += 1;
    else if (0 <= label && label < task.classes)
      sums.denominator += static_cast<double>(weight[label]);
  }
  if (blockIdx.x == 0 && weight != nullptr)
    for (int64_t c = threadIdx.x; c < task.classes; c += kCountThreads) sums.weight += static_cast<double>(weight[c]);
  sums = sum_block(sums);
  if (threadIdx.x != 0) return;
  if (weight == nullptr && blockIdx.x == 0) sums.weight = static_cast<double>(task.classes);
  if (gridDim.x == 1)
    *work.out = totals_of(sums, work.mean, work.defer);
  else
    work.partials[blockIdx.x] = sums;
}

__global__ void __launch_bounds__(kCountThreads)
    cross_entropy_count_finish_kernel(const CountPartial* partials, int64_t count, bool mean, bool defer,
                                      TargetTotals* out) {
  CountPartial sums{0, 0, 0};
  if (threadIdx.x < count) sums = partials[threadIdx.x];  // tests break this: labels that are not counted
  sums = sum_block(sums);
  if (threadIdx.x == 0) *out = totals_of(sums, mean, defer);
}

__device__ void report(const FinishWork& work, int64_t row) {
  BadTarget& bad = *work.bad;
  bad.value = work.labels[row];
  bad.classes = work.classes;
  bad.ndim = work.ndim;
  for (int d = work.ndim - 1; d >= 0; --d) {
    bad.position[d] = row % work.sizes[d];
    row /= work.sizes[d];
  }
  __threadfence_system();
  bad.found = 1;
}

// One block adds up what the row kernels' blocks have left.
__global__ void __launch_bounds__(kCountThreads)
    cross_entropy_loss_finish_kernel(const FinishWork __grid_constant__ work) {
  double loss = 0, z = 0;
  CountPartial counts{0, 0, 0};
  int64_t bad = kNoRow;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < work.count; i += kCountThreads) {
    const LossPartial& partial = work.partials[i];
    loss += partial.loss;
    z += partial.z;
    counts.denominator += partial.denominator;
    counts.rows += partial.rows;
    bad = partial.bad < bad ? partial.bad : bad;
  }
  const auto plus = [](double a, double b) { return a + b; };
  TRAINOPT_SHARED(double, losses, kWarps);
  TRAINOPT_SHARED(double, z_losses, kWarps);
  TRAINOPT_SHARED(int64_t, first_bad, kWarps);
  counts = sum_block(counts);
  loss = combine_block<kWarps>(loss, losses, plus);
  z = combine_block<kWarps>(z, z_losses, plus);
  bad = combine_block<kWarps>(bad, first_bad, [](int64_t a, int64_t b) { return b < a ? b : a; });
  if (threadIdx.x != 0) return;
  if (bad != kNoRow && work.bad != nullptr) report(work, bad);
  if (work.reduction == Reduction::kNone) return;
  if (work.reduction == Reduction::kMean && !(work.empty_is_zero && counts.rows == 0)) {
    loss /= counts.denominator;
    z /= counts.rows;
  }
  store_one(work.loss.data, work.loss.dtype, 0, loss + z);
  if (work.z.data != nullptr) store_one(work.z.data, work.z.dtype, 0, z);
}

constexpr int64_t ceiling(int64_t a, int64_t b) { return a / b + (a % b != 0); }

}  // namespace

// Counted in 32 bits, with room for a batch behind the last.
constexpr int64_t kMostPlainClasses = int64_t{1} << 30;

bool is_plain(const CrossEntropyTask& task) {
  return !task.is_float64 && task.labels != nullptr && task.softcap == 0 && task.temperature == 1 &&
         (task.smoothing == 0 || task.weight == nullptr) && task.classes <= kMostPlainClasses;
}

Sharing sharing_of(const CrossEntropyTask& task) {
  constexpr int64_t kFewClasses = 32, kWarpClasses = 1024;
  Sharing result{};
  if (task.inner > 1 || task.classes <= kFewClasses) {
    result = {Sharing::kThread, 128, 128, 1, 1};
  } else if (task.classes <= kWarpClasses) {
    result = {Sharing::kWarp, 256, 8, 1, 1};
  } else {
    // Up to 256 bytes a thread, which is several times what it has under way: fewer threads have more to do between the
    // barriers of a row.
    constexpr int64_t kThreadBytes = 256;
    int threads = 128;
    while (threads < 1024 && threads * kThreadBytes < task.classes * size_of(task.logits.dtype)) threads *= 2;
    result = {Sharing::kBlock, threads, 1, 1, 1};
  }
  result.each = ceiling(task.rows, result.at_once * kMostBlocks);
  result.blocks = ceiling(task.rows, result.at_once * result.each);
  return result;
}

int64_t count_blocks(int64_t rows) {
  const int64_t blocks = ceiling(rows, kLabelsPerBlock);
  return blocks < 1 ? 1 : blocks < kMostCountBlocks ? blocks : kMostCountBlocks;
}

void count_targets(const CountWork& work, Stream stream) {
  const int64_t blocks = count_blocks(work.task.rows), each = ceiling(work.task.rows, blocks);
  launch("cross_entropy_count",
         work.task.is_float64 ? cross_entropy_count_kernel<double> : cross_entropy_count_kernel<float>,
         {blocks, kCountThreads}, stream, work, each);
  if (blocks > 1)
    launch("cross_entropy_count_finish", cross_entropy_count_finish_kernel, {1, kCountThreads}, stream, work.partials,
           blocks, work.mean, work.defer, work.out);
}

int64_t rows_blocks(const CrossEntropyTask& task) { return task.rows == 0 ? 0 : sharing_of(task).blocks; }

void cross_entropy_rows(const RowsWork& work, Stream stream) {
  if (work.task.rows == 0 || (!work.forward && work.task.classes == 0)) return;
  Sharing sharing = sharing_of(work.task);
  if (work.unless_one) {
    // Most such launches have nothing to do, and so few blocks to start.
    constexpr int64_t kFewBlocks = 1024;
    sharing.each = ceiling(work.task.rows, sharing.at_once * kFewBlocks);
    sharing.blocks = ceiling(work.task.rows, sharing.at_once * sharing.each);
  }
  (sharing.way == Sharing::kThread ? rows_by_column : rows_by_row)(work, sharing, stream);
}

void cross_entropy_finish(const FinishWork& work, Stream stream) {
  launch("cross_entropy_loss_finish", cross_entropy_loss_finish_kernel, {1, kCountThreads}, stream, work);
}

}  // namespace trainopt::cuda
