#pragma once

namespace trainopt {

void test_streams();

}  // namespace trainopt
