// Elements that are not stored, but the products of a row's number and a column's: see core/factored.h.
#pragma once

#include "core/factored.h"
#include "cuda/access.h"
#include "rules/rule.h"

namespace trainopt::cuda {
namespace {

// Which role of a parameter's tensors is such a state; -1: none.
template <class Rule, StateSet kSet>
TRAINOPT_INLINE constexpr int factored_role() {
  int role = 2;
  for (int s = 0; s < kStateCount<Rule>; ++s) {
    if (!contains(kSet, s)) continue;
    if (contains(kFactorStates<Rule>, s)) return role;
    ++role;
  }
  return -1;
}
template <class Rule, StateSet kSet>
constexpr int kFactoredRole = factored_role<Rule, kSet>();

// Walks the elements of a stack of matrices, which lies on the device, from element `at` on.
template <class S>
class FactoredWalk {
 public:
  __device__ __forceinline__ FactoredWalk(const Factored& of, int64_t at) : shape_(of.shape) {
    int64_t row, matrix;
    // Most tensors are small enough for 32 bits, in which a division takes a fifth of the instructions.
    if ((at | shape_.columns | shape_.rows) <= 0x7fffffff) {
      const auto place = static_cast<uint32_t>(at), columns = static_cast<uint32_t>(shape_.columns);
      row = place / columns;
      column_ = place % columns;
      matrix = static_cast<uint32_t>(row) / static_cast<uint32_t>(shape_.rows);
    } else {
      row = at / shape_.columns;
      column_ = at % shape_.columns;
      matrix = row / shape_.rows;
    }
    row_of_matrix_ = row - matrix * shape_.rows;
    of_row_ = static_cast<const S*>(of.rows) + row;
    of_columns_ = static_cast<const S*>(of.columns) + matrix * shape_.columns;
  }

  __device__ __forceinline__ S value() const { return *of_row_ * of_columns_[column_]; }
  __device__ __forceinline__ void advance(int by) {
    column_ += by;
    while (column_ >= shape_.columns) {  // tests break this: a matrix with a row too long
      column_ -= shape_.columns;
      ++of_row_;
      if (++row_of_matrix_ < shape_.rows) continue;
      row_of_matrix_ = 0;
      of_columns_ += shape_.columns;  // tests break this: a stack of one matrix's columns
    }
  }

 private:
  FactoredShape shape_;
  int64_t column_, row_of_matrix_;
  const S *of_row_, *of_columns_;
};

template <class S>
__device__ __forceinline__ S factored_one(const void* factored, int64_t at) {
  return FactoredWalk<S>(*static_cast<const Factored*>(factored), at).value();
}

// Several, `step` apart, of which the first `count` exist, one at least; the others are 0.
template <class S, int kCount>
__device__ __forceinline__ void factored_apart(const void* factored, int64_t at, int step, int count,
                                               S (&value)[kCount]) {
  FactoredWalk<S> walk(*static_cast<const Factored*>(factored), at);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    value[i] = i < count ? walk.value() : S(0);
    if (i + 1 < count) walk.advance(step);
  }
}

}  // namespace
}  // namespace trainopt::cuda
