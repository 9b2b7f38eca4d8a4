// The inner loop over the squares of a gradient, which are added up over rows and over columns in one pass, in double.
#pragma once

#include "core/factored.h"
#include "core/sum.h"
#include "cpu/kernel_table.h"
#include "cpu/norm_kernel.h"
#include "cpu/tile.h"
#include "cpu/vec.h"
#include "rules/stages.h"

namespace trainopt::cpu {
namespace {

static_assert(kPieceColumns == kBlock && kRowLanes == kLanes);

// Adds the squares of a row's elements in a piece to their columns' sums, and returns the sum of them.
template <class S>
TRAINOPT_FUNCTION double add_piece(const S* direction, int count, double* columns) {
  using T = Vec<double>;
  constexpr int kVectors = kRowLanes / T::kSize;
  double lanes[kRowLanes];
  int i = 0;
  if (count >= kRowLanes) {
    T sums[kVectors];
    for (T& sum : sums) sum = T(0.0);
    for (; i + kRowLanes <= count; i += kRowLanes)
      for (int v = 0; v < kVectors; ++v) {
        const int at = i + v * T::kSize;
        const T x = load_wide(direction + at), square = x * x;
        store(columns + at, load(columns + at) + square);
        sums[v] = sums[v] + square;
      }
    for (int v = 0; v < kVectors; ++v) store(lanes + v * T::kSize, sums[v]);
  }
  const bool is_begun = i > 0;
  for (int lane = 0; i < count; ++i, ++lane) {
    const double x = static_cast<double>(direction[i]), square = x * x;
    columns[i] += square;
    lanes[lane] = is_begun ? lanes[lane] + square : square;
  }
  combine_pairwise(lanes, kRowLanes, count < kRowLanes ? count : kRowLanes);
  return lanes[0];
}

// What the rule will be given as the gradient.
template <class S>
TRAINOPT_FUNCTION const S* direction_tile(const TensorTask& task, const Stages<S>& stages, int64_t at, int count,
                                          S (&buffer)[3][kBlock]) {
  const S* g = load_tile(task.gradient, at, count, buffer[0]);
  if (stages.keeps_gradient()) return g;
  const S* p = load_tile(task.param, at, count, buffer[1]);
  for (int i = 0; i < count; ++i) {
    S p_here = p[i], g_here = g[i];
    buffer[2][i] = before_rule<false>(stages, p_here, g_here);
  }
  return buffer[2];
}

// Asks for what will be read a row later, which begins where no processor expects it: the rows of a strip are apart.
template <class S>
TRAINOPT_FUNCTION void prefetch_piece(const TensorView& gradient, int64_t at, int count) {
  if (!is_run_of<S>(gradient)) return;
  const char* const piece = reinterpret_cast<const char*>(static_cast<const S*>(gradient.data) + at);
  for (size_t line = 0; line < static_cast<size_t>(count) * sizeof(S); line += 64) __builtin_prefetch(piece + line);
}

template <class S>
void add_squares_kernel(const TensorTask& task, const FactoredShape& shape, const FactorPart& part) {
  const Stages<S> stages = stages_of(*task.scalars, S());
  const int64_t width = part.column_end - part.column;
  // Rows that lie beside each other in memory go into one tile, as many as it has room for.
  const bool is_strip = width < shape.columns;
  const int64_t most_rows = !is_strip && width <= kBlock ? kBlock / width : 1;
  S buffer[3][kBlock];
  for (int64_t m = 0; m < part.matrices; ++m) {
    double* const row_sums = part.row_sums + m * shape.row_sums();
    double* const column_sums = part.column_sums + m * shape.column_sums();
    const int64_t first = (part.matrix + m) * shape.rows;
    for (int64_t group = part.row; group < part.row_end; group += kGroupRows) {
      const int64_t group_end = group + kGroupRows < part.row_end ? group + kGroupRows : part.row_end;
      double* const columns = column_sums + group / kGroupRows * shape.columns;
      for (int64_t c = part.column; c < part.column_end; ++c) columns[c] = 0;
      for (int64_t row = group; row < group_end;) {
        const int64_t rows = group_end - row < most_rows ? group_end - row : most_rows;
        for (int64_t column = part.column; column < part.column_end; column += kBlock) {
          const int count = static_cast<int>(part.column_end - column < kBlock ? part.column_end - column : kBlock);
          const int64_t at = (first + row) * shape.columns + column;
          if (is_strip && row + 1 < part.row_end) prefetch_piece<S>(task.gradient, at + shape.columns, count);
          const S* direction = direction_tile(task, stages, at, static_cast<int>(rows) * count, buffer);
          double* const sums = row_sums + column / kPieceColumns * shape.rows + row;
          for (int64_t r = 0; r < rows; ++r) sums[r] = add_piece(direction + r * count, count, columns + column);
        }
        row += rows;
      }
    }
  }
}

}  // namespace
}  // namespace trainopt::cpu
