// A torch device of the tests' own, "simt", that stands for CUDA's where there is no GPU: torch's backend PrivateUse1,
// of two devices. Their memory is the arena's, which the host cannot touch; kernels run on the SIMT machine, and what
// trainopt has no kernel for runs on the CPU (fallback.h).
//
// Like CUDA's, it tells when the host waits for the device: in copies that are not asynchronous, and in operators that
// need a value on the host. A launch must be made on the current stream of the current device, and reaches that
// device's memory alone. All that a device does is done in the order of its streams, and late: see queue.h.
//
// Here it is registered with torch and with the SIMT machine.
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Storage.h>

#include <optional>

#include "arena.h"
#include "device/memory.h"
#include "device/pinned_memory.h"
#include "device/streams.h"
#include "queue.h"
#include "simt.h"

namespace simt {
namespace {

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex device) const override { exchange_device(device); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device(); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return exchange_device(device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? current_device() : exchange_device(device);
  }
  bool isPinnedPtr(const void* memory) const override { return is_pinned(memory); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage.unsafeGetStorageImpl(), bytes);
  }
};

// Launches ------------------------------------------------------------------------------------------------------------

// While a kernel runs: its device's memory is open to it.
std::optional<Open>& opened() {
  static std::optional<Open> now;
  return now;
}

void admit(const void* stream) {
  if (stream != current_stream()) report_launch("a launch that is not on the current stream of the current device");
}

void enter(const void* stream) {
  opened().emplace(stream == nullptr ? current_device() : device_of_stream(stream).index());
}

void leave() { opened().reset(); }

const bool is_registered = [] {
  c10::register_privateuse1_backend("simt");
  c10::SetAllocator(kDeviceType, device_allocator());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  set_surroundings({admit, enter, leave});
  set_seed(usual_seed());
  return true;
}();

}  // namespace
}  // namespace simt
