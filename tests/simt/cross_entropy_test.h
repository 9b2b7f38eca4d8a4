// Cross-entropy's kernels on the SIMT machine.
#pragma once

namespace trainopt {

void test_cross_entropy();

}  // namespace trainopt
