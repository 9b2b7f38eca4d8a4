#include "device/streams.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <utility>

#include "arena.h"
#include "device/memory.h"
#include "queue.h"
#include "torch/cuda_device.h"

namespace simt {
namespace {

thread_local c10::DeviceIndex current = 0;
thread_local c10::StreamId current_streams[kDevices] = {};
std::atomic<c10::StreamId> last_stream{0};
std::atomic<bool> capture_is_pretended{false};

void* handle_of(c10::DeviceIndex device, c10::StreamId stream) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(stream * kDevices + device + 1));
}
static_assert(kLastLegacyStream == kDevices);

c10::Stream stream_of(c10::DeviceIndex device, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, device_of(device), id);
}

// What torch's own guards, streams and events are made of.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDeviceType; }
  c10::Device exchangeDevice(c10::Device device) const override { return device_of(exchange_device(device.index())); }
  c10::Device getDevice() const override { return device_of(current); }
  void setDevice(c10::Device device) const override { exchange_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Stream getStream(c10::Device device) const override {
    const c10::DeviceIndex index = device.has_index() ? device.index() : current;
    return stream_of(index, current_streams[checked(index)]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream_of(device.index(), 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return stream_of(device.has_index() ? device.index() : current, ++last_stream);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream_of(stream.device_index(), exchange_stream(stream.device_index(), stream.id()));
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return simt::handle_of(stream); }
  bool queryStream(const c10::Stream& stream) const override { return query(last_issued(simt::handle_of(stream))); }
  void synchronizeStream(const c10::Stream& stream) const override { finish_stream(simt::handle_of(stream)); }
  void synchronizeDevice(c10::DeviceIndex device) const override { finish_device(device); }
  // No "override": torch 2.11 has no such function, and does not ask.
  virtual bool isStreamCapturing(const c10::Stream& stream) const { return captures(simt::handle_of(stream)); }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    *static_cast<Event*>(*event) = simt::record(simt::handle_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) wait(simt::handle_of(stream), *static_cast<Event*>(event));
  }
  bool queryEvent(void* event) const override { return event == nullptr || query(*static_cast<Event*>(event)); }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) finish(*static_cast<Event*>(event));
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const c10::Stream& stream) const override {
    record_use(memory, simt::handle_of(stream));
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

}  // namespace

c10::DeviceIndex checked(c10::DeviceIndex device) {
  TORCH_CHECK(0 <= device && device < kDevices, "there is no device simt:", static_cast<int>(device));
  return device;
}

c10::DeviceIndex current_device() { return current; }

c10::DeviceIndex exchange_device(c10::DeviceIndex device) { return std::exchange(current, checked(device)); }

c10::StreamId exchange_stream(c10::DeviceIndex device, c10::StreamId stream) {
  return std::exchange(current_streams[checked(device)], stream);
}

void* handle_of(const c10::Stream& stream) { return handle_of(stream.device_index(), stream.id()); }

void* current_stream_of(c10::Device device) { return handle_of(device.index(), current_streams[device.index()]); }

void* current_stream() { return current_stream_of(device_of(current)); }

c10::Device device_of_stream(const void* handle) {
  return device_of(static_cast<int>((reinterpret_cast<uintptr_t>(handle) - 1) % kDevices));
}

void finish_device(c10::DeviceIndex device) {
  finish_streams([&](const void* stream) { return device_of_stream(stream).index() == device; });
}

bool captures(const void* stream) { return capture_is_pretended || is_capturing(stream); }

void pretend_to_capture(bool on) { capture_is_pretended = on; }

// Waiting -------------------------------------------------------------------------------------------------------------

namespace {

std::atomic<int64_t> waits{0};
std::atomic<bool> waits_are_forbidden{false};
thread_local int fallbacks = 0;

}  // namespace

void synchronise(const std::string& what, const void* stream) {
  if (!is_within_fallback()) {
    ++waits;
    TORCH_CHECK(!capture_is_pretended, what, " waits for the device, which is not permitted while a graph is captured");
    TORCH_CHECK(!waits_are_forbidden, what, " waits for the device");
  }
  finish_stream(stream);
}

int64_t synchronisations() { return waits; }

void forbid_synchronisation(bool forbid) { waits_are_forbidden = forbid; }

WithinFallback::WithinFallback() { ++fallbacks; }
WithinFallback::~WithinFallback() { --fallbacks; }
bool is_within_fallback() { return fallbacks != 0; }

}  // namespace simt

namespace trainopt::aten {

cuda::Stream current_stream(c10::Device device) {
  simt::checked(device.index());
  return static_cast<cuda::Stream>(simt::current_stream_of(device));
}

bool is_capturing(c10::Device device) { return simt::captures(simt::current_stream_of(device)); }

}  // namespace trainopt::aten
