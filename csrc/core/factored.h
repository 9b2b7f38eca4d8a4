// Matrices of which there is one number for each row and one for each column, as Adafactor has its second moments: by
// the product of the two element (i, j) of the gradient is multiplied. A tensor of more than two dimensions is a stack
// of matrices, which its last two dimensions are.
//
// What is kept are moving averages of the means of squares over rows and over columns. A step goes by numbers that
// follow from them, 1 / sqrt(row / mean of the rows) and 1 / sqrt(column): so an element costs two products, and
// neither a root nor a division. Squares are added up in double, in one order on every engine: over a row by pieces of
// 256 columns, one after the other, and in each element i is added to lane i % 32, and the lanes are combined pairwise,
// 16 apart, then 8, ...; over a column by groups of 64 rows, one after the other, and in each row by row. A warp of a
// GPU takes a group's rows of a piece.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/tensor_view.h"

namespace trainopt {

constexpr int64_t kPieceColumns = 256;
constexpr int64_t kGroupRows = 64;
constexpr int kRowLanes = 32;
constexpr int kMeanLanes = 256;  // of the rows' mean: row r is added to lane r % 256

struct FactoredShape {
  int64_t matrices, rows, columns;

  TRAINOPT_INLINE int64_t pieces() const { return (columns + kPieceColumns - 1) / kPieceColumns; }
  TRAINOPT_INLINE int64_t groups() const { return (rows + kGroupRows - 1) / kGroupRows; }
  // Of one matrix: the sums over each row in its first piece, in the next, ...; over each column in its first group,
  // ...
  TRAINOPT_INLINE int64_t row_sums() const { return pieces() * rows; }
  TRAINOPT_INLINE int64_t column_sums() const { return groups() * columns; }
  TRAINOPT_INLINE int64_t numbers() const { return matrices * (rows + columns); }
};

// The numbers that a step goes by, of its arithmetic's type: those of the first matrix, then of the next.
struct Factored {
  FactoredShape shape;
  const void* rows;
  const void* columns;
};

// Which part of a stack of matrices a shard is: rows and columns beside each other, of matrices beside each other.
struct FactoredBlock {
  FactoredShape whole;
  int64_t matrix, row, column;  // the first
};

// With the averages that they are made of, as these are stored. A shard has those of the whole.
struct FactoredViews : Factored {
  TensorView row_average, column_average;
  bool is_shard;
  FactoredBlock block;  // of a shard
};

// An average that a mean is taken into, as torch.lerp has it: from the nearer end.
template <class S>
TRAINOPT_FUNCTION S moved_average(S average, S mean, S weight) {
  const S difference = mean - average;
  return weight < S(0.5) ? average + weight * difference : mean - difference * (S(1) - weight);
}

// The number of a column by its average; and that of a row, by the mean of those of its matrix too, which counts as
// `least` at least.
template <class S>
TRAINOPT_FUNCTION S number_of_column(S average) {
  return static_cast<S>(1 / __builtin_sqrt(static_cast<double>(average)));
}
template <class S>
TRAINOPT_FUNCTION S number_of_row(S average, double mean, double least) {
  return static_cast<S>(1 / __builtin_sqrt(static_cast<double>(average) / (mean < least ? least : mean)));
}

}  // namespace trainopt
