#include <type_traits>

#include "core/math.h"
#include "cuda/access.h"
#include "cuda/launch.h"
#include "cuda/norm.h"
#include "cuda/reduce.h"
#include "cuda/table.h"

namespace trainopt::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

struct Row {
  void* data;
  int64_t numel, first_slot;  // of its chunks' sums; for clipping, of no meaning
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
  Norm norm;
};
struct ClipHeader {
  const double* total;
  double max_norm;
};
struct ClampHeader {
  double limit;
};
template <class Header, bool kStrided>
using TableOf = Table<Header, RowOf<kStrided>, kParameterBytes>;

template <class S>
__device__ __forceinline__ S size_of_value(S x) {
  return x < S(0) ? -x : x;
}

// The same order of additions in every thread, whatever the result's type.
template <Norm kNorm, class S>
__device__ __forceinline__ S combine_item(const S (&value)[kItem]) {
  S part[kItem];
#pragma unroll
  for (int i = 0; i < kItem; ++i) part[i] = kNorm == Norm::kSquares ? value[i] * value[i] : size_of_value(value[i]);
#pragma unroll
  for (int width = kItem / 2; width > 0; width /= 2)
#pragma unroll
    for (int i = 0; i < width; ++i)
      part[i] = kNorm == Norm::kLargest ? maximum(part[i], part[i + width]) : part[i] + part[i + width];
  return part[0];
}

// Eight elements are summed in float where that loses nothing but roundings: most GPUs are slow in double. What has
// overflowed, or come near the smallest numbers, is to be summed again in double.
template <Norm kNorm>
__device__ __forceinline__ bool holds(float sum) {
  return kNorm == Norm::kLargest || (sum > 1e-30f && sum < 3e38f);
}
// The squares of doubles are scaled where they need be: see core/norm.h.
template <Norm kNorm>
__device__ __forceinline__ bool holds(double sum) {
  return kNorm != Norm::kSquares || holds_squares(sum);
}

template <Norm kNorm>
__device__ __forceinline__ double sum_item(const float (&value)[kItem]) {
  const float sum = combine_item<kNorm>(value);
  if (holds<kNorm>(sum)) return static_cast<double>(sum);
  double in_double[kItem];
#pragma unroll
  for (int i = 0; i < kItem; ++i) in_double[i] = static_cast<double>(value[i]);
  return combine_item<kNorm>(in_double);
}
template <Norm kNorm>
__device__ __forceinline__ double sum_item(const double (&value)[kItem]) {
  const double plain = combine_item<kNorm>(value);
  if (holds<kNorm>(plain)) return plain;
  const double scale = square_scale(plain);
  double scaled[kItem];
#pragma unroll
  for (int i = 0; i < kItem; ++i) scaled[i] = value[i] * scale;
  return keep_scaled_squares(combine_item<kNorm>(scaled), scale);
}

// With the sum of an item in arithmetic of type S. That of float32 and smaller types is always a plain one.
template <Norm kNorm, class S>
__device__ __forceinline__ double plus(double sum, double of_item) {
  return sizeof(S) == sizeof(float) && kNorm != Norm::kLargest ? sum + of_item : combine(kNorm, sum, of_item);
}

// A block takes so many bytes, whatever the type: enough for what it costs to start one to be little.
constexpr int64_t kBlockBytes = 65536;

TRAINOPT_FUNCTION int64_t elements_of_block(DType dtype) { return kBlockBytes / size_of(dtype); }

struct Chunk {
  int64_t index, begin, end;
};

template <class Row>
__device__ __forceinline__ Chunk chunk_of(const Row& row, int32_t first, int32_t block) {
  const int64_t size = elements_of_block(row.dtype), index = block - first, begin = index * size;
  return {index, begin, begin + size < row.numel ? begin + size : row.numel};
}

template <bool kStrided>
__device__ __forceinline__ int64_t place_of(const RowOf<kStrided>& row, int64_t i) {
  if constexpr (kStrided) return offset_of(row.layout, i);
  return i;
}

// Words that a thread has under way: 64 bytes.
constexpr int kWords = 4;

// Whether all elements of the words are 0, of either sign.
template <class T, int kCount>
__device__ __forceinline__ bool are_zero(const uint32_t (&word)[kCount][4]) {
  uint32_t bits = 0;
#pragma unroll
  for (int w = 0; w < kCount; ++w)
#pragma unroll
    for (int p = 0; p < 4; ++p)
      bits |= word[w][p] & (sizeof(T) == 2 ? 0x7fff7fffu : sizeof(T) == 4 || p % 2 == 1 ? 0x7fffffffu : 0xffffffffu);
  return bits == 0;
}

// Sums a chunk of elements of type T. Whether a batch is loaded by words, or by elements where they are not aligned,
// not all there, or not what a float holds the sum of, a thread adds the same ones in the same order.
template <Norm kNorm, class T, class S, bool kStrided>
__device__ __forceinline__ double sum_chunk(const RowOf<kStrided>& row, const Chunk& chunk) {
  constexpr int kEach = kPerWord<T>, kItemWords = kItem / kEach, kItems = kWords / kItemWords;
  const T* data = static_cast<const T*>(row.data);
  double sum = 0;
  for_each_batch<kWords, kEach, kThreads>(chunk.begin, chunk.end, [&](const Batch<kWords, kEach>& batch) {
    if (!kStrided && row.vectorisable && batch.at(kWords - 1) + kEach <= chunk.end) {
      uint32_t word[kWords][4];
#pragma unroll
      for (int w = 0; w < kWords; ++w) load_word<T>(data, batch.at(w), word[w]);
      S of_item[kItems];
      bool all_hold = true;
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        S value[kItem];
#pragma unroll
        for (int w = 0; w < kItemWords; ++w) unpack_word(word[item * kItemWords + w], T(), value + w * kEach);
        of_item[item] = combine_item<kNorm>(value);
        all_hold = all_hold && holds<kNorm>(of_item[item]);
      }
      if (all_hold) {
#pragma unroll
        for (int item = 0; item < kItems; ++item) sum = plus<kNorm, S>(sum, static_cast<double>(of_item[item]));
        return;
      }
      if (are_zero<T>(word)) return;
    }
#pragma unroll 1
    for (int item = 0; item < kItems; ++item) {
      S value[kItem] = {};
#pragma unroll
      for (int i = 0; i < kItem; ++i) {
        const int64_t at = batch.at(item * kItemWords + i / kEach) + i % kEach;
        // tests break this: a norm's tail, one element too long
        if (at < chunk.end) value[i] = static_cast<S>(from_stored(data[place_of<kStrided>(row, at)]));
      }
      sum = plus<kNorm, S>(sum, sum_item<kNorm>(value));
    }
  });
  return sum;
}

// Calls use(T()) for the type that a tensor is stored in; S is float for all types but float64.
template <class S, class Use>
__device__ __forceinline__ void with_type(DType dtype, Use use) {
  if constexpr (sizeof(S) == sizeof(double)) {
    use(double());
  } else {
    switch (dtype) {
      case DType::kBFloat16: return use(BFloat16());
      case DType::kFloat16: return use(Float16());
      default: return use(float());
    }
  }
}

// Calls use(std::integral_constant<Norm, ...>()).
template <class Use>
__device__ __forceinline__ void with_norm(Norm norm, Use use) {
  switch (norm) {
    case Norm::kSizes: return use(std::integral_constant<Norm, Norm::kSizes>());
    case Norm::kSquares: return use(std::integral_constant<Norm, Norm::kSquares>());
    case Norm::kLargest: return use(std::integral_constant<Norm, Norm::kLargest>());
  }
}

// One block sums one chunk.
template <class S, bool kStrided>
__global__ void __launch_bounds__(kThreads)
    partial_kernel(const TableOf<NormHeader, kStrided> __grid_constant__ table) {
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const RowOf<kStrided>& row = table.rows[index];
  const Norm norm = table.header.norm;
  const Chunk chunk = chunk_of(row, table.first_chunk[index], static_cast<int32_t>(blockIdx.x));
  double sum = 0;
  with_norm(norm, [&](auto kind) {
    with_type<S>(row.dtype,
                 [&](auto type) { sum = sum_chunk<decltype(kind)::value, decltype(type), S, kStrided>(row, chunk); });
  });
  TRAINOPT_SHARED(double, of_warp, kWarps);
  sum = combine_block<kWarps>(sum, of_warp, [norm](double a, double b) { return combine(norm, a, b); });
  if (threadIdx.x == 0) table.header.partials[row.first_slot + chunk.index] = sum;
}

constexpr int kFinishWarps = 32;

// One block combines what the others have left.
__global__ void __launch_bounds__(32 * kFinishWarps)
    finish_kernel(Norm norm, const double* partials, int64_t count, double* total, TensorView rounded) {
  const auto both = [norm](double a, double b) { return combine(norm, a, b); };
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += 32 * kFinishWarps) sum = combine(norm, sum, partials[i]);
  TRAINOPT_SHARED(double, of_warp, kFinishWarps);
  sum = combine_block<kFinishWarps>(sum, of_warp, both);
  if (threadIdx.x != 0) return;
  const double result = root(norm, sum);
  *total = result;
  if (rounded.data != nullptr) store_one(rounded.data, rounded.dtype, 0, result);
}

// Changes a chunk of elements of type T, by words as far as they go, then one by one: `change` is given each and says
// whether to store it.
template <class T, class S, bool kStrided, class Change>
__device__ __forceinline__ void change_chunk(const RowOf<kStrided>& row, const Chunk& chunk, Change change) {
  constexpr int kEach = kPerWord<T>;
  T* data = static_cast<T*>(row.data);
  int64_t rest = chunk.begin;
  if (!kStrided && row.vectorisable) {
    rest += (chunk.end - chunk.begin) / kEach * kEach;
    for_each_batch<kWords, kEach, kThreads>(chunk.begin, rest, [&](const Batch<kWords, kEach>& batch) {
      uint32_t word[kWords][4];
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        if (batch.has(w)) load_word<T>(data, batch.at(w), word[w]);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        if (!batch.has(w)) break;
        S value[kEach];
        unpack_word(word[w], T(), value);
        bool changed = false;
#pragma unroll
        for (int i = 0; i < kEach; ++i) changed |= change(value[i]);
        if (!changed) continue;
        pack_word(value, T(), word[w]);
        store_word<T>(data, batch.at(w), word[w]);
      }
    });
  }
  for (int64_t i = rest + threadIdx.x; i < chunk.end; i += kThreads) {
    T* at = data + place_of<kStrided>(row, i);
    S value = static_cast<S>(from_stored(*at));
    if (change(value)) store_one(at, value);
  }
}

// The chunk of this block.
template <class S, bool kStrided, class Header, class Change>
__device__ __forceinline__ void change_own_chunk(const TableOf<Header, kStrided>& table, Change change) {
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const RowOf<kStrided>& row = table.rows[index];
  const Chunk chunk = chunk_of(row, table.first_chunk[index], static_cast<int32_t>(blockIdx.x));
  with_type<S>(row.dtype, [&](auto type) { change_chunk<decltype(type), S, kStrided>(row, chunk, change); });
}

template <class S, bool kStrided>
__global__ void __launch_bounds__(kThreads) clip_kernel(const TableOf<ClipHeader, kStrided> __grid_constant__ table) {
  const ClipFactors factors = clip_factors(*table.header.total, table.header.max_norm);
  if (factors.change_nothing()) return;
  const S first = static_cast<S>(factors.first), second = static_cast<S>(factors.second);
  change_own_chunk<S, kStrided, ClipHeader>(table, [&](S& value) {
    value = value * first * second;
    return true;
  });
}

template <class S, bool kStrided>
__global__ void __launch_bounds__(kThreads) clamp_kernel(const TableOf<ClampHeader, kStrided> __grid_constant__ table) {
  const S limit = static_cast<S>(table.header.limit);
  change_own_chunk<S, kStrided, ClampHeader>(table, [&](S& value) {
    const bool is_beyond = value < -limit || value > limit;
    value = clamped(value, limit);
    return is_beyond;
  });
}

// On the host -------------------------------------------------------------------------------------------------------

int64_t chunks_of(const NormTensor& tensor) {
  const int64_t size = elements_of_block(tensor.view.dtype);
  return tensor.numel / size + (tensor.numel % size != 0);
}

// Fills tables with the tensors of one arithmetic, and with layouts or without, and hands them to `start`.
template <class S, class Header, bool kStrided, class Start>
void for_each_table(const NormTensor* tensors, size_t count, const Header& header, Start start) {
  using Table = TableOf<Header, kStrided>;
  static_assert(sizeof(Table) <= kParameterBytes);
  Table table;
  table.header = header;
  Filler<Table, Start> filler(table, start);
  int64_t next_slot = 0;
  for (size_t t = 0; t < count; ++t) {
    const auto& [view, numel] = tensors[t];
    const int64_t first = next_slot, chunks = chunks_of(tensors[t]);
    next_slot += chunks;
    if ((view.dtype == DType::kFloat64) != (sizeof(S) == sizeof(double))) continue;
    if ((view.layout != nullptr) != kStrided || numel == 0) continue;
    filler.make_room(chunks);
    RowOf<kStrided>& row = filler.add(chunks);
    row.data = view.data;
    row.numel = numel;
    row.first_slot = first;
    row.dtype = view.dtype;
    row.vectorisable = is_vectorisable<S>(view);
    if constexpr (kStrided) row.layout = *view.layout;
  }
  filler.flush();
}

// The same for every arithmetic, with layouts and without, whose type and std::bool_constant `start` is given first.
template <class Header, class Start>
void for_every_table(const NormTensor* tensors, size_t count, const Header& header, Start start) {
  const auto those = [&](auto arithmetic, auto strided) {
    for_each_table<decltype(arithmetic), Header, decltype(strided)::value>(
        tensors, count, header, [&](const auto& table, int64_t chunks) { start(arithmetic, strided, table, chunks); });
  };
  those(float(), std::false_type());
  those(float(), std::true_type());
  those(double(), std::false_type());
  those(double(), std::true_type());
}

}  // namespace

int64_t norm_partials(const NormTensor* tensors, size_t count) {
  int64_t chunks = 0;
  for (size_t t = 0; t < count; ++t) chunks += chunks_of(tensors[t]);
  return chunks;
}

void norm(const NormWork& work, Stream stream) {
  for_every_table(work.tensors, work.count, NormHeader{work.partials, work.norm},
                  [&](auto arithmetic, auto strided, const auto& table, int64_t chunks) {
                    launch("norm_partial", partial_kernel<decltype(arithmetic), decltype(strided)::value>,
                           {chunks, kThreads}, stream, table);
                  });
  // tests break this: a stream mistaken
  launch("norm_finish", finish_kernel, {1, 32 * kFinishWarps}, stream, work.norm, work.partials,
         norm_partials(work.tensors, work.count), work.total, work.rounded);
}

void clip(const NormTensor* tensors, size_t count, const double* total, double max_norm, Stream stream) {
  for_every_table(tensors, count, ClipHeader{total, max_norm},
                  [&](auto arithmetic, auto strided, const auto& table, int64_t chunks) {
                    launch("clip", clip_kernel<decltype(arithmetic), decltype(strided)::value>, {chunks, kThreads},
                           stream, table);
                  });
}

void clamp(const NormTensor* tensors, size_t count, double limit, Stream stream) {
  for_every_table(tensors, count, ClampHeader{limit},
                  [&](auto arithmetic, auto strided, const auto& table, int64_t chunks) {
                    launch("clamp", clamp_kernel<decltype(arithmetic), decltype(strided)::value>, {chunks, kThreads},
                           stream, table);
                  });
}

}  // namespace trainopt::cuda
