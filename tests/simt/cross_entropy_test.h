// Cross-entropy's kernels on the SIMT machine.
#pragma once

namespace trainopt {

// All problems, or a part of the grid.
void test_cross_entropy(bool all);

void test_large_rows();

}  // namespace trainopt
