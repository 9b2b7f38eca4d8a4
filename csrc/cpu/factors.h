// Moving averages of the gradient's squares over each row and each column of a matrix, for rules that have these in
// place of an average for each element. They are moved on before the reduce phase, by one more pass over the gradient:
// `add_squares` for every part of a tensor, in any order and by any thread; then, where parts are not whole matrices,
// `move_factors`.
#pragma once

#include <cstdint>
#include <vector>

#include "core/factored.h"
#include "core/tensor_view.h"
#include "cpu/engine.h"

namespace trainopt::cpu {

// How a tensor is cut into parts, which depends on nothing but its shape: so sums have the same bits for any number of
// threads. A part is some whole matrices, which need nothing of other parts; or some rows of a strip of one matrix's
// columns, whose sums stay in the nearest cache.
struct FactorCut {
  bool is_whole;
  int64_t matrices_of_part, rows_of_part, columns_of_part;
  int64_t stacks, groups, strips;  // of matrices; and of one matrix, groups of rows and strips of columns

  explicit FactorCut(const FactoredShape& shape);
  int64_t parts() const { return stacks * groups * strips; }
};

// The parameter's averages, and what a step makes of them.
struct FactoredTensor : Factored {
  TensorView row_average, column_average;
  FactorCut cut;
  // Sums of squares of each row within each strip, and of each column within each group of rows; none where parts are
  // whole matrices, of which there may be nearly as many rows and columns as there are elements.
  std::vector<double> row_sums, column_sums;
  std::vector<double> numbers;  // the memory of `rows` and `columns`

  FactoredTensor(const FactoredShape& shape, const TensorView& row_average, const TensorView& column_average,
                 bool is_float64);
  FactoredTensor(const FactoredTensor&) = delete;
};

inline FactoredTensor& factors_of(const TensorTask& task, int state) {
  return *static_cast<FactoredTensor*>(task.state[state].data);
}

void add_squares(const TensorTask& task, bool is_float64, const FactorSettings& settings, FactoredTensor& factors,
                 int64_t part);
void move_factors(bool is_float64, const FactorSettings& settings, FactoredTensor& factors);

}  // namespace trainopt::cpu
