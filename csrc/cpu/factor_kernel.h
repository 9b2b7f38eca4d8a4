// The inner loop over the squares of a gradient, which are added up over rows and over columns in one pass, in double.
#pragma once

#include "core/factored.h"
#include "cpu/norm_kernel.h"
#include "cpu/tile.h"
#include "cpu/vec.h"
#include "rules/stages.h"

namespace trainopt::cpu {
namespace {

// A row's squares are added in so many lanes, whatever the vectors' size, and these in one order.
constexpr int kRowLanes = 8;

// Adds the squares of elements beside each other to their columns' sums, and returns the sum of them.
template <class S>
TRAINOPT_FUNCTION double add_row(const S* direction, int count, double* columns) {
  using T = Vec<double>;
  constexpr int kVectors = kRowLanes / T::kSize;
  T lanes[kVectors];
  for (T& lane : lanes) lane = T(0.0);
  int i = 0;
  for (; i + kRowLanes <= count; i += kRowLanes)
    for (int v = 0; v < kVectors; ++v) {
      const int at = i + v * T::kSize;
      const T x = load_wide(direction + at), square = x * x;
      store(columns + at, load(columns + at) + square);
      lanes[v] = lanes[v] + square;
    }
  double parts[kRowLanes];
  for (int v = 0; v < kVectors; ++v) store(parts + v * T::kSize, lanes[v]);
  for (int width = kRowLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) parts[lane] += parts[lane + width];
  double sum = parts[0];
  for (; i < count; ++i) {
    const double x = static_cast<double>(direction[i]), square = x * x;
    columns[i] += square;
    sum += square;
  }
  return sum;
}

// What the rule will be given as the gradient.
template <class S>
TRAINOPT_FUNCTION const S* direction_tile(const TensorTask& task, const Stages<S>& stages, int64_t at, int count,
                                          S (&buffer)[3][kBlock]) {
  const S* g = load_tile(task.gradient, at, count, buffer[0]);
  if (stages.is_plain() && !stages.decay_gradient) return g;
  const S* p = load_tile(task.param, at, count, buffer[1]);
  for (int i = 0; i < count; ++i) {
    S p_here = p[i], g_here = g[i];
    buffer[2][i] = before_rule<false>(stages, p_here, g_here);
  }
  return buffer[2];
}

template <class S>
void add_squares_kernel(const TensorTask& task, const FactoredShape& shape, const FactorPart& part) {
  const Stages<S> stages = stages_of(*task.scalars, S());
  const int64_t width = part.column_end - part.column, height = part.row_end - part.row;
  const bool is_whole = width == shape.columns;  // its rows are one run
  double* columns = part.column_sums;
  for (int64_t i = 0; i < part.matrices * height; ++i) part.row_sums[i] = 0;
  for (int64_t i = 0; i < part.matrices * width; ++i) columns[i] = 0;
  S buffer[3][kBlock];
  const int64_t first = (part.matrix * shape.rows + part.row) * shape.columns + part.column;
  const int64_t length = is_whole ? part.matrices * height * width : width;
  int64_t row = 0, rows_left = height, column = 0;
  for (int64_t run = 0; run < (is_whole ? 1 : height); ++run) {
    const int64_t begin = first + run * shape.columns, end = begin + length;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int count = static_cast<int>(end - at < kBlock ? end - at : kBlock);
      const S* direction = direction_tile(task, stages, at, count, buffer);
      for (int i = 0; i < count;) {
        const int here = static_cast<int>(width - column < count - i ? width - column : count - i);
        part.row_sums[row] += add_row(direction + i, here, columns + column);
        i += here;
        column += here;
        if (column < width) continue;
        column = 0;
        ++row;
        if (--rows_left > 0) continue;
        rows_left = height;  // the next matrix
        columns += width;
      }
    }
  }
}

}  // namespace
}  // namespace trainopt::cpu
