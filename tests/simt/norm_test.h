#pragma once

namespace trainopt {

void test_norms();

}  // namespace trainopt
