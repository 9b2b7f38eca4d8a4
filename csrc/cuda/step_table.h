// The lists of tensors that the kernels of a step work on, and how the host fills them: a kernel for each rule, set of
// states and way in which a parameter's tensors are stored.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/access.h"
#include "cuda/engine.h"
#include "cuda/table.h"
#include "rules/rules.h"

namespace trainopt::cuda {
namespace {

// The tensors of one parameter: the parameter itself, its gradient, its states.
template <int kRoles>
struct Row {
  void* data[kRoles];
  int64_t numel;
  uint32_t prepared, tensor;
  DType dtype[kRoles];
  bool vectorisable;  // all of them
};

// Of tensors of any types.
template <int kRoles>
struct MixedRow : Row<kRoles> {
  void* beside[kRoles];  // the second parts of tensors that have two; null: that one is whole
};

// Of tensors that are not one run in memory: with where their elements lie.
template <int kRoles>
struct StridedRow : MixedRow<kRoles> {
  Layout layout[kRoles];  // of no dimensions: one run
  ShardLayout shard;      // where the elements lie in the whole; of no dimensions: that they are
};

// What the step does for a parameter beside its rule.
struct Tail {
  void* average;  // its moving average; null: it has none
  DType average_dtype;
  int64_t stats_place;  // of its first chunk's stats; -1: it is not measured

  __device__ __forceinline__ bool is_measured() const { return stats_place >= 0; }
  __device__ __forceinline__ bool is_used() const { return is_measured() || average != nullptr; }
};
template <int kRoles>
struct MixedTailRow : MixedRow<kRoles>, Tail {};
template <int kRoles>
struct StridedTailRow : StridedRow<kRoles>, Tail {
  Layout average_layout;  // likewise
};

// What the host has prepared travels with the table, so many sets at most in one launch.
template <int kSets>
struct Header {
  Prepared prepared[kSets];
  const Prepared* on_device;  // if not null: these instead
  const float* found_inf;
  StepStats* chunk_stats;  // of all tensors that are measured
};

// Whether the step is left out.
template <class Header>
__device__ __forceinline__ bool is_left_out(const Header& header) {
  return header.found_inf != nullptr && *header.found_inf != 0;  // tests break this: a step after an overflow
}

template <int kSets>
__device__ __forceinline__ const Prepared& prepared_in(const Header<kSets>& header, uint32_t set) {
  return header.on_device != nullptr ? header.on_device[set] : header.prepared[set];
}

// The rule's own scalars.
template <class Rule, class S>
__device__ __forceinline__ typename Rule::template Scalars<S> scalars_in(const Prepared& prepared) {
  typename Rule::template Scalars<S> scalars;
  static_assert(sizeof scalars <= kRuleScalarBytes);
  __builtin_memcpy(&scalars, prepared.scalars.rule, sizeof scalars);
  return scalars;
}

constexpr int kPreparedSets = kParameterBytes > 4096 ? 16 : 4;

// How all tensors of a parameter are stored: as one type; as each tensor's dtype says, some of them in two parts or to
// be rounded at random; the same as that, with layouts. The kernels with a tail move averages and measure as well, for
// which they take more registers. In float64 they do all, for there the others would have no fewer.
struct Mixed {
  template <int kRoles>
  using Row = MixedRow<kRoles>;
};
struct Strided {
  template <int kRoles>
  using Row = StridedRow<kRoles>;
};
struct MixedTail {
  template <int kRoles>
  using Row = MixedTailRow<kRoles>;
};
struct StridedTail {
  template <int kRoles>
  using Row = StridedTailRow<kRoles>;
};
template <class Storage>
constexpr bool kHasTail = std::is_same_v<Storage, MixedTail> || std::is_same_v<Storage, StridedTail>;
template <class Storage>
constexpr bool kIsStrided = std::is_same_v<Storage, Strided> || std::is_same_v<Storage, StridedTail>;
// Whether a warp takes whole blocks of 256 elements, as codes have to be.
template <class Storage>
constexpr bool kIsByBlocks = std::is_same_v<Storage, Mixed> || kIsStrided<Storage> || kHasTail<Storage>;
template <class Storage>
constexpr bool kIsOneType = !kIsByBlocks<Storage>;

template <class Storage, int kRoles, class = void>
struct RowFor {
  using type = Row<kRoles>;
};
template <class Storage, int kRoles>
struct RowFor<Storage, kRoles, std::enable_if_t<kIsByBlocks<Storage>>> {
  using type = typename Storage::template Row<kRoles>;
};
template <class Storage, int kRoles>
using RowOf = typename RowFor<Storage, kRoles>::type;
template <class Storage>
constexpr int kSetsOf = kIsStrided<Storage> ? 1 : kPreparedSets;
template <class Storage, int kRoles>
using TableOf = Table<Header<kSetsOf<Storage>>, RowOf<Storage, kRoles>, kParameterBytes>;

// Where element i of a row's tensor lies.
template <int kRoles>
__device__ __forceinline__ int64_t place_of(const MixedRow<kRoles>&, int, int64_t i) {
  return i;
}
template <int kRoles>
__device__ __forceinline__ int64_t place_of(const StridedRow<kRoles>& row, int role, int64_t i) {
  return row.layout[role].ndim == 0 ? i : offset_of(row.layout[role], i);
}

// On the host -------------------------------------------------------------------------------------------------------

// The tensors of a task in the order of their roles, with its states up to so many.
struct Roles {
  const TensorView* view[2 + kMaxStates];
  int count = 2;

  Roles(const TensorTask& task, int states) : view{&task.param, &task.gradient} {
    for (int s = 0; s < states; ++s)
      if (task.state[s].data != nullptr) view[count++] = &task.state[s];
  }
};

// How a task's tensors are stored.
enum class StoredAs : uint8_t { kFloat32, kBFloat16, kFloat16, kMixed, kStrided, kMixedTail, kStridedTail };

template <class S>
StoredAs stored_as(const TensorTask& task, const Roles& roles, const TensorView& average) {
  const DType dtype = task.param.dtype;
  const bool has_tail = sizeof(S) == sizeof(double) || average.data != nullptr || task.is_measured;
  bool strided = task.shard != nullptr || average.layout != nullptr;
  bool same = !has_tail && !(task.rounds_at_random && is_16_bit(dtype));
  for (int r = 0; r < roles.count; ++r) {
    const TensorView& view = *roles.view[r];
    strided = strided || view.layout != nullptr;
    same = same && view.dtype == dtype && is_vectorisable<S>(view);
  }
  if (strided) return has_tail ? StoredAs::kStridedTail : StoredAs::kStrided;
  if (has_tail) return StoredAs::kMixedTail;
  return !same                       ? StoredAs::kMixed
         : dtype == DType::kFloat32  ? StoredAs::kFloat32
         : dtype == DType::kBFloat16 ? StoredAs::kBFloat16
         : dtype == DType::kFloat16  ? StoredAs::kFloat16
                                     : StoredAs::kMixed;
}

// Which kernel a task is for.
struct Kind {
  StateSet states;
  StoredAs stored;

  bool operator==(const Kind& other) const { return states == other.states && stored == other.stored; }
};

// Fills a row with tensors of a task, in the order of their roles.
template <class S, class RowType>
void describe(const TensorTask& task, const TensorView* const* views, RowType* row) {
  constexpr int kRoles = sizeof(row->data) / sizeof(row->data[0]);
  row->numel = task.numel;
  row->tensor = task.tensor;
  row->vectorisable = true;
  for (int r = 0; r < kRoles; ++r) {
    const TensorView& view = *views[r];
    row->data[r] = view.data;
    row->dtype[r] = view.dtype;
    row->vectorisable = row->vectorisable && is_vectorisable<S>(view);
    if constexpr (std::is_base_of_v<MixedRow<kRoles>, RowType>) row->beside[r] = view.beside;
    if constexpr (std::is_base_of_v<StridedRow<kRoles>, RowType>)
      row->layout[r] = view.layout != nullptr ? *view.layout : Layout{};
  }
  if constexpr (std::is_base_of_v<StridedRow<kRoles>, RowType>)
    row->shard = task.shard != nullptr ? *task.shard : ShardLayout{};
}

// Fills tables with the tasks that take any blocks, by blocks(t), and hands each to start(table, blocks, sets): of the
// prepared scalars, which are those that it holds. fill(row, t) completes a row; which of them are its is written here.
template <class Table, class Blocks, class Fill, class Start>
void fill_tables(const Update& work, Table& table, Blocks blocks, Fill fill, Start start) {
  constexpr uint32_t kSets = sizeof(Table::header.prepared) / sizeof(Prepared);
  table.header.on_device = work.prepared_on_device ? work.prepared : nullptr;
  table.header.found_inf = work.found_inf;
  uint32_t sets[kSets] = {}, set_count = 0;  // what is in the table
  const auto hand_over = [&](const Table& full, int64_t total) {
    start(full, total, std::vector<uint32_t>(sets, sets + set_count));
    set_count = 0;
  };
  Filler<Table, decltype(hand_over)> filler(table, hand_over);
  for (size_t t = 0; t < work.count; ++t) {
    const int64_t needed = blocks(t);
    if (needed == 0) continue;
    filler.make_room(needed);
    uint32_t set = work.tasks[t].prepared;
    if (!work.prepared_on_device) {
      // The last first: they are nearly always the ones.
      for (set = set_count; set > 0 && sets[set - 1] != work.tasks[t].prepared;) --set;
      if (set == 0) {
        if (set_count == kSets) filler.flush();
        table.header.prepared[set_count] = work.prepared[work.tasks[t].prepared];
        sets[set_count] = work.tasks[t].prepared;
        set = ++set_count;
      }
      --set;
    }
    auto& row = filler.add(needed);
    row.prepared = set;  // tests break this: scalars of another group
    fill(row, t);
  }
  filler.flush();
}

// Calls use(set, storage, kinds, mine) for each kind of which there are tasks. Products of rows' and columns' numbers
// are of no type that the others could be of.
template <class Rule, class S, class Use>
void for_each_kind(const Update& work, Use use) {
  std::vector<Kind> kinds;
  kinds.reserve(work.count);
  for (size_t t = 0; t < work.count; ++t) {
    const TensorTask& task = work.tasks[t];
    const Roles roles(task, kStateCount<Rule>);
    kinds.push_back({states_of<Rule>(task), stored_as<S>(task, roles, task.state[kAverage<Rule>])});
  }
  for_each_set<Rule>([&](auto set) {
    constexpr bool kIsFactored = (decltype(set)::kSet & kFactorStates<Rule>) != 0;
    const auto run = [&](auto storage, StoredAs stored) {
      const Kind mine{decltype(set)::kSet, stored};
      if (std::find(kinds.begin(), kinds.end(), mine) != kinds.end()) use(set, storage, kinds, mine);
    };
    if constexpr (sizeof(S) == sizeof(float) && !kIsFactored) {
      run(float(), StoredAs::kFloat32);
      run(BFloat16(), StoredAs::kBFloat16);
      run(Float16(), StoredAs::kFloat16);
    }
    if constexpr (sizeof(S) == sizeof(float)) {
      run(Mixed(), StoredAs::kMixed);
      run(Strided(), StoredAs::kStrided);
    }
    run(MixedTail(), StoredAs::kMixedTail);
    run(StridedTail(), StoredAs::kStridedTail);
  });
}

}  // namespace
}  // namespace trainopt::cuda
