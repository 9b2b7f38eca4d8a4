// The memory of the emulated devices. The host cannot touch it at the addresses that it is known by: whoever tries is
// killed, and told why. It is open while a kernel runs, on the device that the kernel runs on and on no other.
//
// What is given out is poisoned, and so is what comes back, which is kept back for long before it is given out again.
// Behind each allocation lies a margin of poison: a kernel that writes there, or to memory that was given back, is
// found by take_damage().
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

constexpr int kDevices = 2;
constexpr unsigned char kMemoryPoison = 0xff;  // a NaN in every floating-point type

// At a multiple of 512 bytes, as torch's CUDA allocator; null for no bytes.
void* allocate(int device, size_t bytes);
// It is not counted from now on; then it is given back. Both must be called, for what was forked neither does anything.
size_t retire(int device, void* memory);
void release(int device, void* memory);

// Where the host may read and write what lies on a device.
void* host_address(const void* memory);

struct MemoryStatistics {
  uint64_t allocations = 0;                    // since the process began
  size_t allocated_bytes = 0, peak_bytes = 0;  // live ones, as asked for
};
MemoryStatistics memory_statistics(int device);
void reset_peak(int device);

// Descriptions of writes outside of live allocations, since the last call.
std::vector<std::string> take_damage();

// Lets the host's addresses of this device's memory be used while it lives: for a kernel.
class Open {
 public:
  explicit Open(int device);
  ~Open();
  Open(const Open&) = delete;
  Open& operator=(const Open&) = delete;

 private:
  int device_;
};

}  // namespace simt
