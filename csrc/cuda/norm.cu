#include "core/math.h"
#include "cuda/access.h"
#include "cuda/launch.h"
#include "cuda/norm.h"
#include "cuda/reduce.h"
#include "cuda/table.h"

namespace trainopt::cuda {
namespace {

static_assert(kNormChunk == kChunk);

constexpr int kWarps = kThreads / 32;

struct Row {
  void* data;
  int64_t numel, first_chunk;
  uint32_t tensor;
  DType dtype;
  bool vectorisable;
};
struct StridedRow : Row {
  Layout layout;
};
template <bool kStrided>
using RowOf = std::conditional_t<kStrided, StridedRow, Row>;

struct NormHeader {
  double* partials;
  int64_t* first_chunk;
  Norm norm;
};
struct ClipHeader {
  const double* total;
  double max_norm;
};
template <class Header, bool kStrided>
using TableOf = Table<Header, RowOf<kStrided>, kParameterBytes>;

template <class S>
__device__ __forceinline__ S size_of_value(S x) {
  return x < S(0) ? -x : x;
}

// The same order of additions in every thread, whatever the result's type.
template <class S>
__device__ __forceinline__ S combine_item(Norm norm, const S (&value)[kItem]) {
  S part[kItem];
#pragma unroll
  for (int i = 0; i < kItem; ++i) part[i] = norm == Norm::kSquares ? value[i] * value[i] : size_of_value(value[i]);
#pragma unroll
  for (int width = kItem / 2; width > 0; width /= 2)
#pragma unroll
    for (int i = 0; i < width; ++i)
      part[i] = norm == Norm::kLargest ? maximum(part[i], part[i + width]) : part[i] + part[i + width];
  return part[0];
}

// Eight elements, in float where that loses nothing but roundings: most GPUs are slow in double. What has overflowed,
// or come near the smallest numbers, is summed again in double.
__device__ __forceinline__ double sum_item(Norm norm, const float (&value)[kItem]) {
  const float sum = combine_item(norm, value);
  if (norm == Norm::kLargest || (sum > 1e-30f && sum < 3e38f)) return static_cast<double>(sum);
  double wide[kItem];
#pragma unroll
  for (int i = 0; i < kItem; ++i) wide[i] = static_cast<double>(value[i]);
  return combine_item(norm, wide);
}
__device__ __forceinline__ double sum_item(Norm norm, const double (&value)[kItem]) {
  const double plain = combine_item(norm, value);
  if (norm != Norm::kSquares || holds_squares(plain)) return plain;
  const double scale = square_scale(plain);
  double scaled[kItem];
#pragma unroll
  for (int i = 0; i < kItem; ++i) scaled[i] = value[i] * scale;
  return keep_scaled_squares(combine_item(norm, scaled), scale);
}

struct Chunk {
  int64_t begin, end;
};

template <class Row>
__device__ __forceinline__ Chunk chunk_of(const Row& row, int32_t first, int32_t block) {
  const int64_t begin = static_cast<int64_t>(block - first) * kChunk;
  return {begin, begin + kChunk < row.numel ? begin + kChunk : row.numel};
}

template <bool kStrided>
__device__ __forceinline__ int64_t place_of(const RowOf<kStrided>& row, int64_t i) {
  if constexpr (kStrided) return offset_of(row.layout, i);
  return i;
}

// One block sums one chunk. S is float for all types but float64.
template <class S, bool kStrided>
__global__ void __launch_bounds__(kThreads)
    partial_kernel(const TableOf<NormHeader, kStrided> __grid_constant__ table) {
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const RowOf<kStrided>& row = table.rows[index];
  const Norm norm = table.header.norm;
  const Chunk chunk = chunk_of(row, table.first_chunk[index], static_cast<int32_t>(blockIdx.x));
  double sum = 0;
  for (int64_t i = chunk.begin + static_cast<int64_t>(threadIdx.x) * kItem; i < chunk.end; i += kThreads * kItem) {
    S value[kItem] = {};
    if (row.vectorisable && i + kItem <= chunk.end) {
      widen_words(fetch(row.data, row.dtype, i, S()), row.dtype, value);
    } else {
#pragma unroll
      for (int k = 0; k < kItem; ++k)
        if (i + k < chunk.end) value[k] = load_one<S>(row.data, row.dtype, place_of<kStrided>(row, i + k));
    }
    const double of_item = sum_item(norm, value);
    sum = sizeof(S) == sizeof(float) && norm != Norm::kLargest ? sum + of_item : combine(norm, sum, of_item);
  }
  TRAINOPT_SHARED(double, of_warp, kWarps);
  sum = combine_block<kWarps>(sum, of_warp, [norm](double a, double b) { return combine(norm, a, b); });
  if (threadIdx.x == 0) {
    table.header.partials[row.first_chunk + chunk.begin / kChunk] = sum;
    if (chunk.begin == 0) table.header.first_chunk[row.tensor] = row.first_chunk;
  }
}

constexpr int kFinishWarps = 16;

// One block combines all: each warp takes tensors in turn, then the block takes the tensors' sums.
__global__ void __launch_bounds__(32 * kFinishWarps)
    finish_kernel(Norm norm, const double* partials, int64_t chunks, const int64_t* first_chunk, int64_t tensors,
                  double* of_tensor, double* total, TensorView rounded) {
  const auto both = [norm](double a, double b) { return combine(norm, a, b); };
  const unsigned lane = threadIdx.x % 32;
  double all = 0;
  for (int64_t t = threadIdx.x / 32; t < tensors; t += kFinishWarps) {
    const int64_t end = t + 1 < tensors ? first_chunk[t + 1] : chunks;
    double sum = 0;
    for (int64_t c = first_chunk[t] + lane; c < end; c += 32) sum = combine(norm, sum, partials[c]);
    sum = combine_warp(sum, both);
    if (lane != 0) continue;
    of_tensor[t] = root(norm, sum);
    all = combine(norm, all, sum);
  }
  TRAINOPT_SHARED(double, of_warp, kFinishWarps);
  all = combine_block<kFinishWarps>(all, of_warp, both);
  if (threadIdx.x != 0) return;
  const double result = root(norm, all);
  *total = result;
  if (rounded.data != nullptr) store_one(rounded.data, rounded.dtype, 0, result);
}

// One block scales one chunk.
template <class S, bool kStrided>
__global__ void __launch_bounds__(kThreads) clip_kernel(const TableOf<ClipHeader, kStrided> __grid_constant__ table) {
  const ClipFactors factors = clip_factors(*table.header.total, table.header.max_norm);
  if (factors.change_nothing()) return;
  const S first = static_cast<S>(factors.first), second = static_cast<S>(factors.second);
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const RowOf<kStrided>& row = table.rows[index];
  const Chunk chunk = chunk_of(row, table.first_chunk[index], static_cast<int32_t>(blockIdx.x));
  int64_t rest = chunk.begin;
  if (row.vectorisable) {
    rest += (chunk.end - chunk.begin) / kItem * kItem;
    for (int64_t i = chunk.begin + static_cast<int64_t>(threadIdx.x) * kItem; i < rest; i += kThreads * kItem) {
      S value[kItem];
      widen_words(fetch(row.data, row.dtype, i, S()), row.dtype, value);
#pragma unroll
      for (int k = 0; k < kItem; ++k) value[k] = value[k] * first * second;
      store_item(row.data, row.dtype, i, value);
    }
  }
  for (int64_t i = rest + threadIdx.x; i < chunk.end; i += kThreads) {
    const int64_t place = place_of<kStrided>(row, i);
    store_one(row.data, row.dtype, place, load_one<S>(row.data, row.dtype, place) * first * second);
  }
}

// On the host -------------------------------------------------------------------------------------------------------

// Fills tables with the tensors of one arithmetic, and with layouts or without, and hands them to `start`.
template <class Header, bool kStrided, class Start>
void for_each_table(const NormTensor* tensors, size_t count, bool wide, bool with_empty, const Header& header,
                    Start start) {
  using Table = TableOf<Header, kStrided>;
  static_assert(sizeof(Table) <= kParameterBytes);
  Table table;
  table.header = header;
  Filler<Table, Start> filler(table, start);
  int64_t first_chunk = 0;
  for (size_t t = 0; t < count; ++t) {
    const auto& [view, numel] = tensors[t];
    const int64_t first = first_chunk, chunks = norm_chunks(numel);
    first_chunk += chunks;
    if ((view.dtype == DType::kFloat64) != wide || (view.layout != nullptr) != kStrided) continue;
    if (numel == 0 && !with_empty) continue;
    filler.make_room(chunks);
    RowOf<kStrided>& row = filler.add(chunks);
    row.data = view.data;
    row.numel = numel;
    row.first_chunk = first;
    row.tensor = static_cast<uint32_t>(t);
    row.dtype = view.dtype;
    row.vectorisable = is_vectorisable(view);
    if constexpr (kStrided) row.layout = *view.layout;
  }
  filler.flush();
}

template <class S, bool kStrided>
void partials_of(const NormWork& work, Stream stream) {
  const NormHeader header{work.partials, work.first_chunk, work.norm};
  for_each_table<NormHeader, kStrided>(work.tensors, work.count, sizeof(S) == sizeof(double), true, header,
                                       [&](const auto& table, int64_t chunks) {
                                         launch(partial_kernel<S, kStrided>, {chunks, kThreads}, stream, table);
                                       });
}

template <class S, bool kStrided>
void clip_those(const NormTensor* tensors, size_t count, const ClipHeader& header, Stream stream) {
  for_each_table<ClipHeader, kStrided>(
      tensors, count, sizeof(S) == sizeof(double), false, header,
      [&](const auto& table, int64_t chunks) { launch(clip_kernel<S, kStrided>, {chunks, kThreads}, stream, table); });
}

}  // namespace

void norm(const NormWork& work, Stream stream) {
  partials_of<float, false>(work, stream);
  partials_of<float, true>(work, stream);
  partials_of<double, false>(work, stream);
  partials_of<double, true>(work, stream);
  int64_t chunks = 0;
  for (size_t t = 0; t < work.count; ++t) chunks += norm_chunks(work.tensors[t].numel);
  launch(finish_kernel, {1, 32 * kFinishWarps}, stream, work.norm, work.partials, chunks, work.first_chunk,
         static_cast<int64_t>(work.count), work.of_tensor, work.total, work.rounded);
}

void clip(const NormTensor* tensors, size_t count, const double* total, double max_norm, Stream stream) {
  const ClipHeader header{total, max_norm};
  clip_those<float, false>(tensors, count, header, stream);
  clip_those<float, true>(tensors, count, header, stream);
  clip_those<double, false>(tensors, count, header, stream);
  clip_those<double, true>(tensors, count, header, stream);
}

}  // namespace trainopt::cuda
