#pragma once

namespace trainopt {

void test_pointwise_losses();

}  // namespace trainopt
