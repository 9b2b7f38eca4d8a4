// Cross-entropy with a thread a row: where the same class of neighbouring rows lies side by side, as in images, and
// where there are too few classes for more threads.
#include "cuda/cross_entropy_kernels.h"
#include "cuda/cross_entropy_row.h"

namespace trainopt::cuda {
namespace {

constexpr int kColumnThreads = 128;

// Blocks that a multiprocessor should hold at least: it bounds the registers of a thread, at 128 and 255.
template <class S>
constexpr int kMinBlocks = sizeof(S) == sizeof(float) ? 4 : 2;

template <class Use>
__device__ __forceinline__ void for_each_item(int64_t classes, Use use) {
  for (int64_t at = 0; at < classes; at += kItem)
    // tests break this: a column's part, one class short
    use(Strided{at, classes - at < kItem ? static_cast<int>(classes - at) : kItem});
}

// A block's rows follow each other, and so do those of a warp at one time.
template <class Use>
__device__ __forceinline__ void for_each_row(int64_t rows, int64_t each, Use use) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kColumnThreads * each;
  for (int64_t i = 0; i < each; ++i) {
    const int64_t row = first + i * kColumnThreads + threadIdx.x;
    if (row < rows) use(row);
  }
}

template <class S>
__global__ void __launch_bounds__(kColumnThreads, kMinBlocks<S>)
    cross_entropy_column_kernel(const RowsWork __grid_constant__ work, const Constants<S> __grid_constant__ constants,
                                int64_t each) {
  if (is_done(work)) return;
  const CrossEntropyTask& task = work.task;
  const Scales<S> scales(work, constants);
  LossSums all;
  for_each_row(task.rows, each, [&](int64_t row) {
    const int64_t start = start_of(task, task.logits, row);
    const int64_t probabilities_start = start_of(task, task.probabilities, row);
    const RowTarget<S> target(task, label_at(task, row));
    RowSums<S, double> sums;  // one thread may have very many classes
    if (!work.forward) {
      sums.largest = static_cast<S>(task.peak[row]);
      sums.exponentials = task.sum[row];
      if (task.labels == nullptr)
        for_each_item(task.classes, [&](const Strided& item) {
          S masses[kItem];
          load_masses(task, constants, probabilities_start, item, masses);
          sums.mass += static_cast<double>(sum_of(masses));
        });
    } else {
      const S logit = target.logit(task, constants, row);
      if (target.ignored) {
        sums.set_ignored();
      } else {
        for_each_item(task.classes,
                      [&](const Strided& item) { sums.add(task, constants, start, probabilities_start, item); });
      }
      finish_row(work, constants, row, sums, target, logit, all);
    }
    if (work.gradient.data == nullptr) return;
    const RowGradient<S> of_row(work, scales, row, sums.largest, static_cast<S>(sums.exponentials), target,
                                static_cast<S>(sums.mass));
    const int64_t gradient_start = start_of(task, work.gradient, row);
    for_each_item(task.classes, [&](const Strided& item) {
      of_row.write(work, constants, start, probabilities_start, gradient_start, item);
    });
  });
  if (work.forward) write_partial<kColumnThreads / 32>(work, all);
}

template <class S>
void start(const RowsWork& work, const Sharing& sharing, Stream stream) {
  launch("cross_entropy_column", cross_entropy_column_kernel<S>, {sharing.blocks, sharing.threads}, stream, work,
         Constants<S>(work.task), sharing.each);
}

}  // namespace

void rows_by_column(const RowsWork& work, const Sharing& sharing, Stream stream) {
  (work.task.is_float64 ? start<double> : start<float>)(work, sharing, stream);
}

}  // namespace trainopt::cuda
