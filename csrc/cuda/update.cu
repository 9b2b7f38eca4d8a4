#include "core/random.h"
#include "cuda/access.h"
#include "cuda/engine.h"
#include "cuda/launch.h"
#include "cuda/table.h"
#include "rules/rules.h"

namespace trainopt::cuda {
namespace {

// How a tensor is stored, in one byte, and the tensors of one parameter: the parameter itself, its gradient, its
// states.
template <int kRoles>
struct Row {
  void* data[kRoles];
  int64_t numel;
  uint32_t prepared, tensor;
  DType dtype[kRoles];
  bool vectorisable;  // all of them
};

// Of tensors that are not one run in memory: with where their elements lie.
template <int kRoles>
struct StridedRow : Row<kRoles> {
  Layout layout[kRoles];  // of no dimensions: one run
  ShardLayout shard;      // where the elements lie in the whole; of no dimensions: that they are
};

// What the host has prepared travels with the table, so many sets at most in one launch.
template <int kSets>
struct Header {
  Prepared prepared[kSets];
  const Prepared* on_device;  // if not null: these instead
  const float* found_inf;
};

constexpr int kPreparedSets = kParameterBytes > 4096 ? 16 : 4;

template <int kRoles, bool kStrided>
struct TableOf {
  using type = Table<Header<kPreparedSets>, Row<kRoles>, kParameterBytes>;
};
template <int kRoles>
struct TableOf<kRoles, true> {
  using type = Table<Header<1>, StridedRow<kRoles>, kParameterBytes>;
};

// Standard normal values of elements [at, at + 8), `at` a multiple of 8: the CPU engine's own bits.
template <class S>
__device__ __forceinline__ void gaussian_item(S (&out)[kItem], const Stages<S>& stages, uint32_t step, uint32_t tensor,
                                              int64_t at) {
#pragma unroll
  for (int q = 0; q < kItem / 4; ++q) {
    const RandomWords r =
        random_words(stages.seed, step, tensor, RandomStream::kNoise, static_cast<uint64_t>(at / 4 + q));
    const GaussianPair one = gaussian_pair(r.word[0], r.word[1]);
    const GaussianPair two = gaussian_pair(r.word[2], r.word[3]);
    out[4 * q] = static_cast<S>(one.first);
    out[4 * q + 1] = static_cast<S>(one.second);
    out[4 * q + 2] = static_cast<S>(two.first);
    out[4 * q + 3] = static_cast<S>(two.second);
  }
}

__device__ __forceinline__ float gaussian_one(uint64_t seed, uint32_t step, uint32_t tensor, int64_t at) {
  const RandomWords r = random_words(seed, step, tensor, RandomStream::kNoise, static_cast<uint64_t>(at / 4));
  const bool late = (at & 2) != 0;
  const GaussianPair pair = gaussian_pair(late ? r.word[2] : r.word[0], late ? r.word[3] : r.word[1]);
  return (at & 1) != 0 ? pair.second : pair.first;
}

template <class Rule, int kPresent, class S, class Row>
__device__ __forceinline__ void update_item(const Row& row, const Stages<S>& stages,
                                            const typename Rule::template Scalars<S>& scalars, uint32_t step,
                                            int64_t at) {
  constexpr int kRoles = kPresent + 2;
  Words<S> words[kRoles];
#pragma unroll
  for (int r = 0; r < kRoles; ++r) words[r] = fetch(row.data[r], row.dtype[r], at, S());
  S value[kRoles][kItem], noise[kItem] = {};
#pragma unroll
  for (int r = 0; r < kRoles; ++r) widen_words(words[r], row.dtype[r], value[r]);
  if (stages.noisy) gaussian_item(noise, stages, step, row.tensor, at);
#pragma unroll
  for (int i = 0; i < kItem; ++i) {
    S state[kStateCount<Rule>] = {};
#pragma unroll
    for (int s = 0; s < kPresent; ++s) state[s] = value[2 + s][i];
    step_elements<Rule, false>(stages, scalars, value[0][i], value[1][i], state, noise[i]);
#pragma unroll
    for (int s = 0; s < kPresent; ++s) value[2 + s][i] = state[s];
  }
  store_item(row.data[0], row.dtype[0], at, value[0]);
  if (stages.write_gradient) store_item(row.data[1], row.dtype[1], at, value[1]);
#pragma unroll
  for (int s = 0; s < kPresent; ++s) store_item(row.data[2 + s], row.dtype[2 + s], at, value[2 + s]);
}

template <class Rule, int kPresent, class S, class Row, class Place>
__device__ __forceinline__ void update_one(const Row& row, const Stages<S>& stages,
                                           const typename Rule::template Scalars<S>& scalars, uint32_t step, int64_t at,
                                           int64_t in_whole, Place place) {
  S p = load_one<S>(row.data[0], row.dtype[0], place(0, at)), g = load_one<S>(row.data[1], row.dtype[1], place(1, at));
  S state[kStateCount<Rule>] = {};
#pragma unroll
  for (int s = 0; s < kPresent; ++s) state[s] = load_one<S>(row.data[2 + s], row.dtype[2 + s], place(2 + s, at));
  const S noise = stages.noisy ? static_cast<S>(gaussian_one(stages.seed, step, row.tensor, in_whole)) : S(0);
  step_elements<Rule, false>(stages, scalars, p, g, state, noise);
  store_one(row.data[0], row.dtype[0], place(0, at), p);
  if (stages.write_gradient) store_one(row.data[1], row.dtype[1], place(1, at), g);
#pragma unroll
  for (int s = 0; s < kPresent; ++s) store_one(row.data[2 + s], row.dtype[2 + s], place(2 + s, at), state[s]);
}

// Blocks that a multiprocessor should hold at least: it bounds the registers of a thread, at 128 and 255.
template <class S>
constexpr int kMinBlocks = sizeof(S) == sizeof(float) ? 2 : 1;

// One block, one chunk: eight elements a thread where all tensors of the parameter are aligned, then the rest one by
// one, by the same arithmetic.
template <class Rule, class S, int kPresent, bool kStrided>
__global__ void __launch_bounds__(kThreads, kMinBlocks<S>)
    update_kernel(const typename TableOf<kPresent + 2, kStrided>::type __grid_constant__ table) {
  if (table.header.found_inf != nullptr && *table.header.found_inf != 0) return;
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const auto& row = table.rows[index];
  const Prepared* on_device = table.header.on_device;
  const Prepared& prepared = on_device != nullptr ? on_device[row.prepared] : table.header.prepared[row.prepared];
  const Stages<S> stages = stages_of(prepared.scalars, S());
  typename Rule::template Scalars<S> scalars;
  static_assert(sizeof scalars <= kRuleScalarBytes);
  __builtin_memcpy(&scalars, prepared.scalars.rule, sizeof scalars);
  const uint32_t step = prepared.step;

  int64_t at = static_cast<int64_t>(static_cast<int32_t>(blockIdx.x) - table.first_chunk[index]) * kChunk;
  const int64_t end = at + kChunk < row.numel ? at + kChunk : row.numel;
  if constexpr (kStrided) {
    const auto place = [&](int role, int64_t i) {
      return row.layout[role].ndim == 0 ? i : offset_of(row.layout[role], i);
    };
    for (at += threadIdx.x; at < end; at += kThreads) {
      const int64_t in_whole = row.shard.layout.ndim == 0 ? at : row.shard.offset + offset_of(row.shard.layout, at);
      update_one<Rule, kPresent>(row, stages, scalars, step, at, in_whole, place);
    }
  } else {
    if (row.vectorisable) {
      const int64_t whole = at + (end - at) / kItem * kItem;
      for (int64_t i = at + static_cast<int64_t>(threadIdx.x) * kItem; i < whole; i += kThreads * kItem)
        update_item<Rule, kPresent>(row, stages, scalars, step, i);
      at = whole;
    }
    const auto place = [](int, int64_t i) { return i; };
    for (at += threadIdx.x; at < end; at += kThreads)
      update_one<Rule, kPresent>(row, stages, scalars, step, at, at, place);
  }
}

// On the host -------------------------------------------------------------------------------------------------------

const TensorView& role_of(const Task& task, int role) {
  return role == 0 ? task.param : role == 1 ? task.gradient : task.state[role - 2];
}

bool is_strided(const Task& task, int roles) {
  if (task.shard != nullptr) return true;
  for (int r = 0; r < roles; ++r)
    if (role_of(task, r).layout != nullptr) return true;
  return false;
}

// The tasks that have so many of the rule's states, and layouts or none.
template <class Rule, class S, int kPresent, bool kStrided>
void update_those(const Update& work, Stream stream) {
  constexpr int kRoles = kPresent + 2;
  using Table = typename TableOf<kRoles, kStrided>::type;
  static_assert(sizeof(Table) <= kParameterBytes);
  constexpr uint32_t kSets = sizeof(Table::header.prepared) / sizeof(Prepared);

  Table table;
  table.header.on_device = work.prepared_on_device ? work.prepared : nullptr;
  table.header.found_inf = work.found_inf;
  uint32_t sets[kSets] = {}, set_count = 0;  // what is in the table
  const auto start = [&](const Table& full, int64_t chunks) {
    launch(update_kernel<Rule, S, kPresent, kStrided>, {chunks, kThreads}, stream, full);
    set_count = 0;
  };
  Filler<Table, decltype(start)> filler(table, start);

  for (size_t t = 0; t < work.count; ++t) {
    const Task& task = work.tasks[t];
    if (task.numel == 0) continue;
    if ((kPresent == kStateCount<Rule>) != (task.state[kStateCount<Rule> - 1].data != nullptr)) continue;
    if (is_strided(task, kRoles) != kStrided) continue;
    filler.make_room(chunks_of(task.numel));
    uint32_t set = task.prepared;
    if (!work.prepared_on_device) {
      // The last first: they are nearly always the ones.
      for (set = set_count; set > 0 && sets[set - 1] != task.prepared;) --set;
      if (set == 0) {
        if (set_count == kSets) filler.flush();
        table.header.prepared[set_count] = work.prepared[task.prepared];
        sets[set_count] = task.prepared;
        set = ++set_count;
      }
      --set;
    }
    auto& row = filler.add(chunks_of(task.numel));
    row.numel = task.numel;
    row.prepared = set;
    row.tensor = task.tensor;
    row.vectorisable = true;
    for (int r = 0; r < kRoles; ++r) {
      const TensorView& view = role_of(task, r);
      row.data[r] = view.data;
      row.dtype[r] = view.dtype;
      row.vectorisable = row.vectorisable && is_vectorisable(view);
      if constexpr (kStrided) row.layout[r] = view.layout != nullptr ? *view.layout : Layout{};
    }
    if constexpr (kStrided) row.shard = task.shard != nullptr ? *task.shard : ShardLayout{};
  }
  filler.flush();
}

template <class Rule, class S>
void update_all(const Update& work, Stream stream) {
  constexpr int kAll = kStateCount<Rule>;
  update_those<Rule, S, kAll, false>(work, stream);
  update_those<Rule, S, kAll - 1, false>(work, stream);
  update_those<Rule, S, kAll, true>(work, stream);
  update_those<Rule, S, kAll - 1, true>(work, stream);
}

}  // namespace

void update(const Update& work, Stream stream) {
  using Function = void (*)(const Update&, Stream);
#define TRAINOPT_UPDATES(rule) {update_all<rule, float>, update_all<rule, double>},
  static constexpr Function kUpdates[][2] = {TRAINOPT_FOR_EACH_RULE(TRAINOPT_UPDATES)};
#undef TRAINOPT_UPDATES
  kUpdates[work.rule][work.wide](work, stream);
}

}  // namespace trainopt::cuda
