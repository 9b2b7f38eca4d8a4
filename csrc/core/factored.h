// Matrices of which there is one number for each row and one for each column, as Adafactor has its second moments:
// element (i, j) is the product of the two. A tensor of more than two dimensions is a stack of matrices, which its last
// two dimensions are.
#pragma once

#include <cstdint>

namespace trainopt {

struct FactoredShape {
  int64_t matrices, rows, columns;
};

// The numbers that a step goes by, of its arithmetic's type: those of the first matrix, then of the next.
struct Factored {
  FactoredShape shape;
  const void* rows = nullptr;
  const void* columns = nullptr;
};

// Rows [row, row_end) and columns [column, column_end) of matrices [matrix, matrix + matrices) beside each other, with
// where the sums over them are put: of each matrix's rows one after the other, and of its columns.
struct FactorPart {
  int64_t matrix, matrices, row, row_end, column, column_end;
  double *row_sums, *column_sums;
};

}  // namespace trainopt
