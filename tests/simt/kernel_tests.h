// What the tests of the kernels share: their parts, each a file, that the program of engine_test.cpp runs, and what
// they check by.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../cpp/checks.h"
#include "simt.h"

namespace trainopt {

void test_norms();
void test_pointwise_losses();
void test_cross_entropy(bool all);  // all problems, or a part of the grid
void test_cross_entropy_edges();
void test_large_rows();
void test_streams();
void test_steps_in_two_parts();
void test_stats();
void test_factors();

inline void check_no_faults(const std::string& what) {
  const std::vector<simt::Fault> faults = simt::take_faults();
  check(faults.empty(), what + ": " + (faults.empty() ? "" : faults[0].text));
}

// Zeros in 16 bits, more of them than there is memory for: only what is touched takes any. Null if it is refused.
class Reserved {
 public:
  explicit Reserved(int64_t count) : bytes_(static_cast<size_t>(count) * sizeof(uint16_t)) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory != MAP_FAILED) memory_ = static_cast<uint16_t*>(memory);
  }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  ~Reserved() {
    if (memory_ != nullptr) munmap(memory_, bytes_);
  }

  explicit operator bool() const { return memory_ != nullptr; }
  uint16_t* get() const { return memory_; }
  uint16_t& operator[](int64_t i) const { return memory_[i]; }

 private:
  size_t bytes_;
  uint16_t* memory_ = nullptr;
};

}  // namespace trainopt
