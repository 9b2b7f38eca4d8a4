// Moving averages of the gradient's squares over the rows and columns of matrices, before the reduce phase: the sums,
// in the order of core/factored.h, which is the CPU engine's too; the averages, and the numbers of columns; and those
// of rows, for which the mean of all rows must be known. Three launches, and nothing waits for the device. Shards take
// two more: their sums are brought together before the averages are moved on, and their numbers taken out of the
// whole's.
#include <vector>

#include "cuda/engine.h"
#include "cuda/factored.h"
#include "cuda/launch.h"
#include "cuda/reduce.h"
#include "cuda/step_table.h"
#include "cuda/table.h"
#include "cuda/two_parts.h"
#include "rules/rules.h"

namespace trainopt::cuda {
namespace {

constexpr int kWarps = kThreads / 32;
static_assert(kRowLanes == 32 && kMeanLanes == kThreads && kPieceColumns % 32 == 0);

// Adds up the squares of what the rule will be given as the gradient. -------------------------------------------------

template <class Base>
struct WithSquares : Base {
  FactoredShape shape;
  double *row_sums, *column_sums;  // of the first matrix
};
template <class Storage>
using SquaresTable = Table<Header<kSetsOf<Storage>>, WithSquares<RowOf<Storage, 2>>, kParameterBytes>;

TRAINOPT_FUNCTION int64_t groups_of(const FactoredShape& shape) {
  return shape.matrices * shape.groups() * shape.pieces();
}

constexpr int kColumnsOfLane = static_cast<int>(kPieceColumns / 32);

// One warp, one group of a matrix's rows in a piece of its columns.
template <class S, class Storage>
__global__ void __launch_bounds__(kThreads, sizeof(S) == sizeof(double) ? 1 : 2)
    add_squares_kernel(const SquaresTable<Storage> __grid_constant__ table) {
  if (is_left_out(table.header)) return;
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const auto& row = table.rows[index];
  const FactoredShape shape = row.shape;
  const int64_t pieces = shape.pieces(), groups = shape.groups();
  const int64_t unit = block_in(table, index) * kWarps + threadIdx.x / 32;
  if (unit >= groups_of(shape)) return;
  const Stages<S> stages = stages_of(prepared_in(table.header, row.prepared).scalars, S());
  const bool reads_param = stages.adds_parameter();

  const int64_t piece = unit % pieces, group = unit / pieces % groups, matrix = unit / pieces / groups;
  const int64_t first_row = group * kGroupRows, first_column = piece * kPieceColumns;
  const int64_t rows_left = shape.rows - first_row, columns_left = shape.columns - first_column;
  const int rows = static_cast<int>(rows_left < kGroupRows ? rows_left : kGroupRows);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int width = static_cast<int>(columns_left < kPieceColumns ? columns_left : kPieceColumns);
  double* const row_sums = row.row_sums + matrix * shape.row_sums() + piece * shape.rows + first_row;
  double* const column_sums = row.column_sums + matrix * shape.column_sums() + group * shape.columns + first_column;
  double of_column[kColumnsOfLane] = {};
  for (int r = 0; r < rows; ++r) {
    const int64_t at = (matrix * shape.rows + first_row + r) * shape.columns + first_column + lane;
    S value[2][kColumnsOfLane] = {};
#pragma unroll
    for (int role = 0; role < 2; ++role) {
      if (role == 0 && !reads_param) continue;
      with_load<S>(row.data[role], row.beside[role], row.dtype[role], [&](auto load) {
#pragma unroll
        for (int k = 0; k < kColumnsOfLane; ++k)
          if (lane + 32 * k < width) value[role][k] = load(place_of(row, role, at + 32 * k));
      });
    }
    double of_row = 0;
#pragma unroll
    for (int k = 0; k < kColumnsOfLane; ++k) {
      if (lane + 32 * k >= width) break;
      const auto x = static_cast<double>(before_rule<false>(stages, value[0][k], value[1][k]));
      of_row += x * x;
      of_column[k] += x * x;
    }
    of_row = combine_warp(of_row, [](double a, double b) { return a + b; });
    if (lane == 0) row_sums[r] = of_row;
  }
#pragma unroll
  for (int k = 0; k < kColumnsOfLane; ++k)
    // tests break this: sums of a column that is another piece's
    if (lane + 32 * k < width) column_sums[lane + 32 * k] = of_column[k];
}

// What the averages and the step's numbers are made of. ---------------------------------------------------------------

struct MatricesRow {
  FactoredShape shape;
  const double *row_sums, *column_sums;
  void *row_average, *column_average, *numbers;
  Factored* out;
  uint32_t prepared;
  DType row_dtype, column_dtype, param_dtype;
  bool are_totals;  // the sums, of a shard's whole: not in parts
};
using MatricesTable = Table<Header<kPreparedSets>, MatricesRow, kParameterBytes>;

// The sum of `count` numbers, `step` apart.
__device__ __forceinline__ double sum_apart(const double* from, int64_t step, int64_t count) {
  double sum = from[0];
#pragma unroll 8
  for (int64_t i = 1; i < count; ++i) sum += from[i * step];  // tests break this: the first group of rows alone
  return sum;
}

// One thread, one row or column of all matrices. The first makes the view of the numbers.
template <class Rule, class S>
__global__ void __launch_bounds__(kThreads) move_averages_kernel(const MatricesTable __grid_constant__ table) {
  if (is_left_out(table.header)) return;
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const MatricesRow& row = table.rows[index];
  const FactoredShape shape = row.shape;
  S* const of_rows = static_cast<S*>(row.numbers);
  S* const of_columns = of_rows + shape.matrices * shape.rows;
  int64_t i = block_in(table, index) * kThreads + threadIdx.x;
  if (i == 0) *row.out = {shape, of_rows, of_columns};
  if (i >= shape.numbers()) return;
  const S weight = static_cast<S>(scalars_in<Rule, S>(prepared_in(table.header, row.prepared)).weight);
  const bool is_row = i < shape.matrices * shape.rows;
  if (!is_row) i -= shape.matrices * shape.rows;
  const int64_t length = is_row ? shape.rows : shape.columns, matrix = i / length, place = i - matrix * length;
  const int64_t parts = row.are_totals ? 1 : is_row ? shape.pieces() : shape.groups();
  const double* const sums = (is_row ? row.row_sums : row.column_sums) + matrix * parts * length;
  const double sum = sum_apart(sums + place, length, parts);
  const S mean = static_cast<S>(sum / static_cast<double>(is_row ? shape.columns : shape.rows));
  void* const average = is_row ? row.row_average : row.column_average;
  const DType dtype = is_row ? row.row_dtype : row.column_dtype;
  const S moved = moved_average(load_one<S>(average, dtype, i), mean, weight);
  store_one(average, dtype, i, moved);
  if (is_row) {
    of_rows[i] = moved;  // until the next kernel knows the mean of them
  } else {
    of_columns[i] = number_of_column(moved);
  }
}

// The numbers of a matrix's rows, by the mean of their averages: by a warp for few of them, whose lanes the others
// would have added zeros to, else by a block.
constexpr int64_t kRowsOfWarp = 32;

template <class Rule, class S>
__global__ void __launch_bounds__(kThreads) finish_rows_kernel(const MatricesTable __grid_constant__ table) {
  if (is_left_out(table.header)) return;
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const MatricesRow& row = table.rows[index];
  const FactoredShape shape = row.shape;
  const bool by_warp = shape.rows <= kRowsOfWarp;
  const int64_t block = block_in(table, index);
  const int64_t matrix = by_warp ? block * kWarps + threadIdx.x / 32 : block;
  TRAINOPT_SHARED(double, lanes, kMeanLanes);
  if (by_warp && matrix >= shape.matrices) return;
  const int lane = static_cast<int>(by_warp ? threadIdx.x % 32 : threadIdx.x), step = by_warp ? 32 : kMeanLanes;
  S* const numbers = static_cast<S*>(row.numbers) + matrix * shape.rows;
  double sum = 0;
  for (int64_t r = lane; r < shape.rows; r += step) sum += static_cast<double>(numbers[r]);
  if (!by_warp) {
    lanes[lane] = sum;
    for (int width = kMeanLanes / 2; width >= 32; width /= 2) {
      __syncthreads();  // tests break this: lanes that are still to be added to
      if (lane < width) lanes[lane] = sum = sum + lanes[lane + width];
    }
    __syncthreads();
    sum = lanes[lane % 32];
  }
  sum = combine_warp(sum, [](double a, double b) { return a + b; });
  const double mean = sum / static_cast<double>(shape.rows);
  const double least = Rule::eps1_of(scalars_in<Rule, S>(prepared_in(table.header, row.prepared)), row.param_dtype);
  for (int64_t r = lane; r < shape.rows; r += step) numbers[r] = number_of_row(numbers[r], mean, least);
}

// Shards. -------------------------------------------------------------------------------------------------------------

struct ShardRow {
  FactoredShape shape;
  FactoredBlock block;
  const double *row_sums, *column_sums;
  double* totals;        // of the whole: all of its matrices' rows first
  const void* of_whole;  // numbers, likewise
  void* numbers;
  Factored* out;
  uint32_t prepared;
};
using ShardsTable = Table<Header<kPreparedSets>, ShardRow, kParameterBytes>;

// One thread, one row or column of a shard's matrices: its place there, and among the numbers of the whole.
struct ShardPlace {
  bool is_row;
  int64_t matrix, place, length, in_whole;

  __device__ __forceinline__ ShardPlace(const ShardRow& row, int64_t i) {
    const auto& [whole, first_matrix, first_row, first_column] = row.block;
    is_row = i < row.shape.matrices * row.shape.rows;
    if (!is_row) i -= row.shape.matrices * row.shape.rows;
    length = is_row ? row.shape.rows : row.shape.columns;
    matrix = i / length;
    place = i - matrix * length;
    const int64_t in_stack = first_matrix + matrix;  // tests break this: a shard that begins with the first matrix
    // tests break this: a shard that begins with the first column
    const int64_t in_matrix = is_row ? first_row + place : first_column + place;
    in_whole = in_stack * (is_row ? whole.rows : whole.columns) + in_matrix;
    if (!is_row) in_whole += whole.matrices * whole.rows;
  }
};

// What a shard adds to the sums over the rows and columns of the whole.
__global__ void __launch_bounds__(kThreads) total_squares_kernel(const ShardsTable __grid_constant__ table) {
  if (is_left_out(table.header)) return;
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const ShardRow& row = table.rows[index];
  const int64_t i = block_in(table, index) * kThreads + threadIdx.x;
  if (i >= row.shape.numbers()) return;
  const ShardPlace at(row, i);
  const int64_t parts = at.is_row ? row.shape.pieces() : row.shape.groups();
  const double* const sums = (at.is_row ? row.row_sums : row.column_sums) + at.matrix * parts * at.length;
  row.totals[at.in_whole] = sum_apart(sums + at.place, at.length, parts);
}

// A shard's numbers, out of those of the whole. The first thread makes the view of them.
template <class S>
__global__ void __launch_bounds__(kThreads) take_block_kernel(const ShardsTable __grid_constant__ table) {
  if (is_left_out(table.header)) return;
  const int index = find_row(table, static_cast<int32_t>(blockIdx.x));
  const ShardRow& row = table.rows[index];
  const int64_t i = block_in(table, index) * kThreads + threadIdx.x;
  S* const numbers = static_cast<S*>(row.numbers);
  if (i == 0) *row.out = {row.shape, numbers, numbers + row.shape.matrices * row.shape.rows};
  if (i < row.shape.numbers()) numbers[i] = static_cast<const S*>(row.of_whole)[ShardPlace(row, i).in_whole];
}

// On the host ---------------------------------------------------------------------------------------------------------

// Where a tensor's numbers and sums lie in the memory of all of them, in bytes.
struct Memory {
  int64_t view, numbers, of_whole, row_sums, column_sums, end;

  Memory(int64_t begin, const FactoredViews& of, int64_t size_of_number) {
    const auto aligned = [](int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; };
    const FactoredShape& shape = of.shape;
    view = begin;
    numbers = view + aligned(sizeof(Factored));
    of_whole = numbers + aligned(shape.numbers() * size_of_number);
    row_sums = of_whole + (of.is_shard ? aligned(of.block.whole.numbers() * size_of_number) : 0);
    column_sums = row_sums + aligned(shape.matrices * shape.row_sums() * sizeof(double));
    end = column_sums + aligned(shape.matrices * shape.column_sums() * sizeof(double));
  }
};

int64_t blocks_of(int64_t units, int64_t units_of_block) { return (units + units_of_block - 1) / units_of_block; }

// The view that the host has of a task's matrices; null: it has none, or no elements.
template <class Rule>
const FactoredViews* views_of(const TensorTask& task) {
  const TensorView& state = task.state[__builtin_ctz(kFactorStates<Rule>)];
  return state.dtype == DType::kFactored ? static_cast<const FactoredViews*>(state.data) : nullptr;
}

template <class Rule, class S>
size_t bytes_for(const Update& work) {
  int64_t bytes = 0;
  for (size_t t = 0; t < work.count; ++t)
    if (const FactoredViews* views = views_of<Rule>(work.tasks[t])) bytes = Memory(bytes, *views, sizeof(S)).end;
  return static_cast<size_t>(bytes);
}

// A task's place in the memory of all; of no elements where it has no matrices.
struct Place {
  const FactoredViews* views;
  FactoredShape shape;
  Factored* out;
  void *numbers, *of_whole;
  double *row_sums, *column_sums;
  double* totals;  // of a shard's whole

  bool is_shard() const { return views != nullptr && views->is_shard; }
};

template <class Rule, class S>
std::vector<Place> places_of(const Update& work, void* memory, double* totals) {
  std::vector<Place> places(work.count);
  int64_t end = 0;
  for (size_t t = 0; t < work.count; ++t) {
    const FactoredViews* views = views_of<Rule>(work.tasks[t]);
    if (views == nullptr) continue;
    const Memory place(end, *views, sizeof(S));
    const auto at = [&](int64_t bytes) { return static_cast<void*>(static_cast<char*>(memory) + bytes); };
    places[t] = {views,
                 views->shape,
                 static_cast<Factored*>(at(place.view)),
                 at(place.numbers),
                 at(place.of_whole),
                 static_cast<double*>(at(place.row_sums)),
                 static_cast<double*>(at(place.column_sums)),
                 totals};
    end = place.end;
    if (views->is_shard) totals += views->block.whole.numbers();
  }
  return places;
}

template <class S, class Storage>
void add_squares_of(const Update& work, const std::vector<Place>& places, Stream stream) {
  SquaresTable<Storage> table;
  static_assert(sizeof table <= kParameterBytes);
  fill_tables(
      work, table,
      [&](size_t t) {
        const TensorTask& task = work.tasks[t];
        const bool is_strided = task.param.layout != nullptr || task.gradient.layout != nullptr;
        return is_strided == kIsStrided<Storage> ? blocks_of(groups_of(places[t].shape), kWarps) : 0;
      },
      [&](auto& row, size_t t) {
        const TensorView* const views[] = {&work.tasks[t].param, &work.tasks[t].gradient};
        describe<S>(work.tasks[t], views, &row);
        row.shape = places[t].shape;
        row.row_sums = places[t].row_sums;
        row.column_sums = places[t].column_sums;
      },
      [&](const SquaresTable<Storage>& full, int64_t blocks, const std::vector<uint32_t>&) {
        launch("add_squares", add_squares_kernel<S, Storage>, {blocks, kThreads}, stream, full);
      });
}

// One kernel over the rows that `blocks` gives blocks to; `make` makes those.
template <class Table, class Row, class Kernel, class Blocks, class Make>
void run_over(const Update& work, const char* name, Kernel kernel, Stream stream, Blocks blocks, Make make) {
  Table table;
  static_assert(sizeof table <= kParameterBytes);
  fill_tables(
      work, table, blocks,
      [&](Row& row, size_t t) {
        const uint32_t prepared = row.prepared;
        row = make(t);
        row.prepared = prepared;
      },
      [&](const Table& full, int64_t total, const std::vector<uint32_t>&) {
        launch(name, kernel, {total, kThreads}, stream, full);
      });
}

// Those shards alone that have elements.
template <class Kernel>
void run_over_shards(const Update& work, const std::vector<Place>& places, const char* name, Kernel kernel,
                     Stream stream) {
  run_over<ShardsTable, ShardRow>(
      work, name, kernel, stream,
      [&](size_t t) {
        return places[t].is_shard() && work.tasks[t].numel > 0 ? blocks_of(places[t].shape.numbers(), kThreads) : 0;
      },
      [&](size_t t) {
        const Place& place = places[t];
        return ShardRow{place.shape,       place.views->block, place.row_sums,
                        place.column_sums, place.totals,       place.of_whole,
                        place.numbers,     place.out,          0};
      });
}

template <class Rule, class S>
void add_all_squares(const Update& work, void* memory, double* totals, Stream stream) {
  const std::vector<Place> places = places_of<Rule, S>(work, memory, totals);
  add_squares_of<S, Mixed>(work, places, stream);
  add_squares_of<S, Strided>(work, places, stream);
  run_over_shards(work, places, "total_squares", total_squares_kernel, stream);
}

template <class Rule, class S>
void move_all(const Update& work, void* memory, double* totals, TensorTask* tasks, Stream stream) {
  const std::vector<Place> places = places_of<Rule, S>(work, memory, totals);
  std::vector<MatricesRow> matrices(work.count);
  for (size_t t = 0; t < work.count; ++t) {
    const Place& place = places[t];
    if (place.views == nullptr) continue;
    const FactoredViews& views = *place.views;
    matrices[t] = {place.shape,
                   place.row_sums,
                   place.column_sums,
                   views.row_average.data,
                   views.column_average.data,
                   place.numbers,
                   place.out,
                   0,
                   views.row_average.dtype,
                   views.column_average.dtype,
                   work.tasks[t].param.dtype,
                   false};
    if (!views.is_shard) continue;
    const FactoredShape& whole = views.block.whole;
    matrices[t].shape = whole;
    matrices[t].row_sums = place.totals;
    matrices[t].column_sums = place.totals + whole.matrices * whole.rows;
    matrices[t].numbers = place.of_whole;
    matrices[t].are_totals = true;
  }
  const auto row_of = [&](size_t t) { return matrices[t]; };
  run_over<MatricesTable, MatricesRow>(
      work, "move_averages", move_averages_kernel<Rule, S>, stream,
      [&](size_t t) { return blocks_of(matrices[t].shape.numbers(), kThreads); }, row_of);
  run_over<MatricesTable, MatricesRow>(
      work, "finish_rows", finish_rows_kernel<Rule, S>, stream,
      [&](size_t t) {
        const FactoredShape& shape = matrices[t].shape;
        return shape.rows <= kRowsOfWarp ? blocks_of(shape.matrices, kWarps) : shape.matrices;
      },
      row_of);
  run_over_shards(work, places, "take_block", take_block_kernel<S>, stream);
  for (size_t t = 0; t < work.count; ++t)
    if (places[t].out != nullptr)
      tasks[t].state[__builtin_ctz(kFactorStates<Rule>)] = {places[t].out, nullptr, DType::kFactored};
}

template <class Rule>
int64_t shared_numbers_as(const TensorTask& task) {
  const FactoredViews* views = views_of<Rule>(task);
  return views != nullptr && views->is_shard ? views->block.whole.numbers() : 0;
}

struct Functions {
  size_t (*bytes)(const Update&);
  int64_t (*shared_numbers)(const TensorTask&);
  void (*add)(const Update&, void*, double*, Stream);
  void (*move)(const Update&, void*, double*, TensorTask*, Stream);
};

template <class Rule, class S>
constexpr Functions functions() {
  if constexpr (kFactorStates<Rule> != 0)
    return {bytes_for<Rule, S>, shared_numbers_as<Rule>, add_all_squares<Rule, S>, move_all<Rule, S>};
  return {};
}

const Functions& functions_of(const Update& work) {
#define TRAINOPT_FACTORS(rule) {functions<rule, float>(), functions<rule, double>()},
  static constexpr Functions kFunctions[][2] = {TRAINOPT_FOR_EACH_RULE(TRAINOPT_FACTORS)};
#undef TRAINOPT_FACTORS
  return kFunctions[work.rule][work.is_float64];
}

}  // namespace

size_t factor_bytes(const Update& work) { return functions_of(work).bytes(work); }

std::vector<int64_t> shared_numbers(const Update& work) {
  std::vector<int64_t> numbers;
  for (size_t t = 0; t < work.count; ++t) numbers.push_back(functions_of(work).shared_numbers(work.tasks[t]));
  return numbers;
}

void add_squares(const Update& work, void* memory, double* totals, Stream stream) {
  functions_of(work).add(work, memory, totals, stream);
}

void move_factors(const Update& work, void* memory, double* totals, TensorTask* tasks, Stream stream) {
  functions_of(work).move(work, memory, totals, tasks, stream);
}

}  // namespace trainopt::cuda
