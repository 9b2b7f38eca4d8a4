// The passes of the reduce phase: what the elements of each tensor add to its sums, in the order of
// core/sum.h, which is the CPU engine's too, and the scalars that follow from them. Nothing waits for the device.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "core/sum.h"
#include "cuda/access.h"
#include "cuda/engine.h"
#include "cuda/factored.h"
#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/reduce.h"
#include "cuda/step_table.h"
#include "cuda/table.h"
#include "cuda/two_parts.h"
#include "rules/rules.h"

namespace trainopt::cuda {
namespace {

constexpr int kWarps = kThreads / 32;
static_assert(kChunk == kSumChunk && kWarps == kSumSegments && kSumLanes == 32);

template <class Base>
struct WithPlace : Base {
  int64_t place;  // of the sums of its first chunk
};
template <class Base>
struct WithPartials : Base {
  Sum* partials;
};
template <class Storage, int kRoles>
using GatherTable = Table<WithPartials<Header<kSetsOf<Storage>>>, WithPlace<RowOf<Storage, kRoles>>, kParameterBytes>;

// Elements of each tensor that a thread has under way, a warp's lanes apart. Single ones, whatever their type: they
// need not be aligned, and a lane of a warp is a lane of the sum.
template <class Storage>
constexpr int kElements = kIsStrided<Storage> ? 1 : 8;

// As in update.cu: of tensors in two parts and four states, nvcc 13.0 spills 24 bytes for sm_100 with two.
template <class S, class Storage, int kRoles>
constexpr int kMinGatherBlocks = sizeof(S) == sizeof(double) || (kIsByBlocks<Storage> && kRoles >= 6) ? 1 : 2;

// Whether a pass reads a role: all but a state that its sums are not made of.
template <class Pass, StateSet kSet>
TRAINOPT_FUNCTION constexpr bool is_gathered(int role) {
  for (int s = 0, r = 2; s < kStateCount<typename Pass::Rule>; ++s)
    if (contains(kSet, s) && r++ == role) return contains(Pass::kStates, s);
  return true;
}

// One block, one chunk; a warp, a segment of it.
template <class Pass, class S, StateSet kSet, class Storage>
__global__ void __launch_bounds__(kThreads, kMinGatherBlocks<S, Storage, 2 + count_of(kSet)>)
    gather_kernel(const GatherTable<Storage, 2 + count_of(kSet)> __grid_constant__ table) {
  using Rule = typename Pass::Rule;
  constexpr int kRoles = 2 + count_of(kSet), kCount = Pass::kCount, kUnderWay = kElements<Storage>;
  if (is_left_out(table.header)) return;
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const auto& row = table.rows[index];
  const Prepared& prepared = prepared_in(table.header, row.prepared);
  const Stages<S> stages = stages_of(prepared.scalars, S());
  auto scalars = scalars_in<Rule, S>(prepared);
  complete_for_tensor<Rule>(scalars, kSet, row.dtype[0], row.numel);  // which of a whole's is for `finish` to know

  const bool reads_param = Pass::kOfParam || stages.adds_parameter();
  const int64_t chunk = block_in(table, index);
  const int64_t begin = chunk * kChunk + threadIdx.x / 32 * kSumSegment;
  const int64_t end = begin + kSumSegment < row.numel ? begin + kSumSegment : row.numel;
  Sum sums[kCount] = {};
  for (int64_t at = begin + threadIdx.x % 32; at < end; at += kSumLanes * kUnderWay) {
    // tests break this: a sum's tail, one element too long
    const int64_t left = (end - at + kSumLanes - 1) / kSumLanes;
    const int count = left < kUnderWay ? static_cast<int>(left) : kUnderWay;
    S value[kRoles][kUnderWay];
#pragma unroll
    for (int r = 0; r < kRoles; ++r) {
      if (r == kFactoredRole<Rule, kSet>) {
        factored_apart(row.data[r], at, kSumLanes, count, value[r]);
        continue;
      }
      if (!is_gathered<Pass, kSet>(r) || (r == 0 && !reads_param)) {
#pragma unroll
        for (int k = 0; k < kUnderWay; ++k) value[r][k] = S(0);
        continue;
      }
      if constexpr (kIsStrided<Storage>) {
        const Layout& layout = row.layout[r];
        const int64_t offset = layout.ndim == 0 ? at : offset_of(layout, at);
        value[r][0] = load_one<S>(row.data[r], row.beside[r], row.dtype[r], offset);
      } else if constexpr (kIsOneType<Storage>) {
        load_apart_of<Storage>(row.data[r], at, kSumLanes, count, S(0), value[r]);
      } else if (row.beside[r] == nullptr) {
        load_apart(row.data[r], row.dtype[r], at, kSumLanes, count, S(0), value[r]);
      } else {
        with_load<S>(row.data[r], row.beside[r], row.dtype[r], [&](auto load) {
#pragma unroll
          for (int k = 0; k < kUnderWay; ++k) value[r][k] = k < count ? load(at + k * kSumLanes) : S(0);
        });
      }
    }
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) {
      if (i >= count) break;
      S state[kStateCount<Rule>] = {};
      int role = 2;
#pragma unroll
      for (int s = 0; s < kStateCount<Rule>; ++s)
        if (contains(kSet, s)) state[s] = value[role++][i];
      Term<S> terms[kCount];
      Pass::template gather<false>(stages, scalars, value[0][i], value[1][i], state, terms);
#pragma unroll
      for (int s = 0; s < kCount; ++s)
        add_term<S>(sums[s], static_cast<double>(terms[s].a) * static_cast<double>(terms[s].b));
    }
  }
  TRAINOPT_SHARED(Sum, of_warp, kWarps);
  const auto both = [](Sum a, Sum b) { return add(a, b); };
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    // tests break this: sums in the slots of another
    if (s > 0) __syncthreads();  // until the last one's slots have been read
    const Sum sum = combine_block<kWarps>(sums[s], of_warp, both);
    if (threadIdx.x == 0) table.header.partials[(row.place + chunk) * kCount + s] = sum;
  }
}

// A tensor's chunks, of which one warp combines the sums.
struct ChunksHeader {
  const Sum* partials;
  Sum* sums;  // of the first row
  const float* found_inf;
  int32_t sum_count;
};
struct ChunksRow {
  int64_t place, chunks;
};
using ChunksTable = Table<ChunksHeader, ChunksRow, kParameterBytes>;

__global__ void __launch_bounds__(32) combine_sums_kernel(const ChunksTable __grid_constant__ table) {
  if (is_left_out(table.header)) return;
  const ChunksRow& row = table.rows[blockIdx.x];
  const int count = table.header.sum_count;
  for (int s = 0; s < count; ++s) {
    Sum sum{0, 0};
    for (int64_t c = threadIdx.x; c < row.chunks; c += kSumLanes)  // tests break this: a chunk's sum that is left out
      sum = add(sum, table.header.partials[(row.place + c) * count + s]);
    sum = combine_warp(sum, [](Sum a, Sum b) { return add(a, b); });
    if (threadIdx.x == 0) table.header.sums[static_cast<int64_t>(blockIdx.x) * count + s] = sum;
  }
}

template <class Base>
struct WithSums : Base {
  const Sum* sums;  // of the first row
  Prepared* out;    // likewise
  int32_t stride;   // between rows' sums; 0 where all have the same
};
struct PlainFinishRow {
  uint32_t prepared;
};
struct NumbersFinishRow : PlainFinishRow {
  bool are_float32;
  Number numbers[kMaxNumbers];
};
// Of a rule whose scalars know their tensor.
struct TensorFinishRow : PlainFinishRow {
  int64_t numel;  // of the whole, of which a task may be a shard
  StateSet states;
  DType dtype;
};
// Of a rule whose sums move its numbers on; the passes after its own leave them.
template <class Pass>
constexpr int kMovedNumbers = 0;
template <class Rule>
constexpr int kMovedNumbers<OwnSums<Rule>> = kNumberCount<Rule>;
template <class Pass>
constexpr bool kKnowsTensor = kFactorStates<typename Pass::Rule> != 0;
template <class Pass>
using FinishRow = std::conditional_t<(kMovedNumbers<Pass> > 0), NumbersFinishRow,
                                     std::conditional_t<kKnowsTensor<Pass>, TensorFinishRow, PlainFinishRow>>;
template <class Pass>
using FinishTable = Table<WithSums<Header<kPreparedSets>>, FinishRow<Pass>, kParameterBytes>;

constexpr int kFinishThreads = 64;

// One thread, one tensor.
template <class Pass, class S>
__global__ void __launch_bounds__(kFinishThreads) apply_sums_kernel(const FinishTable<Pass> __grid_constant__ table) {
  const int i = static_cast<int>(blockIdx.x) * kFinishThreads + static_cast<int>(threadIdx.x);
  if (i >= table.count || is_left_out(table.header)) return;
  const Prepared& prepared = prepared_in(table.header, table.rows[i].prepared);
  Stages<S> stages = stages_of(prepared.scalars, S());
  auto scalars = scalars_in<typename Pass::Rule, S>(prepared);
  if constexpr (kKnowsTensor<Pass>) {
    const TensorFinishRow& row = table.rows[i];
    complete_for_tensor<typename Pass::Rule>(scalars, row.states, row.dtype, row.numel);
  }
  double values[Pass::kCount];
#pragma unroll
  for (int s = 0; s < Pass::kCount; ++s) values[s] = value_of(table.header.sums[i * table.header.stride + s]);
  Numbers numbers{};
  if constexpr (kMovedNumbers<Pass> > 0)
    numbers = load_numbers<kMovedNumbers<Pass>>(table.rows[i].numbers, table.rows[i].are_float32);
  Pass::finish(stages, scalars, values, numbers);  // tests break this: sums that nothing follows from
  if constexpr (kMovedNumbers<Pass> > 0) store_numbers<kMovedNumbers<Pass>>(table.rows[i].numbers, numbers);
  Prepared& out = table.header.out[i];
  stages_of(out.scalars, S()) = stages;
  __builtin_memcpy(out.scalars.rule, &scalars, sizeof scalars);
  out.step = prepared.step;
}

// On the host -------------------------------------------------------------------------------------------------------

void combine_sums(const Update& work, const Sum* partials, Sum* sums, int sum_count, Stream stream) {
  ChunksTable table;
  size_t done = 0;
  const auto start = [&](const ChunksTable& full, int64_t tensors) {
    launch("combine_sums", combine_sums_kernel, {tensors, 32}, stream, full);
    done += static_cast<size_t>(tensors);
  };
  Filler<ChunksTable, decltype(start)> filler(table, start);
  int64_t place = 0;
  for (size_t t = 0; t < work.count; ++t) {
    filler.make_room(1);
    table.header = {partials, sums + done * static_cast<size_t>(sum_count), work.found_inf, sum_count};
    filler.add(1) = {place, chunks_of(work.tasks[t].numel)};
    place += chunks_of(work.tasks[t].numel);
  }
  filler.flush();
}

// Which kernel gathers from tensors that are stored so: it has no tail. Few steps ask which updates agree: that is
// compiled once for all that have no layout.
template <class Pass, class Storage>
struct KernelOf {
  using Whole = std::conditional_t<kIsOneType<Storage>, Storage, Mixed>;
  using type = std::conditional_t<kIsStrided<Storage>, Strided, Whole>;
};
template <class Rule, class Storage>
struct KernelOf<Agreement<Rule>, Storage> {
  using type = std::conditional_t<kIsStrided<Storage>, Strided, Mixed>;
};

template <class Pass, class S>
void gather_all(const Update& work, Sum* partials, Sum* sums, Stream stream) {
  using Rule = typename Pass::Rule;
  std::vector<int64_t> places{0};
  for (size_t t = 0; t < work.count; ++t) places.push_back(places.back() + chunks_of(work.tasks[t].numel));
  for_each_kind<Rule, S>(work, [&](auto set, auto storage, const std::vector<Kind>& kinds, Kind mine) {
    constexpr StateSet kSet = decltype(set)::kSet;
    using Storage = typename KernelOf<Pass, decltype(storage)>::type;
    using Table = GatherTable<Storage, 2 + count_of(kSet)>;
    static_assert(sizeof(Table) <= kParameterBytes);
    Table table;
    table.header.partials = partials;
    fill_tables(
        work, table, [&](size_t t) { return kinds[t] == mine ? chunks_of(work.tasks[t].numel) : 0; },
        [&](auto& row, size_t t) {
          describe<S>(work.tasks[t], Roles(work.tasks[t], kStateCount<Rule>).view, &row);
          row.place = places[t];  // tests break this: sums of another tensor
        },
        [&](const Table& full, int64_t chunks, const std::vector<uint32_t>&) {
          launch("gather", gather_kernel<Pass, S, kSet, Storage>, {chunks, kThreads}, stream, full);
        });
  });
  combine_sums(work, partials, sums, Pass::kCount, stream);
}

template <class Pass, class S>
void finish_all(const Update& work, const Sum* sums, bool of_all, Prepared* out, Stream stream) {
  using Row = FinishRow<Pass>;
  using Table = FinishTable<Pass>;
  static_assert(sizeof(Table) <= kParameterBytes);
  Table table;
  table.header.stride = of_all ? 0 : Pass::kCount;
  table.header.sums = sums;
  table.header.out = out;
  fill_tables(
      work, table, [](size_t) { return int64_t{1}; },
      [&]([[maybe_unused]] Row& row, [[maybe_unused]] size_t t) {
        if constexpr (kMovedNumbers<Pass> > 0) {
          row.are_float32 = work.tasks[t].numbers_are_float32;
          std::copy_n(work.tasks[t].numbers, kMaxNumbers, row.numbers);
        }
        if constexpr (kKnowsTensor<Pass>) {
          row.numel = work.tasks[t].whole_numel();
          row.states = states_of<typename Pass::Rule>(work.tasks[t]);
          row.dtype = work.tasks[t].param.dtype;
        }
      },
      [&](const Table& full, int64_t tensors, const std::vector<uint32_t>&) {
        const int64_t blocks = (tensors + kFinishThreads - 1) / kFinishThreads;
        launch("apply_sums", apply_sums_kernel<Pass, S>, {blocks, kFinishThreads}, stream, full);
        table.header.sums += tensors * table.header.stride;
        table.header.out += tensors;
      });
}

struct Reduction {
  void (*gather)(const Update&, Sum*, Sum*, Stream);
  void (*finish)(const Update&, const Sum*, bool, Prepared*, Stream);
};

template <class Pass, class S>
constexpr Reduction reduction() {
  if constexpr (Pass::kCount > 0) return {gather_all<Pass, S>, finish_all<Pass, S>};
  return {nullptr, nullptr};
}

const Reduction& reduction_of(const Update& work, Pass pass) {
#define TRAINOPT_REDUCTIONS(rule)                                           \
  {{reduction<OwnSums<rule>, float>(), reduction<OwnSums<rule>, double>()}, \
   {reduction<Agreement<rule>, float>(), reduction<Agreement<rule>, double>()}},
  static constexpr Reduction kReductions[][kPasses][2] = {TRAINOPT_FOR_EACH_RULE(TRAINOPT_REDUCTIONS)};
#undef TRAINOPT_REDUCTIONS
  return kReductions[work.rule][pass][work.is_float64];
}

}  // namespace

size_t partial_sums(const Update& work, int sum_count) {
  int64_t chunks = 0;
  for (size_t t = 0; t < work.count; ++t) chunks += chunks_of(work.tasks[t].numel);
  return static_cast<size_t>(chunks) * static_cast<size_t>(sum_count);
}

void gather(const Update& work, Pass pass, Sum* partials, Sum* sums, Stream stream) {
  reduction_of(work, pass).gather(work, partials, sums, stream);
}

void add_over_all(const Update& work, int sum_count, const Sum* sums, Sum* total, Stream stream) {
  // As if the tasks were chunks of one.
  ChunksTable table;
  table.header = {sums, total, work.found_inf, sum_count};
  table.count = 1;
  table.rows[0] = {0, static_cast<int64_t>(work.count)};
  launch("combine_sums", combine_sums_kernel, {1, 32}, stream, table);
}

void finish(const Update& work, Pass pass, const Sum* sums, bool of_all, Prepared* out, Stream stream) {
  reduction_of(work, pass).finish(work, sums, of_all, out, stream);
}

}  // namespace trainopt::cuda
