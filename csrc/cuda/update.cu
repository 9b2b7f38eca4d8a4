#include <cstddef>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/access.h"
#include "cuda/blocks.h"
#include "cuda/engine.h"
#include "cuda/launch.h"
#include "cuda/random.h"
#include "cuda/stats.h"
#include "cuda/step_table.h"
#include "cuda/table.h"
#include "rules/rules.h"

namespace trainopt::cuda {
namespace {

// All that is the same for the elements of a chunk.
template <class Rule, class S, class Storage, StateSet kSet>
struct Chunk {
  static constexpr int kRoles = 2 + count_of(kSet);
  void* data[kRoles];  // in registers: what the table says would be read again after each store
  Stages<S> stages;
  typename Rule::template Scalars<S> scalars;
  uint32_t step, tensor;

  __device__ __forceinline__ Chunk(const Row<kRoles>& row, const Prepared& prepared)
      : stages(stages_of(prepared.scalars, S())),
        scalars(scalars_in<Rule, S>(prepared)),
        step(prepared.step),
        tensor(row.tensor) {
#pragma unroll
    for (int r = 0; r < kRoles; ++r) data[r] = row.data[r];
  }

  // Element i of each tensor, in the arithmetic's type. kPlain: as for step_elements, and the gradient stays as it is.
  template <bool kPlain, int kCount>
  __device__ __forceinline__ void step_value(S (&value)[kRoles][kCount], int i, S noise) const {
    S state[kStateCount<Rule>] = {};
    int role = 2;
#pragma unroll
    for (int s = 0; s < kStateCount<Rule>; ++s)
      if (contains(kSet, s)) state[s] = value[role++][i];
    step_elements<Rule, kPlain>(stages, scalars, value[0][i], value[1][i], state, noise);
    role = 2;
#pragma unroll
    for (int s = 0; s < kStateCount<Rule>; ++s)
      if (contains(kSet, s)) value[role++][i] = state[s];
  }

  // The roles of states that are only read.
  TRAINOPT_INLINE static constexpr uint32_t constant_roles() {
    uint32_t roles = 0;
    for (int s = 0, role = 2; s < kStateCount<Rule>; ++s)
      if (contains(kSet, s)) roles |= static_cast<uint32_t>(contains(kConstantStates<Rule>, s)) << role++;
    return roles;
  }
  __device__ __forceinline__ bool writes(int role) const {
    constexpr uint32_t kConstantRoles = constant_roles();
    return role == 1 ? stages.write_gradient : !contains(kConstantRoles, role);
  }
  // tests break this: a gradient that is not cleared
  __device__ __forceinline__ bool clears(int role) const { return role == 1 && stages.clear_gradient; }

  // The words of a batch, all of one type: all of them are under way before the first is waited for. Each is worked on
  // in its place, 4 bytes of every tensor at a time, which takes few registers.
  template <bool kPlain, int kWords>
  __device__ __forceinline__ void step_words(const Batch<kWords, kPerWord<Storage>>& batch) const {
    using T = Storage;
    constexpr int kCount = sizeof(uint32_t) / sizeof(T);  // of 4 bytes
    uint32_t part[kWords][kRoles][4];
#pragma unroll
    for (int w = 0; w < kWords; ++w)
#pragma unroll
      for (int r = 0; r < kRoles; ++r)
        if (batch.has(w)) load_word<T>(data[r], batch.at(w), part[w][r]);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (!batch.has(w)) break;
      S noise[4] = {};
#pragma unroll
      for (int i = 0; i < 4 * kCount; i += kCount) {
        if constexpr (!kPlain)
          if (i % 4 == 0 && stages.noisy) gaussian_quad(noise, stages, step, tensor, batch.at(w) + i);
        S value[kRoles][kCount];
#pragma unroll
        for (int r = 0; r < kRoles; ++r) unpack_part(part[w][r][i / kCount], T(), value[r]);
#pragma unroll
        for (int k = 0; k < kCount; ++k) step_value<kPlain>(value, k, noise[(i + k) % 4]);
#pragma unroll
        for (int r = 0; r < kRoles; ++r) part[w][r][i / kCount] = pack_part(value[r], T());
      }
#pragma unroll
      for (int r = 0; r < kRoles; ++r) {
        if (!writes(r) || (kPlain && r == 1)) continue;
        // Here, and not among the stages: there nvcc 13.0 spills 16 bytes of Lion's registers.
        if (clears(r))
#pragma unroll
          for (int i = 0; i < 4; ++i) part[w][r][i] = 0;
        store_word<T>(data[r], batch.at(w), part[w][r]);
      }
    }
  }

  template <bool kPlain>
  __device__ __forceinline__ void step_one(int64_t at) const {
    S value[kRoles][1], noise = 0;
#pragma unroll
    for (int r = 0; r < kRoles; ++r) value[r][0] = load_one<S>(data[r], dtype_of(Storage()), at);
    if constexpr (!kPlain)
      if (stages.noisy) noise = static_cast<S>(gaussian_one(stages.seed, step, tensor, at));
    step_value<kPlain>(value, 0, noise);
#pragma unroll
    for (int r = 0; r < kRoles; ++r)
      if (writes(r) && !(kPlain && r == 1)) store_one(data[r], dtype_of(Storage()), at, clears(r) ? S(0) : value[r][0]);
  }

  // Elements [at, end) of a run: by words as far as they go, then one by one.
  template <bool kPlain>
  __device__ __forceinline__ void step_run(int64_t at, int64_t end) const {
    // Words of each tensor under way: 32 bytes; and 16 where there is noise to be made, or the like, for twice as many
    // elements.
    constexpr int kEach = kPerWord<Storage>, kWords = kPlain || kEach <= 4 ? 2 : 1;
    const int64_t whole = at + (end - at) / kEach * kEach;
    for_each_batch<kWords, kEach, kThreads>(at, whole,
                                            [&](const Batch<kWords, kEach>& batch) { step_words<kPlain>(batch); });
    // tests break this: a step's tail, one element too long
    for (at = whole + threadIdx.x; at < end; at += kThreads) step_one<kPlain>(at);
  }
};

// Blocks that a multiprocessor should hold at least: it bounds the registers of a thread, at 80, 128 and 255. As many
// as it can do without spilling any.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kFewRolesBlocks = 2;  // with three, nvcc 13.0 spills 12 bytes of a bfloat16 gradient descent
#else
constexpr int kFewRolesBlocks = 3;
#endif
// Of tensors of any types five or more spill with two blocks: 48 bytes of Adam's with three states, for sm_90.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
template <class Rule>
constexpr int kMostRolesWithTwo = std::is_same_v<Rule, Adafactor> ? 2  // 80 bytes, likewise
                                  : std::is_same_v<Rule, Adamax>  ? 3  // 16
                                                                  : 4;
#else
template <class Rule>
constexpr int kMostRolesWithTwo = 4;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
template <class Rule, class Storage>
constexpr bool kSpillsWithThree = std::is_same_v<Rule, Lion> && std::is_same_v<Storage, float>;  // 8 bytes, likewise
#else
template <class Rule, class Storage>
constexpr bool kSpillsWithThree = false;
#endif
template <class Rule, class S, class Storage, int kRoles>
constexpr int kMinBlocks = sizeof(S) == sizeof(double) || kHasTail<Storage>                           ? 1
                           : kSpillsWithThree<Rule, Storage>                                          ? 2
                           : kIsOneType<Storage> && kRoles < 5                                        ? kFewRolesBlocks
                           : kRoles < 7 && (kIsOneType<Storage> || kRoles <= kMostRolesWithTwo<Rule>) ? 2
                                                                                                      : 1;

// The elements of the tensor that this block takes.
struct ChunkRange {
  int64_t at, end;

  template <class Table>
  __device__ __forceinline__ ChunkRange(const Table& table, int index) {
    at = block_in(table, index) * kChunk;
    end = at + kChunk < table.rows[index].numel ? at + kChunk : table.rows[index].numel;
  }
};

// One block, one chunk.
template <class Rule, class S, StateSet kSet, class Storage>
__global__ void __launch_bounds__(kThreads, kMinBlocks<Rule, S, Storage, 2 + count_of(kSet)>)
    update_kernel(const TableOf<Storage, 2 + count_of(kSet)> __grid_constant__ table) {
  const bool left_out = is_left_out(table.header);
  if (!kHasTail<Storage> && left_out) return;
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const auto& row = table.rows[index];
  StepStats stats{};
  if (!left_out) {
    const Chunk<Rule, S, Storage, kSet> chunk(row, prepared_in(table.header, row.prepared));
    const ChunkRange run(table, index);
    if constexpr (kIsByBlocks<Storage>) {
      Blocks<Rule, S, Storage, kSet, decltype(chunk)>{chunk, row, stats}.step(run.at, run.end);
    } else if (chunk.stages.is_plain() && !chunk.stages.write_gradient) {
      chunk.template step_run<true>(run.at, run.end);
    } else {
      chunk.template step_run<false>(run.at, run.end);
    }
  }
  if constexpr (kHasTail<Storage>) {
    if (!row.is_measured()) return;
    const ChunkRange run(table, index);
    if (left_out) see_run<S>(row, run.at, run.end, stats);
    // tests break this: stats of another tensor
    store_of_block(stats, table.header.chunk_stats + row.stats_place + run.at / kChunk);
  }
}

// On the host -------------------------------------------------------------------------------------------------------

// A launch: its table, filled, and what is done with one of its type.
struct Launch {
  std::unique_ptr<std::byte[]> table;
  int64_t chunks;
  std::vector<uint32_t> sets;  // of the prepared scalars, those that the table holds
  void (*start)(const Launch&, const Prepared* prepared, const float* found_inf, StepStats*, Stream);
};

template <class Rule, class S, StateSet kSet, class Storage>
void start_update(const Launch& filled, const Prepared* prepared, const float* found_inf, StepStats* chunk_stats,
                  Stream stream) {
  auto& table = *reinterpret_cast<TableOf<Storage, 2 + count_of(kSet)>*>(filled.table.get());
  for (size_t i = 0; i < filled.sets.size(); ++i) table.header.prepared[i] = prepared[filled.sets[i]];
  if (table.header.on_device != nullptr) table.header.on_device = prepared;
  table.header.found_inf = found_inf;
  table.header.chunk_stats = chunk_stats;
  launch("update", update_kernel<Rule, S, kSet, Storage>, {filled.chunks, kThreads}, stream, table);
}

class Launches final : public StepTables {
 public:
  explicit Launches(const Update& work) : places_(work.count), stats_places_(stats_places(work)) {}

  void set_gradient(size_t task, void* data) override {
    const Place& place = places_[task];
    if (place.launch >= 0) std::memcpy(launches_[place.launch].table.get() + place.offset, &data, sizeof data);
  }

  void launch(const Prepared* prepared, const float* found_inf, StepStats* chunk_stats, Stream stream) override {
    for (const Launch& filled : launches_) filled.start(filled, prepared, found_inf, chunk_stats, stream);
  }

  // Fills tables with the tasks of one kind.
  template <class Rule, class S, StateSet kSet, class Storage>
  void add(const Update& work, const std::vector<Kind>& kinds, Kind mine) {
    using Table = TableOf<Storage, 2 + count_of(kSet)>;
    static_assert(sizeof(Table) <= kParameterBytes && std::is_trivially_copyable_v<Table>);
    Table table;
    fill_tables(
        work, table, [&](size_t t) { return kinds[t] == mine ? chunks_of(work.tasks[t].numel) : 0; },
        [&](auto& row, size_t t) {
          describe<S>(work.tasks[t], Roles(work.tasks[t], kStateCount<Rule>).view, &row);
          if constexpr (kHasTail<Storage>)
            describe_tail<S, kIsStrided<Storage>>(work.tasks[t].state[kAverage<Rule>], stats_places_[t], &row);
          const auto* gradient = reinterpret_cast<const std::byte*>(&row.data[1]);
          places_[t] = {static_cast<int32_t>(launches_.size()),
                        static_cast<int32_t>(gradient - reinterpret_cast<const std::byte*>(&table))};
        },
        [&](const Table& full, int64_t chunks, std::vector<uint32_t> sets) {
          Launch& filled = launches_.emplace_back();
          filled.table.reset(new std::byte[sizeof full]);
          const auto* begin = reinterpret_cast<const std::byte*>(&full);
          const auto* end = reinterpret_cast<const std::byte*>(full.rows + full.count);
          std::memcpy(filled.table.get(), begin, static_cast<size_t>(end - begin));
          filled.chunks = chunks;
          filled.sets = std::move(sets);
          filled.start = start_update<Rule, S, kSet, Storage>;
        });
  }

 private:
  // What a row with a tail has beside its tensors.
  template <class S, bool kHasLayouts, class RowType>
  static void describe_tail(const TensorView& average, int64_t stats_place, RowType* row) {
    row->average = average.data;
    row->average_dtype = average.dtype;
    row->stats_place = stats_place;
    row->vectorisable = row->vectorisable && (average.data == nullptr || is_vectorisable<S>(average));
    if constexpr (kHasLayouts) row->average_layout = average.layout != nullptr ? *average.layout : Layout{};
  }

  // Where the address of a task's gradient stands; nowhere for one without elements.
  struct Place {
    int32_t launch = -1, offset = 0;
  };
  std::vector<Launch> launches_;
  std::vector<Place> places_;
  std::vector<int64_t> stats_places_;
};

template <class Rule, class S>
std::unique_ptr<StepTables> fill_all(const Update& work) {
  auto launches = std::make_unique<Launches>(work);
  for_each_kind<Rule, S>(work, [&](auto set, auto storage, const std::vector<Kind>& kinds, Kind mine) {
    launches->template add<Rule, S, decltype(set)::kSet, decltype(storage)>(work, kinds, mine);
  });
  return launches;
}

}  // namespace

std::unique_ptr<StepTables> tables_of(const Update& work) {
  using Function = std::unique_ptr<StepTables> (*)(const Update&);
#define TRAINOPT_TABLES(rule) {fill_all<rule, float>, fill_all<rule, double>},
  static constexpr Function kFill[][2] = {TRAINOPT_FOR_EACH_RULE(TRAINOPT_TABLES)};
#undef TRAINOPT_TABLES
  return kFill[work.rule][work.is_float64](work);
}

void update(const Update& work, StepStats* chunk_stats, Stream stream) {
  tables_of(work)->launch(work.prepared, work.found_inf, chunk_stats, stream);
}

}  // namespace trainopt::cuda
