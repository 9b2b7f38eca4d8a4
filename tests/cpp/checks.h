// What every test of the engines counts by, and draws its numbers from.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace trainopt {

inline int passed = 0, failed = 0;

// Ends the program at the twentieth failure.
inline void check(bool good, const std::string& what) {
  ++(good ? passed : failed);
  if (good) return;
  std::printf("FAILED: %s\n", what.c_str());
  if (failed < 20) return;
  std::printf("%d passed, %d failed, and the rest was not run\n", passed, failed);
  std::fflush(stdout);
  std::_Exit(1);
}

// Numbers for the tests, not those under test.
struct RandomNumbers {
  uint64_t state;
  uint64_t next() {
    state += 0x9e3779b97f4a7c15u;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  // Of either sign, sizes of 0.1 to 4, one in eleven a zero.
  double value() {
    const double size = 0.1 + 3.9 * std::pow(static_cast<double>(next() >> 11) * 0x1p-53, 2);
    const int64_t kind = below(11);
    return kind == 0 ? 0 : kind % 2 ? size : -size;
  }
};

}  // namespace trainopt
