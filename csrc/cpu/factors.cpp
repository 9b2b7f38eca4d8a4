#include "cpu/factors.h"

#include <algorithm>

#include "core/sum.h"
#include "cpu/kernel_table.h"
#include "cpu/tile.h"

namespace trainopt::cpu {
namespace {

constexpr int64_t kWholeElements = 64 * 1024;  // of a matrix that is not cut
constexpr int64_t kSmallElements = 16 * 1024;  // of matrices of which several are a part
constexpr int64_t kStripColumns = 4 * kPieceColumns;

int64_t quotient(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Takes `count` means, from `begin` on, into an average that is stored in any type; `moved` has them as they are
// stored.
template <class S>
void move_on(const TensorView& average, int64_t begin, int count, const double* means, S weight, S* moved) {
  S buffer[kBlock];
  S* values = load_tile(average, begin, count, buffer);
  for (int i = 0; i < count; ++i) moved[i] = values[i] = moved_average(values[i], static_cast<S>(means[i]), weight);
  store_tile(average, begin, count, values);
}

// The first `here` of sums that lie in `parts` arrays, `count` apart.
void add_parts(const double* sums, int64_t parts, int64_t count, int64_t here, double* out) {
  std::copy_n(sums, here, out);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < here; ++i) out[i] += sums[part * count + i];
}

// The means over `per_mean` elements whose sums of squares lie in `parts` arrays of `count`, one after the other.
template <class S>
void move_all(const TensorView& average, int64_t begin, int64_t count, const double* sums, int64_t parts,
              int64_t per_mean, S weight, S* moved) {
  double means[kBlock];
  for (int64_t at = 0; at < count; at += kBlock) {
    const int here = static_cast<int>(std::min(count - at, kBlock));
    add_parts(sums + at, parts, count, here, means);
    for (int i = 0; i < here; ++i) means[i] /= static_cast<double>(per_mean);
    move_on(average, begin + at, here, means, weight, moved + at);
  }
}

template <class S>
double sum_of_rows(const S* row, int64_t rows) {
  double lanes[kMeanLanes];
  const int64_t used = std::min<int64_t>(rows, kMeanLanes);
  std::fill_n(lanes, used, 0.0);
  for (int64_t r = 0; r < rows; ++r) lanes[r % kMeanLanes] += static_cast<double>(row[r]);
  combine_pairwise(lanes, kMeanLanes, static_cast<int>(used));
  return lanes[0];
}

// Where sums of matrices [first, last) begin, and in how many parts each is.
struct Sums {
  const double *rows, *columns;
  int64_t row_parts, column_parts;
};

template <class S>
void move_matrices(const FactorSettings& settings, const FactoredViews& factors, const FactoredShape& shape,
                   std::vector<double>& numbers, int64_t first, int64_t last, Sums sums) {
  const auto [matrices, rows, columns] = shape;
  S* const row_numbers = reinterpret_cast<S*>(numbers.data());
  S* const column_numbers = row_numbers + matrices * rows;
  const S weight = static_cast<S>(settings.weight);
  for (int64_t m = first; m < last; ++m) {
    S* const row = row_numbers + m * rows;
    move_all(factors.row_average, m * rows, rows, sums.rows, sums.row_parts, columns, weight, row);
    S* const column = column_numbers + m * columns;
    move_all(factors.column_average, m * columns, columns, sums.columns, sums.column_parts, rows, weight, column);
    for (int64_t c = 0; c < columns; ++c) column[c] = number_of_column(column[c]);
    sums.rows += sums.row_parts * rows;
    sums.columns += sums.column_parts * columns;
    const double mean = sum_of_rows(row, rows) / static_cast<double>(rows);
    for (int64_t r = 0; r < rows; ++r) row[r] = number_of_row(row[r], mean, settings.least);
  }
}

void move(bool is_float64, const FactorSettings& settings, FactoredTensor& factors, int64_t first, int64_t last,
          const double* row_sums, const double* column_sums) {
  const Sums sums{row_sums, column_sums, factors.shape.pieces(), factors.shape.groups()};
  is_float64 ? move_matrices<double>(settings, factors, factors.shape, factors.numbers, first, last, sums)
             : move_matrices<float>(settings, factors, factors.shape, factors.numbers, first, last, sums);
}

// A shard's numbers out of those of the whole.
template <class S>
void take_block(FactoredTensor& factors) {
  const auto& [whole, matrix, row, column] = factors.block;
  const S* const row_numbers = reinterpret_cast<const S*>(factors.of_whole.data());
  const S* const column_numbers = row_numbers + whole.matrices * whole.rows;
  const auto [matrices, rows, columns] = factors.shape;
  S* const numbers = reinterpret_cast<S*>(factors.numbers.data());
  for (int64_t m = 0; m < matrices; ++m) {
    std::copy_n(row_numbers + (matrix + m) * whole.rows + row, rows, numbers + m * rows);
    std::copy_n(column_numbers + (matrix + m) * whole.columns + column, columns,
                numbers + matrices * rows + m * columns);
  }
}

template <class S>
void move_whole(const FactorSettings& settings, FactoredTensor& factors, const double* totals) {
  const FactoredShape& whole = factors.block.whole;
  const Sums sums{totals, totals + whole.matrices * whole.rows, 1, 1};
  move_matrices<S>(settings, factors, whole, factors.of_whole, 0, whole.matrices, sums);
  take_block<S>(factors);
}

}  // namespace

FactorCut::FactorCut(const FactoredShape& shape, bool is_shard) {
  const int64_t elements = shape.rows * shape.columns;
  is_whole = elements <= kWholeElements && !is_shard;
  matrices_of_part = is_whole ? std::max<int64_t>(1, kSmallElements / elements) : 1;
  columns_of_part = is_whole ? shape.columns : kStripColumns;
  rows_of_part = is_whole ? shape.rows : kGroupRows;
  stacks = quotient(shape.matrices, matrices_of_part);  // a process may have none of a shard's, nor rows or columns
  groups = quotient(shape.rows, rows_of_part);
  strips = quotient(shape.columns, columns_of_part);
}

void FactoredTensor::reserve(bool is_float64) {
  if (!cut.is_whole) {
    row_sums.resize(static_cast<size_t>(shape.matrices * shape.row_sums()));
    column_sums.resize(static_cast<size_t>(shape.matrices * shape.column_sums()));
  }
  const auto make_room = [&](std::vector<double>& of, const FactoredShape& for_shape) {
    of.resize(static_cast<size_t>(is_float64 ? for_shape.numbers() : (for_shape.numbers() + 1) / 2));
  };
  make_room(numbers, shape);
  if (is_shard) make_room(of_whole, block.whole);
  rows = numbers.data();
  columns = is_float64 ? static_cast<const void*>(numbers.data() + shape.matrices * shape.rows)
                       : reinterpret_cast<const float*>(numbers.data()) + shape.matrices * shape.rows;
}

void add_squares(const TensorTask& task, bool is_float64, const FactorSettings& settings, FactoredTensor& factors,
                 int64_t index) {
  const FactorCut& cut = factors.cut;
  const FactoredShape& shape = factors.shape;
  const int64_t strip = index % cut.strips, group = index / cut.strips % cut.groups;
  FactorPart part;
  part.matrix = index / cut.strips / cut.groups * cut.matrices_of_part;
  part.matrices = std::min(cut.matrices_of_part, shape.matrices - part.matrix);
  part.row = group * cut.rows_of_part;
  part.row_end = std::min(part.row + cut.rows_of_part, shape.rows);
  part.column = strip * cut.columns_of_part;
  part.column_end = std::min(part.column + cut.columns_of_part, shape.columns);
  const auto add = kernels_in_use().add_squares[is_float64];
  if (!cut.is_whole) {
    part.row_sums = &factors.row_sums[part.matrix * shape.row_sums()];
    part.column_sums = &factors.column_sums[part.matrix * shape.column_sums()];
    return add(task, shape, part);
  }
  std::vector<double> sums(static_cast<size_t>(part.matrices * (shape.row_sums() + shape.column_sums())));
  part.row_sums = sums.data();
  part.column_sums = sums.data() + part.matrices * shape.row_sums();
  add(task, shape, part);
  move(is_float64, settings, factors, part.matrix, part.matrix + part.matrices, part.row_sums, part.column_sums);
}

void move_factors(bool is_float64, const FactorSettings& settings, FactoredTensor& factors) {
  move(is_float64, settings, factors, 0, factors.shape.matrices, factors.row_sums.data(), factors.column_sums.data());
}

void total_squares(const FactoredTensor& factors, double* totals) {
  const auto& [whole, matrix, row, column] = factors.block;
  const auto [matrices, rows, columns] = factors.shape;
  if (matrices * rows * columns == 0) return;
  double* const column_totals = totals + whole.matrices * whole.rows;
  for (int64_t m = 0; m < matrices; ++m) {
    add_parts(&factors.row_sums[m * factors.shape.row_sums()], factors.shape.pieces(), rows, rows,
              totals + (matrix + m) * whole.rows + row);
    add_parts(&factors.column_sums[m * factors.shape.column_sums()], factors.shape.groups(), columns, columns,
              column_totals + (matrix + m) * whole.columns + column);
  }
}

void move_factors_by(const double* totals, bool is_float64, const FactorSettings& settings, FactoredTensor& factors) {
  is_float64 ? move_whole<double>(settings, factors, totals) : move_whole<float>(settings, factors, totals);
}

}  // namespace trainopt::cpu
