// Moving averages of the gradient's squares over each row and each column of a matrix, for rules that have these in
// place of an average for each element. They are moved on before the reduce phase, by one more pass over the gradient:
// `add_squares` for every part of a tensor, in any order and by any thread; then, where parts are not whole matrices,
// `move_factors`. Of shards the sums are brought together in between: by `total_squares`, and over the processes.
#pragma once

#include <cstdint>
#include <vector>

#include "core/factored.h"
#include "core/tensor_view.h"
#include "cpu/engine.h"

namespace trainopt::cpu {

// How a tensor is cut into parts. A part is some whole matrices, which need nothing of other parts; or a group of one
// matrix's rows within a strip of its columns, whose sums stay in the nearest cache.
struct FactorCut {
  bool is_whole;  // matrices are not cut, and need no sums but those of a part
  int64_t matrices_of_part, rows_of_part, columns_of_part;
  int64_t stacks, groups, strips;  // of matrices; and of one matrix, groups of rows and strips of columns

  FactorCut(const FactoredShape& shape, bool is_shard);
  int64_t parts() const { return stacks * groups * strips; }
};

// The parameter's averages, and what a step makes of them.
struct FactoredTensor : FactoredViews {
  FactorCut cut;
  // The sums of each matrix; none where parts are whole matrices, of which there may be nearly as many rows and columns
  // as there are elements.
  std::vector<double> row_sums, column_sums;
  std::vector<double> numbers;   // the memory of `rows` and `columns`
  std::vector<double> of_whole;  // of a shard: the numbers of the whole

  // `shard`: which part of the whole it is, or null.
  FactoredTensor(const FactoredShape& of, const TensorView& row_average, const TensorView& column_average,
                 const FactoredBlock* shard)
      : FactoredViews{{of, nullptr, nullptr},
                      row_average,
                      column_average,
                      shard != nullptr,
                      shard == nullptr ? FactoredBlock{} : *shard},
        cut(of, is_shard) {}
  FactoredTensor(const FactoredTensor&) = delete;

  // Makes room for a step's numbers and sums, which `add_squares` needs. A tensor that is only looked at has none.
  void reserve(bool is_float64);
};

inline FactoredTensor& factors_of(const TensorTask& task, int state) {
  return *static_cast<FactoredTensor*>(task.state[state].data);
}

void add_squares(const TensorTask& task, bool is_float64, const FactorSettings& settings, FactoredTensor& factors,
                 int64_t part);
void move_factors(bool is_float64, const FactorSettings& settings, FactoredTensor& factors);

// Of a shard. What it adds to the sums over the whole's rows and columns, all of its matrices' rows first: as many
// doubles as `block.whole` has numbers, which are 0 before. Then, with the sums over all shards, the averages of the
// whole are moved on, and its own numbers made.
void total_squares(const FactoredTensor& factors, double* totals);
void move_factors_by(const double* totals, bool is_float64, const FactorSettings& settings, FactoredTensor& factors);

}  // namespace trainopt::cpu
