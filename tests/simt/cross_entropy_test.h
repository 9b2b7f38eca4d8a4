// Cross-entropy's kernels on the SIMT machine.
#pragma once

namespace trainopt {

// All problems, or a part of the grid.
void test_cross_entropy(bool all);

}  // namespace trainopt
