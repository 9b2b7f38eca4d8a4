// What a step has found out about each parameter, of the stats of its chunks.
#include <vector>

#include "cuda/engine.h"
#include "cuda/launch.h"
#include "cuda/reduce.h"
#include "cuda/table.h"

namespace trainopt::cuda {
namespace {

struct TellHeader {
  const StepStats* chunk_stats;
  double* out;                  // of the first row
  const float* gradient_scale;  // on the device; null: `scale`
  double scale;
};
struct TellRow {
  int64_t place, chunks;
};
using TellTable = Table<TellHeader, TellRow, kParameterBytes>;

// One warp, one tensor.
__global__ void __launch_bounds__(32) tell_kernel(const TellTable __grid_constant__ table) {
  const TellRow& row = table.rows[blockIdx.x];
  StepStats all{};
  // tests break this: a chunk's stats that are left out
  for (int64_t c = threadIdx.x; c < row.chunks; c += 32) all = add(all, table.header.chunk_stats[row.place + c]);
  all = combine_warp(all, [](const StepStats& a, const StepStats& b) { return add(a, b); });
  if (threadIdx.x != 0) return;
  const double scale = table.header.gradient_scale != nullptr ? *table.header.gradient_scale : table.header.scale;
  double* const out = table.header.out + static_cast<int64_t>(blockIdx.x) * kToldStats;
  out[0] = __builtin_sqrt(all.gradient) / scale;
  out[1] = __builtin_sqrt(all.param);
  out[2] = __builtin_sqrt(all.update);
  out[3] = all.largest / scale;
  out[4] = static_cast<double>(all.nonfinite);
}

// Calls use(task, place of its first chunk's stats, chunks) for each task that is measured; the chunks of all.
template <class Use>
int64_t for_each_measured(const Update& work, Use use) {
  int64_t place = 0;
  for (size_t t = 0; t < work.count; ++t) {
    if (!work.tasks[t].is_measured) continue;
    const int64_t chunks = chunks_of(work.tasks[t].numel);
    use(t, place, chunks);
    place += chunks;
  }
  return place;
}

}  // namespace

size_t measured_chunks(const Update& work) {
  return static_cast<size_t>(for_each_measured(work, [](size_t, int64_t, int64_t) {}));
}

std::vector<int64_t> stats_places(const Update& work) {
  std::vector<int64_t> places(work.count, -1);
  for_each_measured(work, [&](size_t task, int64_t place, int64_t) { places[task] = place; });
  return places;
}

void tell(const Update& work, const StepStats* chunk_stats, const float* gradient_scale, double scale, double* out,
          Stream stream) {
  TellTable table;
  table.header = {chunk_stats, out, gradient_scale, scale};
  const auto start = [&](const TellTable& full, int64_t tensors) {
    launch("tell", tell_kernel, {tensors, 32}, stream, full);
    table.header.out += tensors * kToldStats;
  };
  Filler<TellTable, decltype(start)> filler(table, start);
  for_each_measured(work, [&](size_t, int64_t place, int64_t chunks) {
    filler.make_room(1);
    filler.add(1) = {place, chunks};
  });
  filler.flush();
}

}  // namespace trainopt::cuda
