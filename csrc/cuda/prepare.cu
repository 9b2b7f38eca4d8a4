#include "cuda/engine.h"
#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "rules/rules.h"

namespace trainopt::cuda {
namespace {

constexpr int kPrepareThreads = 64;
constexpr int kGroups = kParameterBytes > 4096 ? 16 : 4;

struct PrepareHeader {
  GroupSource groups[kGroups];
  double scale, norm;
  const float* gradient_scale;
  const double* gradient_norm;
  const float* found_inf;
  Prepared* out;  // of the first count
  int32_t count;
};
constexpr int kCounts = static_cast<int>((kParameterBytes - sizeof(PrepareHeader)) / sizeof(Count));

struct PrepareTable {
  PrepareHeader header;
  Count counts[kCounts];
};
static_assert(kCounts >= kPrepareThreads && sizeof(PrepareTable) <= kParameterBytes);

__device__ double number_at(const void* data, bool is_double) {
  return is_double ? *static_cast<const double*>(data) : static_cast<double>(*static_cast<const float*>(data));
}

// One parameter: counts its step, and computes in double what its elements need in float or double.
template <class Rule, class S>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const PrepareTable __grid_constant__ table) {
  const int i = static_cast<int>(blockIdx.x) * kPrepareThreads + static_cast<int>(threadIdx.x);
  if (i >= table.header.count) return;
  if (table.header.found_inf != nullptr && *table.header.found_inf != 0) return;
  const Count& count = table.counts[i];
  double step = count.step;
  if (count.steps != nullptr) {
    // In the count's own type, as torch adds: a float32 count stops at 2^24.
    if (count.is_double) {
      step = *static_cast<double*>(count.steps) += 1;
    } else {
      step = static_cast<double>(*static_cast<float*>(count.steps) += 1);
    }
  }
  const GroupSource& group = table.header.groups[count.group];
  Settings settings = group.settings;
  double options[kMaxOptions];
  for (int o = 0; o < kMaxOptions; ++o) options[o] = group.options[o];
  for (int n = 0; n < kMaxDeviceNumbers; ++n) {
    const DeviceNumber& from = group.replaced[n];
    if (from.data == nullptr) continue;
    const double value = number_at(from.data, from.is_double != 0);
    if (from.option == DeviceNumber::kLr) {
      settings.lr = value;
      settings.lr_is_float32 = from.is_double == 0;
    } else {
      options[from.option] = value;
    }
  }
  const PrepareHeader& header = table.header;
  const double scale = header.gradient_scale != nullptr ? static_cast<double>(*header.gradient_scale) : header.scale;
  const double norm = header.gradient_norm != nullptr ? *header.gradient_norm : header.norm;
  const StepInfo info{settings.lr * rate_of<Rule>(options), settings.lr_is_float32 != 0, settings.weight_decay, step,
                      count.first != 0 || step == 1};
  Prepared& out = table.header.out[i];
  stages_of(out.scalars, S()) = prepare_stages<S>(settings, info, Rule::decay(options), scale, norm);
  constexpr int kNumbers = kNumberCount<Rule>;
  const bool are_values = count.numbers_are_values != 0;
  Numbers numbers = load_numbers<kNumbers>(count.numbers, count.numbers_are_float32 != 0, are_values);
  const typename Rule::template Scalars<S> scalars = prepared_by<Rule, S>(options, info, numbers);
  if (!are_values) store_numbers<kNumbers>(count.numbers, numbers);
  __builtin_memcpy(out.scalars.rule, &scalars, sizeof scalars);
  complete_stages<Rule>(stages_of(out.scalars, S()), scalars);
  out.step = random_key(settings.seed, step).step;
}

template <class Rule, class S>
void prepare_all(const Preparation& work, Stream stream) {
  PrepareTable table;
  table.header.scale = work.scale;
  table.header.norm = work.norm;
  table.header.gradient_scale = work.gradient_scale;
  table.header.gradient_norm = work.gradient_norm;
  table.header.found_inf = work.found_inf;
  uint32_t groups[kGroups], group_count = 0;
  table.header.count = 0;
  size_t done = 0;
  const auto flush = [&] {
    table.header.out = work.out + done;
    const int64_t blocks = (table.header.count + kPrepareThreads - 1) / kPrepareThreads;
    if (blocks > 0) launch("prepare", prepare_kernel<Rule, S>, {blocks, kPrepareThreads}, stream, table);
    done += static_cast<size_t>(table.header.count);
    table.header.count = 0;
    group_count = 0;
  };
  for (size_t i = 0; i < work.count; ++i) {
    const Count& count = work.counts[i];
    uint32_t group = 0;
    while (group < group_count && groups[group] != count.group) ++group;
    if (table.header.count == kCounts || group == kGroups) {
      flush();
      group = 0;
    }
    if (group == group_count) {
      table.header.groups[group] = work.groups[count.group];  // tests break this: a graph that keeps a host's value
      groups[group_count++] = count.group;
    }
    Count& row = table.counts[table.header.count++];
    row = count;
    row.group = group;
  }
  flush();
}

}  // namespace

void prepare(const Preparation& work, Stream stream) {
  using Function = void (*)(const Preparation&, Stream);
#define TRAINOPT_PREPARES(rule) {prepare_all<rule, float>, prepare_all<rule, double>},
  static constexpr Function kPrepares[][2] = {TRAINOPT_FOR_EACH_RULE(TRAINOPT_PREPARES)};
#undef TRAINOPT_PREPARES
  kPrepares[work.rule][work.is_float64](work, stream);
}

}  // namespace trainopt::cuda
