#include "cpu/engine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <initializer_list>
#include <iterator>

#include "cpu/kernel_table.h"
#include "cpu/norm.h"

namespace trainopt::cpu {

const bool kAsksAhead = [] {
#if defined(TRAINOPT_X86)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}();

namespace {

template <class S, class R>
void prepare_as(const double* options, const StepInfo& info, Scalars* out, Numbers* numbers) {
  const typename R::template Scalars<S> scalars = prepared_by<R, S>(options, info, *numbers);
  static_assert(sizeof scalars <= kRuleScalarBytes);
  std::memcpy(out->rule, &scalars, sizeof scalars);
  complete_stages<R>(stages_of(*out, S()), scalars);
}

template <class S, class Pass>
void finish_as(const Sum* sums, Scalars* out, Numbers* numbers) {
  double values[kMaxSums];
  for (int s = 0; s < Pass::kCount; ++s) values[s] = value_of(sums[s]);
  typename Pass::Rule::template Scalars<S> scalars;
  std::memcpy(&scalars, out->rule, sizeof scalars);
  Pass::finish(stages_of(*out, S()), scalars, values, *numbers);
  std::memcpy(out->rule, &scalars, sizeof scalars);
}

template <class Pass>
void finish(const Sum* sums, bool is_float64, Scalars* out, Numbers* numbers) {
  is_float64 ? finish_as<double, Pass>(sums, out, numbers) : finish_as<float, Pass>(sums, out, numbers);
}

template <class R, class S>
void complete_as(const TensorTask& task, Scalars* out) {
  typename R::template Scalars<S> scalars;
  std::memcpy(&scalars, out->rule, sizeof scalars);
  complete_for_tensor<R>(scalars, states_of<R>(task), task.param.dtype, task.whole_numel());
  std::memcpy(out->rule, &scalars, sizeof scalars);
}
template <class R>
void complete(const TensorTask& task, bool is_float64, Scalars* out) {
  is_float64 ? complete_as<R, double>(task, out) : complete_as<R, float>(task, out);
}

template <class R, class S>
FactorSettings factor_settings_as(const Scalars& scalars, DType dtype) {
  typename R::template Scalars<S> of_rule;
  std::memcpy(&of_rule, scalars.rule, sizeof of_rule);
  return {of_rule.weight, R::eps1_of(of_rule, dtype)};
}
template <class R>
FactorSettings factor_settings(const Scalars& scalars, bool is_float64, DType dtype) {
  return is_float64 ? factor_settings_as<R, double>(scalars, dtype) : factor_settings_as<R, float>(scalars, dtype);
}

// Options that call for states for which there is no kernel are not taken.
template <class R>
bool takes(const double* options) {
  bool has_kernel = false;
  const StateSet needed = states_of_one(R::states_needed(options), kFactorStates<R>, 1);
  for_each_set<R>([&](auto set) { has_kernel = has_kernel || needed == decltype(set)::kSet; });
  return has_kernel && R::takes(options);
}

template <class R>
constexpr Rule describe(int index) {
  static_assert(sizeof(R::kOptions) / sizeof(R::kOptions[0]) <= kMaxOptions);
  static_assert(kStateCount<R> <= kMaxStates && kSumCount<R> <= kMaxSums && kNumberCount<R> <= kMaxNumbers);
  Rule rule{R::kName,
            R::kOptions,
            sizeof(R::kOptions) / sizeof(R::kOptions[0]),
            kTrueOptions<R>,
            kOptionsOrNone<R>,
            R::kStates,
            kStateCount<R>,
            kUnsignedStates<R>,
            kFactorStates<R>,
            nullptr,
            kSumCount<R>,
            kSumsAreOverAll<R>,
            nullptr,
            kNumberCount<R>,
            R::kCountsSteps,
            kAlwaysNeedsLr<R>,
            kHasDifferentiable<R>,
            R::states_needed,
            numbers_needed_by<R>,
            takes<R>,
            R::decay,
            rate_of<R>,
            [](const double* options, const StepInfo& info, bool is_float64, Scalars* out, Numbers* numbers) {
              is_float64 ? prepare_as<double, R>(options, info, out, numbers)
                         : prepare_as<float, R>(options, info, out, numbers);
            },
            {nullptr, finish<Agreement<R>>},
            nullptr,
            nullptr,
            index};
  if constexpr (kSumCount<R> > 0) {
    rule.sums = R::kSums;
    rule.finish[kOwnSums] = finish<OwnSums<R>>;
  }
  if constexpr (kNumberCount<R> > 0) rule.numbers = R::kNumbers;
  if constexpr (kFactorStates<R> != 0) {
    rule.complete = complete<R>;
    rule.factor_settings = factor_settings<R>;
  }
  return rule;
}

enum RuleIndex {
#define TRAINOPT_INDEX(rule) k##rule##Index,
  TRAINOPT_FOR_EACH_RULE(TRAINOPT_INDEX)
#undef TRAINOPT_INDEX
};

constexpr Rule kRuleList[] = {
#define TRAINOPT_DESCRIBE(rule) describe<rule>(k##rule##Index),
    TRAINOPT_FOR_EACH_RULE(TRAINOPT_DESCRIBE)
#undef TRAINOPT_DESCRIBE
};

Variant best_variant() {
  for (int v = kVariants - 1; v > 0; --v)
    if (supported(static_cast<Variant>(v))) return static_cast<Variant>(v);
  return Variant::kBaseline;
}

const KernelTable& table_of(Variant variant) {
#if defined(TRAINOPT_X86)
  if (variant == Variant::kAvx512) return kAvx512Kernels;
  if (variant == Variant::kAvx2) return kAvx2Kernels;
#endif
  (void)variant;
  return kBaselineKernels;
}

// Asks for the first lines of a task's tensors: the processor's own prefetching begins anew with each tensor.
void prefetch_start(const TensorTask& task, int views) {
  constexpr int kLines = 4;
  const auto ask = [](const void* data) {
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(static_cast<const char*>(data) + 64 * line, 1);
  };
  ask(task.param.data);
  ask(task.gradient.data);
  for (int s = 0; s < views; ++s)
    if (task.state[s].data != nullptr) ask(task.state[s].data);
}

// Chosen in one thread while others may step.
std::atomic<Variant> variant_in_use = best_variant();

}  // namespace

const KernelTable& kernels_in_use() { return table_of(current_variant()); }

const Rule* find_rule(const char* name) {
  for (const Rule& rule : kRuleList)
    if (std::strcmp(rule.name, name) == 0) return &rule;
  return nullptr;
}

const Rule* rule_at(int index) { return index < kRules ? &kRuleList[index] : nullptr; }

namespace {

// Calls use(task, first, last) for those of blocks [first, last) that are the task's, counted from its own.
template <class Use>
void for_each_task(const Update& update, int64_t first, int64_t last, Use use) {
  // The task that block `first` belongs to: the last one that starts at or before it.
  size_t low = 0, high = update.count;
  while (high - low > 1) {
    const size_t middle = low + (high - low) / 2;
    (update.starts[middle] <= first ? low : high) = middle;
  }
  for (size_t t = low; t < update.count && update.starts[t] < last; ++t) {
    const int64_t start = update.starts[t];
    use(t, first > start ? first - start : 0, last - start);
  }
}

constexpr int64_t kChunkBlocks = kSumChunk / kBlock;

// The place of a task's first chunk among all. Others end before it, as no task's chunks are more than one beyond the
// quotient of its blocks.
int64_t first_place(const Update& update, size_t task) {
  return update.starts[task] / kChunkBlocks + static_cast<int64_t>(task);
}

// Calls use(begin, end, place) for the chunks that begin in blocks [from, to) of a task, with their elements.
template <class Use>
void for_each_chunk(const Update& update, size_t t, int64_t from, int64_t to, Use use) {
  const int64_t numel = update.tasks[t].numel, chunks = sum_chunks(numel);
  int64_t chunk = (from + kChunkBlocks - 1) / kChunkBlocks;
  for (; chunk < chunks && chunk * kChunkBlocks < to; ++chunk) {
    const int64_t begin = chunk * kSumChunk, end = begin + kSumChunk;
    use(begin, end < numel ? end : numel, first_place(update, t) + chunk);
  }
}

// Puts into a task's scalars what the passes so far have found; its numbers as that leaves them.
Numbers finish_scalars(const Update& update, size_t t, Scalars* scalars) {
  const TensorTask& task = update.tasks[t];
  Numbers numbers{};
  if (task.numbers != nullptr) numbers = *task.numbers;
  if (update.rule->complete != nullptr) update.rule->complete(task, update.is_float64, scalars);
  for (const Pass pass : {kOwnSums, kAgreement})
    if (const Sum* sums = update.sums[pass])
      update.rule->finish[pass](sums + t * static_cast<size_t>(update.rule->sums_in(pass)), update.is_float64, scalars,
                                &numbers);
  return numbers;
}

// A task with scalars of its own, which are finished.
struct Finished {
  TensorTask task;
  Scalars scalars;

  Finished(const Update& update, size_t t) : task(update.tasks[t]), scalars(*task.scalars) {
    finish_scalars(update, t, &scalars);
    task.scalars = &scalars;
  }
  Finished(const Finished&) = delete;
};

bool is_cautious(const Scalars& scalars, bool is_float64) {
  return is_float64 ? scalars.stages64.cautious : scalars.stages32.cautious;
}

double sum_of(const double (&lanes)[kSumLanes]) {
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <class S>
double largest_of(const ChunkStats& chunk) {
  S lanes[sizeof chunk.largest / sizeof(S)];
  std::memcpy(lanes, chunk.largest, sizeof lanes);
  return static_cast<double>(*std::max_element(std::begin(lanes), std::end(lanes)));
}

StepStats total(const ChunkStats& chunk, bool is_float64) {
  const double largest = is_float64 ? largest_of<double>(chunk) : largest_of<float>(chunk);
  return {sum_of(chunk.gradient), sum_of(chunk.param), sum_of(chunk.update), largest, chunk.nonfinite};
}

}  // namespace

void run_blocks(const Update& update, int64_t first, int64_t last, StepStats* stats) {
  const Kernel kernel = kernels_in_use().rule[update.rule->index][update.is_float64];
  const auto run = [&](const TensorTask& task, size_t t, int64_t from, int64_t to) {
    if (stats == nullptr || !task.is_measured)
      return kernel(task, from * kBlock, to * kBlock < task.numel ? to * kBlock : task.numel);
    for_each_chunk(update, t, from, to, [&](int64_t begin, int64_t end, int64_t place) {
      ChunkStats chunk;
      TensorTask measured = task;
      measured.stats = &chunk;
      kernel(measured, begin, end);
      stats[place] = total(chunk, update.is_float64);
    });
  };
  const bool is_reduced = update.sums[kOwnSums] != nullptr || update.sums[kAgreement] != nullptr;
  for_each_task(update, first, last, [&](size_t t, int64_t from, int64_t to) {
    if (t + 1 < update.count) prefetch_start(update.tasks[t + 1], update.rule->state_count + 1);
    if (!is_reduced) return run(update.tasks[t], t, from, to);
    run(Finished(update, t).task, t, from, to);
  });
}

StepStats stats_of(const Update& update, size_t task, const StepStats* stats) {
  StepStats all{};
  for_each_chunk(update, task, 0, blocks_of(update.tasks[task].numel),
                 [&](int64_t, int64_t, int64_t place) { all = add(all, stats[place]); });
  return all;
}

void gather_blocks(const Update& update, Pass pass, int64_t first, int64_t last, Sum* partials) {
  const GatherKernel kernel = kernels_in_use().gather[update.rule->index][pass][update.is_float64];
  const int count = update.rule->sums_in(pass);
  for_each_task(update, first, last, [&](size_t t, int64_t from, int64_t to) {
    const auto run = [&](const TensorTask& task) {
      const bool is_wanted = pass == kOwnSums || is_cautious(*task.scalars, update.is_float64);
      for_each_chunk(update, t, from, to, [&](int64_t begin, int64_t end, int64_t place) {
        Sum* sums = partials + place * count;
        if (is_wanted) return kernel(task, begin, end, sums);
        for (int s = 0; s < count; ++s) sums[s] = {0, 0};
      });
    };
    const bool knows_more = update.sums[kOwnSums] != nullptr || update.rule->complete != nullptr;
    knows_more ? run(Finished(update, t).task) : run(update.tasks[t]);
  });
}

size_t places_of(const Update& update) { return static_cast<size_t>(first_place(update, update.count)); }

void sums_of(const Update& update, Pass pass, size_t task, const Sum* partials, Sum* sums) {
  const int64_t chunks = sum_chunks(update.tasks[task].numel);
  const int count = update.rule->sums_in(pass);
  const int used = static_cast<int>(std::clamp(chunks, int64_t{1}, int64_t{kSumLanes}));  // a small tensor's are one
  const Sum* own = partials + first_place(update, task) * count;
  for (int s = 0; s < count; ++s) {
    Sum lanes[kSumLanes];
    std::fill_n(lanes, used, Sum{0, 0});
    for (int64_t c = 0; c < chunks; ++c) lanes[c % kSumLanes] = add(lanes[c % kSumLanes], own[c * count + s]);
    sums[s] = combine_lanes(lanes, used);
  }
}

Numbers numbers_of(const Update& update, size_t task) {
  Scalars scalars = *update.tasks[task].scalars;
  return finish_scalars(update, task, &scalars);
}

void gaussian(float* out, int64_t begin, int64_t count, const TensorKey& key) {
  kernels_in_use().gaussian(out, begin, count, key);
}

void rounding_bits(uint16_t* out, int64_t begin, int64_t count, const TensorKey& key) {
  kernels_in_use().rounding_bits(out, begin, count, key);
}

double norm_of_chunk(Norm norm, const TensorView& view, int64_t begin, int64_t end) {
  return kernels_in_use().norm_of_chunk(norm, view, begin, end);
}

void scale(const TensorView& view, int64_t begin, int64_t end, const ClipFactors& factors) {
  kernels_in_use().scale(view, begin, end, factors);
}

void clamp(const TensorView& view, int64_t begin, int64_t end, double limit) {
  kernels_in_use().clamp(view, begin, end, limit);
}

const char* name_of(Variant variant) {
  static constexpr const char* kNames[kVariants] = {"baseline", "avx2", "avx512"};
  return kNames[static_cast<int>(variant)];
}

bool supported(Variant variant) {
  if (variant == Variant::kBaseline) return true;
#if defined(TRAINOPT_X86)
  __builtin_cpu_init();
  if (variant == Variant::kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return supported(Variant::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Variant current_variant() { return variant_in_use.load(std::memory_order_relaxed); }

void set_variant(Variant variant) { variant_in_use.store(variant, std::memory_order_relaxed); }

}  // namespace trainopt::cpu
