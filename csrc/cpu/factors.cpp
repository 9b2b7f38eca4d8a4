#include "cpu/factors.h"

#include <algorithm>

#include "cpu/kernel_table.h"
#include "cpu/tile.h"

namespace trainopt::cpu {
namespace {

constexpr int64_t kPartElements = 64 * 1024;
constexpr int64_t kSmallElements = 16 * 1024;  // of matrices of which several are a part
constexpr int64_t kStripColumns = 1024;

int64_t quotient(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Takes `count` means, from `begin` on, into an average that is stored in any type; `moved` has them as they are
// stored.
template <class S>
void move_on(const TensorView& average, int64_t begin, int count, const double* means, S weight, S* moved) {
  S buffer[kBlock];
  S* values = load_tile(average, begin, count, buffer);
  const bool is_small = weight < S(0.5);
  for (int i = 0; i < count; ++i) {  // as torch.lerp, from the nearer end
    const S mean = static_cast<S>(means[i]), difference = mean - values[i];
    moved[i] = values[i] = is_small ? values[i] + weight * difference : mean - difference * (S(1) - weight);
  }
  store_tile(average, begin, count, values);
}

// The means over `per_mean` elements whose sums of squares lie in `parts` arrays of `count`, one after the other.
template <class S>
void move_all(const TensorView& average, int64_t begin, int64_t count, const double* sums, int64_t parts,
              int64_t per_mean, S weight, S* moved) {
  double means[kBlock];
  for (int64_t at = 0; at < count; at += kBlock) {
    const int here = static_cast<int>(std::min(count - at, kBlock));
    for (int i = 0; i < here; ++i) means[i] = sums[at + i];
    for (int64_t part = 1; part < parts; ++part)
      for (int i = 0; i < here; ++i) means[i] += sums[part * count + at + i];
    for (int i = 0; i < here; ++i) means[i] /= static_cast<double>(per_mean);
    move_on(average, begin + at, here, means, weight, moved + at);
  }
}

// Where sums of matrices [first, last) begin.
struct Sums {
  const double *rows, *columns;
};

template <class S>
void move_matrices(const FactorSettings& settings, FactoredTensor& factors, int64_t first, int64_t last, Sums sums) {
  const auto [matrices, rows, columns] = factors.shape;
  const FactorCut& cut = factors.cut;
  S* const row_numbers = reinterpret_cast<S*>(factors.numbers.data());
  S* const column_numbers = row_numbers + matrices * rows;
  const S weight = static_cast<S>(settings.weight);
  for (int64_t m = first; m < last; ++m) {
    S* const row = row_numbers + m * rows;
    move_all(factors.row_average, m * rows, rows, sums.rows, cut.strips, columns, weight, row);
    move_all(factors.column_average, m * columns, columns, sums.columns, cut.groups, rows, weight,
             column_numbers + m * columns);
    sums.rows += cut.strips * rows;
    sums.columns += cut.groups * columns;
    double mean = 0;
    for (int64_t r = 0; r < rows; ++r) mean += static_cast<double>(row[r]);
    mean /= static_cast<double>(rows);
    if (mean < settings.least) mean = settings.least;
    for (int64_t r = 0; r < rows; ++r) row[r] = static_cast<S>(static_cast<double>(row[r]) / mean);
  }
}

void move(bool is_float64, const FactorSettings& settings, FactoredTensor& factors, int64_t first, int64_t last,
          Sums sums) {
  is_float64 ? move_matrices<double>(settings, factors, first, last, sums)
             : move_matrices<float>(settings, factors, first, last, sums);
}

}  // namespace

FactorCut::FactorCut(const FactoredShape& shape) {
  const int64_t elements = shape.rows * shape.columns;  // not 0
  is_whole = elements <= kPartElements;
  matrices_of_part = is_whole ? std::max<int64_t>(1, kSmallElements / elements) : 1;
  columns_of_part = is_whole ? shape.columns : std::min(shape.columns, kStripColumns);
  rows_of_part = is_whole ? shape.rows : std::max<int64_t>(1, kPartElements / columns_of_part);
  stacks = quotient(shape.matrices, matrices_of_part);
  groups = quotient(shape.rows, rows_of_part);
  strips = quotient(shape.columns, columns_of_part);
}

FactoredTensor::FactoredTensor(const FactoredShape& shape, const TensorView& rows, const TensorView& columns,
                               bool is_float64)
    : Factored{shape}, row_average(rows), column_average(columns), cut(shape) {
  if (!cut.is_whole) {
    row_sums.resize(static_cast<size_t>(shape.matrices * cut.strips * shape.rows));
    column_sums.resize(static_cast<size_t>(shape.matrices * cut.groups * shape.columns));
  }
  const int64_t count = shape.matrices * (shape.rows + shape.columns);
  numbers.resize(static_cast<size_t>(is_float64 ? count : (count + 1) / 2));
  this->rows = numbers.data();
  this->columns = is_float64 ? static_cast<const void*>(numbers.data() + shape.matrices * shape.rows)
                             : reinterpret_cast<const float*>(numbers.data()) + shape.matrices * shape.rows;
}

void add_squares(const TensorTask& task, bool is_float64, const FactorSettings& settings, FactoredTensor& factors,
                 int64_t index) {
  const FactorCut& cut = factors.cut;
  const auto [matrices, rows, columns] = factors.shape;
  const int64_t strip = index % cut.strips, group = index / cut.strips % cut.groups;
  FactorPart part;
  part.matrix = index / cut.strips / cut.groups * cut.matrices_of_part;
  part.matrices = std::min(cut.matrices_of_part, matrices - part.matrix);
  part.row = group * cut.rows_of_part;
  part.row_end = std::min(part.row + cut.rows_of_part, rows);
  part.column = strip * cut.columns_of_part;
  part.column_end = std::min(part.column + cut.columns_of_part, columns);
  const auto add = kernels_in_use().add_squares[is_float64];
  if (!cut.is_whole) {
    part.row_sums = &factors.row_sums[(part.matrix * cut.strips + strip) * rows + part.row];
    part.column_sums = &factors.column_sums[(part.matrix * cut.groups + group) * columns + part.column];
    return add(task, factors.shape, part);
  }
  std::vector<double> sums(static_cast<size_t>(part.matrices * (rows + columns)));
  part.row_sums = sums.data();
  part.column_sums = sums.data() + part.matrices * rows;
  add(task, factors.shape, part);
  move(is_float64, settings, factors, part.matrix, part.matrix + part.matrices, {part.row_sums, part.column_sums});
}

void move_factors(bool is_float64, const FactorSettings& settings, FactoredTensor& factors) {
  move(is_float64, settings, factors, 0, factors.shape.matrices, {factors.row_sums.data(), factors.column_sums.data()});
}

}  // namespace trainopt::cpu
