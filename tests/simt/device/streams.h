// The emulated devices and their streams, and how often the host waits for them.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <string>

namespace simt {

constexpr c10::DeviceType kDeviceType = c10::DeviceType::PrivateUse1;

inline c10::Device device_of(int index) { return {kDeviceType, static_cast<c10::DeviceIndex>(index)}; }
// An error if there is no such device.
c10::DeviceIndex checked(c10::DeviceIndex);

// Each thread of the host has a current device, and on each device a current stream. What was current is returned.
c10::DeviceIndex current_device();
c10::DeviceIndex exchange_device(c10::DeviceIndex);
c10::StreamId exchange_stream(c10::DeviceIndex, c10::StreamId);

// A stream's handle is what kernels are launched on; never null, which would be CUDA's default stream.
void* handle_of(const c10::Stream&);
void* current_stream_of(c10::Device);
void* current_stream();  // of the current device
c10::Device device_of_stream(const void* handle);

void finish_device(c10::DeviceIndex);

// Whether a stream is being captured into a graph; all of them are while a test pretends so.
bool captures(const void* stream);
void pretend_to_capture(bool);

// Waiting -------------------------------------------------------------------------------------------------------------

// Waits for all that the stream has been given. An error where a test forbids it.
void synchronise(const std::string& what, const void* stream);
int64_t synchronisations();
void forbid_synchronisation(bool);

// While it lives, waiting neither counts nor is forbidden in this thread: torch's fallback to the CPU copies where CUDA
// would not.
class WithinFallback {
 public:
  WithinFallback();
  ~WithinFallback();
  WithinFallback(const WithinFallback&) = delete;
  WithinFallback& operator=(const WithinFallback&) = delete;
};
bool is_within_fallback();

}  // namespace simt
