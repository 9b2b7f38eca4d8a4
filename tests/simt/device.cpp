// A torch device of the tests' own, "simt", that stands for CUDA's where there is no GPU: torch's backend PrivateUse1,
// of two devices. Their memory is the arena's, which the host cannot touch; kernels run on the SIMT machine, and what
// trainopt has no kernel for runs on the CPU, on copies.
//
// Like CUDA's, it tells when the host waits for the device: in copies that are not asynchronous, and in operators that
// need a value on the host. A launch must be made on the current stream of the current device, and reaches that
// device's memory alone. All that a device does is done in the order of its streams, and late: see queue.h.
#include "device.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/enum_tag.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "arena.h"
#include "deferred.h"
#include "queue.h"
#include "simt.h"
#include "torch/cuda_device.h"

namespace simt {
namespace {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;

c10::Device device_of(int index) { return {kType, static_cast<c10::DeviceIndex>(index)}; }

// Devices and streams -------------------------------------------------------------------------------------------------

thread_local c10::DeviceIndex current_device = 0;
thread_local c10::StreamId current_streams[kDevices] = {};
std::atomic<c10::StreamId> last_stream{0};
std::atomic<bool> capturing{false};

// What kernels are launched on; never null, which would be CUDA's default stream.
void* handle_of(c10::DeviceIndex device, c10::StreamId stream) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(stream * kDevices + device + 1));
}
void* handle_of(const c10::Stream& stream) { return handle_of(stream.device_index(), stream.id()); }
void* current_stream_of(c10::Device device) { return handle_of(device.index(), current_streams[device.index()]); }
static_assert(kLastLegacyStream == kDevices);

c10::DeviceIndex checked(c10::DeviceIndex device) {
  TORCH_CHECK(0 <= device && device < kDevices, "there is no device simt:", static_cast<int>(device));
  return device;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return device_of(current_device); }
  void setDevice(c10::Device device) const override { current_device = checked(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Stream stream_of(c10::DeviceIndex device, c10::StreamId id) const {
    return c10::Stream(c10::Stream::UNSAFE, device_of(device), id);
  }
  c10::Stream getStream(c10::Device device) const override {
    const c10::DeviceIndex index = device.has_index() ? device.index() : current_device;
    return stream_of(index, current_streams[checked(index)]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream_of(device.index(), 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return stream_of(device.has_index() ? device.index() : current_device, ++last_stream);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    c10::StreamId& current = current_streams[checked(stream.device_index())];
    const c10::Stream before = stream_of(stream.device_index(), current);
    current = stream.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return handle_of(stream.device_index(), stream.id());
  }
  bool queryStream(const c10::Stream& stream) const override { return query(last_issued(handle_of(stream))); }
  void synchronizeStream(const c10::Stream& stream) const override { finish_stream(handle_of(stream)); }
  void synchronizeDevice(c10::DeviceIndex device) const override {
    finish_streams([&](const void* stream) { return device_of_stream(stream).index() == device; });
  }
  // No "override": torch 2.11 has no such function, and does not ask.
  virtual bool isStreamCapturing(const c10::Stream& stream) const {
    return capturing || is_capturing(handle_of(stream));
  }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    *static_cast<Event*>(*event) = simt::record(handle_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) wait(handle_of(stream), *static_cast<Event*>(event));
  }
  bool queryEvent(void* event) const override { return event == nullptr || query(*static_cast<Event*>(event)); }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) finish(*static_cast<Event*>(event));
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const c10::Stream& stream) const override;
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// Memory --------------------------------------------------------------------------------------------------------------

// What a graph's tensors lie in: theirs as long as the graph lives, so that each replay finds it.
struct Pool {
  std::shared_ptr<Graph> graph;  // null while it is captured
  std::vector<std::pair<int, void*>> given_back;

  ~Pool() {
    for (const auto& [device, memory] : given_back)
      enqueue_after({graph != nullptr ? last_replay(*graph) : nullptr}, [=] { release(device, memory); });
  }
};

// Memory in use: the stream that it was asked for on, as in torch's caching allocator, and others that have been told
// of.
struct Block {
  const void* stream;
  std::vector<const void*> users;
  std::weak_ptr<Pool> pool;
  std::shared_ptr<bool> has_gone;  // in the capture that it was made in: each replay finds it uninitialised
};

struct Blocks {
  std::mutex mutex;
  std::unordered_map<void*, Block> all;
  std::weak_ptr<Pool> captured;
  const pid_t owner = getpid();
};

Blocks& blocks() {
  static Blocks* const one = new Blocks;
  return *one;
}

void poison(void* memory, size_t bytes) { std::memset(host_address(memory), kMemoryPoison, bytes); }

// Bytes that tensors have given back, and that wait for their streams: not too many.
std::atomic<size_t> waiting_bytes{0};
constexpr size_t kMostWaitingBytes = size_t{16} << 20;

void* allocate_on_stream(int device, size_t bytes) {
  void* memory = allocate(device, bytes);
  if (memory == nullptr) return memory;
  Block block{current_stream_of(device_of(device)), {}, {}, nullptr};
  const std::lock_guard lock(blocks().mutex);
  if (is_capturing(block.stream)) {
    block.pool = blocks().captured;
    const std::shared_ptr<bool> gone = block.has_gone = std::make_shared<bool>(false);
    enqueue(block.stream, [=] {
      if (*gone) poison(memory, bytes);
    });
  }
  blocks().all[memory] = std::move(block);
  return memory;
}

// What has been issued on its streams by now may still use it.
void release_in_order(int device, void* memory) {
  if (memory == nullptr || getpid() != blocks().owner) return;
  size_t bytes = 0;
  {
    const std::lock_guard lock(blocks().mutex);
    const auto found = blocks().all.find(memory);
    const Block block = std::move(found->second);
    blocks().all.erase(found);
    bytes = retire(device, memory);
    const std::shared_ptr<Pool> pool = block.pool.lock();
    std::vector<Event> events;
    const bool in_capture = pool != nullptr && pool->graph == nullptr;
    const auto last = in_capture ? last_captured : last_issued;
    events.push_back(last(block.stream));
    for (const void* user : block.users) events.push_back(last(user));
    if (pool != nullptr) {
      pool->given_back.emplace_back(device, memory);
      if (!in_capture || events.front() == nullptr) return;
      *block.has_gone = true;
      return enqueue_after(events, [=] { poison(memory, bytes); });
    }
    waiting_bytes += bytes;
    enqueue_after(events, [=] {
      release(device, memory);
      waiting_bytes -= bytes;
    });
  }
  if (waiting_bytes > kMostWaitingBytes) finish_all();
}

void Guard::recordDataPtrOnStream(const c10::DataPtr& memory, const c10::Stream& stream) const {
  const std::lock_guard lock(blocks().mutex);
  const auto found = blocks().all.find(memory.get_context());
  if (found != blocks().all.end()) found->second.users.push_back(handle_of(stream));
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const int device = current_device;
    void* memory = allocate_on_stream(device, bytes);
    return {memory, memory, device == 0 ? &release_on<0> : &release_on<1>, device_of(device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_on<0>; }  // what is on device 1 counts as strange
  void copy_data(void* to, const void* from, size_t bytes) const override {
    enqueue(current_stream_of(device_of(current_device)),
            [=] { std::memcpy(host_address(to), host_address(from), bytes); });
  }
  template <int kDevice>
  static void release_on(void* memory) {
    release_in_order(kDevice, memory);
  }
} allocator;
static_assert(kDevices == 2);

void resize_storage(c10::StorageImpl* storage, size_t bytes) {
  const c10::DeviceGuard on(storage->device());
  c10::DataPtr grown = allocator.allocate(bytes);
  if (const size_t kept = std::min(bytes, storage->nbytes()); kept != 0)
    allocator.copy_data(grown.get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(grown));
  storage->set_nbytes(bytes);
}

// Memory of the host's that copies do not wait for. A copy of torch's holds its tensor as torch's allocator does; what
// a kernel writes later than that is lost, and what it reads is poison.
struct PinnedAllocator final : c10::Allocator {
  static std::map<const char*, size_t>& live() {
    static auto* const all = new std::map<const char*, size_t>;
    return *all;
  }
  static std::mutex& mutex() {
    static auto* const one = new std::mutex;
    return *one;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (is_any_capturing()) forbid_while_capturing("operation not permitted when stream is capturing");
    if (bytes == 0) return {nullptr, c10::Device(at::kCPU)};
    char* memory = static_cast<char*>(std::aligned_alloc(512, (bytes + 511) / 512 * 512));
    const std::lock_guard lock(mutex());
    live()[memory] = bytes;
    return {memory, memory, &release_pinned, c10::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  static bool contains(const void* memory) {
    const std::lock_guard lock(mutex());
    auto after = live().upper_bound(static_cast<const char*>(memory));
    return after != live().begin() && (--after, memory < after->first + after->second);
  }

 private:
  static void release_pinned(void* memory) {
    static auto* const kept_back = new std::deque<void*>;
    const std::lock_guard lock(mutex());
    const auto found = live().find(static_cast<char*>(memory));
    std::memset(memory, kMemoryPoison, found->second);
    live().erase(found);
    kept_back->push_back(memory);
    if (kept_back->size() < 1000) return;
    std::free(kept_back->front());
    kept_back->pop_front();
  }
} pinned_allocator;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = checked(device); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(current_device, checked(device));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? current_device : exchangeDevice(device);
  }
  bool isPinnedPtr(const void* memory) const override { return PinnedAllocator::contains(memory); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage.unsafeGetStorageImpl(), bytes);
  }
};

// Waiting for the device ----------------------------------------------------------------------------------------------

std::atomic<int64_t> synchronisations{0};
std::atomic<bool> synchronisation_is_forbidden{false};
thread_local int within_fallback = 0;  // whose copies CUDA would not make

// Waits for what the stream has been given.
void synchronise(const std::string& what, const void* stream) {
  if (within_fallback == 0) {
    ++synchronisations;
    TORCH_CHECK(!capturing, what, " waits for the device, which is not permitted while a graph is captured");
    TORCH_CHECK(!synchronisation_is_forbidden, what, " waits for the device");
  }
  finish_stream(stream);
}

// Operators ----------------------------------------------------------------------------------------------------------

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard on(device);
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard on(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format.has_value()) impl->empty_tensor_restride(*format);
  const size_t needed =
      at::detail::computeStorageNbytesContiguous(size, impl->itemsize(), static_cast<size_t>(impl->storage_offset()));
  c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (impl->numel() != 0 && needed > storage->nbytes()) resize_storage(storage, needed);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  at::native::checkSetStorage(self, source, offset, size, stride);
  at::native::checkInBoundsForStorage(size, stride, offset, self.dtype(), source);
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_offset(offset);
  if (stride.data() != nullptr) {
    impl->set_sizes_and_strides(size, stride);
  } else {
    impl->set_sizes_contiguous(size);
  }
  return self;
}

void copy_on(const void* stream, const at::Tensor& to, const at::Tensor& from) {
  enqueue(stream, [to, from] {
    const Plain plain;
    to.copy_(from);
  });
}

// Between the host and a device, as torch's for CUDA.
void copy_from_host_or_to_it(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool is_from_host = from.device().type() != kType;
  const at::Tensor& host = is_from_host ? from : to;
  const void* const stream = current_stream_of((is_from_host ? to : from).device());
  const bool is_pinned = PinnedAllocator::contains(host.storage().data());
  if (within_fallback == 0 && non_blocking) {
    if (!is_pinned && is_capturing(stream))
      forbid_while_capturing(
          "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned");
    if (is_pinned) return copy_on(stream, on_host(to), on_host(from));
    if (is_from_host) return copy_on(stream, on_host(to), from.clone());
    finish_stream(stream);
  } else {
    synchronise("a copy", stream);
  }
  on_host(to).copy_(on_host(from));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (from.device().type() != to.device().type()) {
    copy_from_host_or_to_it(from, to, non_blocking);
    return to;
  }
  // On the source's stream; that of another device's tensor waits for it, and is waited for.
  const void *const stream = current_stream_of(from.device()), *const other = current_stream_of(to.device());
  if (other != stream) wait(stream, record(other));
  copy_on(stream, on_host(to), on_host(from));
  if (other != stream) wait(other, record(stream));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  synchronise("item()", current_stream_of(self.device()));
  return on_host(self).item();
}

// What CPUs have no kernel for: products of 16-bit matrices into float32.
at::Tensor mm_dtype(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  return at::mm(a.to(dtype), b.to(dtype));
}
at::Tensor& mm_dtype_out(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype, at::Tensor& out) {
  return at::mm_out(out, a.to(dtype), b.to(dtype));
}
at::Tensor addmm_dtype(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                       const at::Scalar& beta, const at::Scalar& alpha) {
  return at::addmm(self.to(dtype), a.to(dtype), b.to(dtype), beta, alpha);
}
at::Tensor& addmm_dtype_out(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                            const at::Scalar& beta, const at::Scalar& alpha, at::Tensor& out) {
  return at::addmm_out(out, self.to(dtype), a.to(dtype), b.to(dtype), beta, alpha);
}

// As CUDA has it, these hand values or sizes to the host.
bool waits(const std::string& name) {
  static const std::set<std::string> all = {"aten::equal",   "aten::is_nonzero", "aten::nonzero", "aten::masked_select",
                                            "aten::_unique", "aten::_unique2",   "aten::bincount"};
  return all.count(name) != 0;
}

// Random numbers are the CPU's generator's, which is asked in the order of the program.
bool draws(const c10::OperatorHandle& op) { return op.hasTag(at::Tag::nondeterministic_seeded); }

// The device of an operator's tensors, or that which it asks for.
c10::Device device_of(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  for (size_t i = stack.size() - op.schema().arguments().size(); i < stack.size(); ++i) {
    const c10::IValue& value = stack[i];
    std::vector<at::Tensor> tensors;
    if (value.isTensor()) tensors = {value.toTensor()};
    if (value.isTensorList()) tensors = value.toTensorVector();
    if (value.isOptionalTensorList())
      for (const auto& t : value.toOptionalTensorVector()) tensors.push_back(t.value_or(at::Tensor()));
    for (const at::Tensor& t : tensors)
      if (t.defined() && t.device().type() == kType) return t.device();
    if (value.isDevice() && value.toDevice().type() == kType && value.toDevice().has_index()) return value.toDevice();
  }
  return device_of(current_device);
}

// By the CPU's kernels: when the stream comes to it, or at once, if nobody knows what it returns.
void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().operator_name().name;
  const c10::DeviceGuard on(device_of(op, *stack));
  const void* const stream = current_stream_of(on.current_device());
  if (waits(name)) {
    synchronise(name, stream);
  } else if ((!draws(op) || is_capturing(stream)) && defer(op, stack, stream)) {
    return;
  }
  if (is_capturing(stream)) forbid_while_capturing("the emulated device cannot capture " + name);
  finish_stream(stream);
  ++within_fallback;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    --within_fallback;
    throw;
  }
  --within_fallback;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

void record_stream(at::Tensor& self, c10::Stream stream) {
  Guard().recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("record_stream", record_stream);
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", static_cast<at::Tensor (*)(const at::Tensor&, at::IntArrayRef)>(at::native::view));
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("mm.dtype", mm_dtype);
  m.impl("mm.dtype_out", mm_dtype_out);
  m.impl("addmm.dtype", addmm_dtype);
  m.impl("addmm.dtype_out", addmm_dtype_out);
}

// Copies see to these themselves; torch's way with them is to copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

// Autocast's lists, which are torch's for CUDA.
#define SIMT_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define SIMT_FLOAT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define SIMT_FLOAT_OUT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define SIMT_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using namespace at::autocast;  // for the macros
  AT_FORALL_LOWER_PRECISION_FP(SIMT_LOWER)
  AT_FORALL_FP32(SIMT_FLOAT)
  AT_FORALL_FP32_SET_OPT_DTYPE(SIMT_FLOAT_OUT)
  AT_FORALL_PROMOTE(SIMT_PROMOTE)
}

// Launches ------------------------------------------------------------------------------------------------------------

// While a kernel runs: its device's memory is open to it.
std::optional<Open>& opened() {
  static std::optional<Open> now;
  return now;
}

void admit(const void* stream) {
  if (stream != current_stream_of(device_of(current_device)))
    report_launch("a launch that is not on the current stream of the current device");
}

void enter(const void* stream) {
  opened().emplace(stream == nullptr ? current_device : device_of_stream(stream).index());
}

void leave() { opened().reset(); }

// That of all tests, if they do not ask for another.
uint64_t usual_seed() {
  const char* const given = std::getenv("TRAINOPT_SIMT_SEED");
  return given == nullptr ? 0 : std::strtoull(given, nullptr, 10);
}

const bool is_registered = [] {
  c10::register_privateuse1_backend("simt");
  c10::SetAllocator(kType, &allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  set_surroundings({admit, enter, leave});
  set_seed(usual_seed());
  return true;
}();

// Graphs --------------------------------------------------------------------------------------------------------------

// As torch.cuda.CUDAGraph.
struct CapturedGraph {
  std::shared_ptr<Pool> pool;

  void capture_begin(const pybind11::args&, const pybind11::kwargs&) {
    TORCH_CHECK(pool == nullptr, "This CUDAGraph instance already owns a captured graph.");
    begin_capture(current_stream_of(device_of(current_device)));
    const std::lock_guard lock(blocks().mutex);
    blocks().captured = pool = std::make_shared<Pool>();
  }
  void capture_end() {
    std::shared_ptr<Pool> mine = std::exchange(pool, nullptr);
    mine->graph = end_capture(current_stream_of(device_of(current_device)));
    pool = std::move(mine);
  }
  void replay() const {
    TORCH_CHECK(pool != nullptr && pool->graph != nullptr,
                "Called CUDAGraph::replay without a preceding successful capture.");
    simt::replay(pool->graph, current_stream_of(device_of(current_device)));
  }
  void reset() { pool = nullptr; }
  static std::pair<int, int> get_pool() { return {0, 0}; }  // not shared: each graph has its own
};

// As torch.cuda.graph: the graph is captured within it, on a stream of its own if none is given.
struct Capturing {
  pybind11::object graph;
  c10::StreamId stream, before = 0;

  void enter() {
    Guard().synchronizeDevice(current_device);
    before = std::exchange(current_streams[current_device], stream);
    try {
      graph.attr("capture_begin")();
    } catch (...) {
      leave();
      throw;
    }
  }
  void exit() {
    try {
      graph.attr("capture_end")();
    } catch (...) {
      leave();
      throw;
    }
    leave();
  }
  void leave() const { current_streams[current_device] = before; }
};

// For tests -----------------------------------------------------------------------------------------------------------

std::vector<std::string> take_texts() {
  abandon_captures();
  finish_all();
  std::vector<std::string> texts = take_damage();
  for (const Fault& fault : take_faults()) texts.push_back(fault.text);
  return texts;
}

// A device's index, of a torch.device, a string, a number, or None for the current one.
int index_of(const pybind11::object& device) {
  if (device.is_none()) return current_device;
  if (pybind11::isinstance<pybind11::int_>(device)) return checked(device.cast<c10::DeviceIndex>());
  const pybind11::object index = pybind11::module_::import("torch").attr("device")(device).attr("index");
  return index.is_none() ? current_device : checked(index.cast<c10::DeviceIndex>());
}

pybind11::dict memory_stats(const pybind11::object& device) {
  const MemoryStatistics now = memory_statistics(index_of(device));
  pybind11::dict result;
  result["allocation.all.allocated"] = now.allocations;
  result["allocated_bytes.all.current"] = now.allocated_bytes;
  result["allocated_bytes.all.peak"] = now.peak_bytes;
  return result;
}

// As torch.cuda.device.
struct OnDevice {
  int wanted, before = 0;
};

// Kernels that write one number at an address, and copy one.
void run_kernel(bool on_current_stream, std::function<void()> body) {
  const void* stream = on_current_stream ? current_stream_of(device_of(current_device)) : nullptr;
  if (begins(1, 1, 0, stream)) launch(1, 1, 0, stream, std::move(body));
}

void write_by_kernel(uintptr_t address, float value, bool on_current_stream) {
  run_kernel(on_current_stream, [=] { *reinterpret_cast<float*>(address) = value; });
}

void copy_by_kernel(uintptr_t from, uintptr_t to, bool on_current_stream) {
  run_kernel(on_current_stream, [=] { *reinterpret_cast<float*>(to) = *reinterpret_cast<const float*>(from); });
}

// As cudaMalloc, beside torch's allocator.
uintptr_t malloc_on_device(size_t bytes) {
  forbid_while_capturing("operation not permitted when stream is capturing");
  return reinterpret_cast<uintptr_t>(allocate(current_device, bytes));
}

}  // namespace

// Views have the memory's address, and no hold on it: work on a stream that comes too late finds what is there then.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.device().type() != kType) return tensor;
  at::Tensor view = at::from_blob(tensor.numel() == 0 ? nullptr : host_address(tensor.const_data_ptr()), tensor.sizes(),
                                  tensor.strides(), tensor.options().device(at::kCPU));
  if (tensor.is_conj()) view = view.conj();
  return tensor.is_neg() ? view._neg_view() : view;
}

c10::Device device_of_stream(const void* stream) {
  return device_of(static_cast<int>((reinterpret_cast<uintptr_t>(stream) - 1) % kDevices));
}

void bind_device(pybind11::module_ parent) {
  namespace py = pybind11;
  auto m =
      parent.def_submodule("simt", "The emulated device of the tests; as torch.simt, what torch.cuda is for CUDA.");
  const auto device = py::arg("device") = py::none();

  // By torch.cuda's names.
  m.def("is_available", [] { return true; });
  m.def("is_initialized", [] { return true; });
  m.def("device_count", [] { return kDevices; });
  m.def("current_device", [] { return static_cast<int>(current_device); });
  m.def("set_device", [](const py::object& to) { current_device = static_cast<c10::DeviceIndex>(index_of(to)); });
  m.def("synchronize", [](const py::object& on) { Guard().synchronizeDevice(index_of(on)); }, device);
  const auto torch_stream = [](const py::object& on) {
    return py::module_::import("torch").attr("Stream")(py::arg("device") = "simt:" + std::to_string(index_of(on)));
  };
  m.def("Stream", torch_stream, device);
  m.def("Event", [] { return py::module_::import("torch").attr("Event")("simt"); });
  m.def("stream", [](const py::object& stream) { return stream; }, py::arg("stream"), "A stream is its own context.");
  m.def(
      "current_stream",
      [](const py::object& on) {
        return py::module_::import("torch").attr("accelerator").attr("current_stream")(device_of(index_of(on)).str());
      },
      device);
  m.def(
      "default_stream",
      [](const py::object& on) {
        return py::module_::import("torch").attr("Stream")(py::arg("stream_id") = 0,
                                                           py::arg("device_index") = index_of(on),
                                                           py::arg("device_type") = static_cast<int>(kType));
      },
      device);
  m.def("empty_cache", [] {});
  m.def("graph_pool_handle", &CapturedGraph::get_pool);
  m.def("is_current_stream_capturing",
        [] { return capturing || is_capturing(current_stream_of(device_of(current_device))); });
  py::class_<CapturedGraph>(m, "CUDAGraph")
      .def(py::init([](const py::args&, const py::kwargs&) { return CapturedGraph{}; }))
      .def("capture_begin", &CapturedGraph::capture_begin)
      .def("capture_end", &CapturedGraph::capture_end)
      .def("replay", &CapturedGraph::replay)
      .def("reset", &CapturedGraph::reset)
      .def("pool", [](CapturedGraph&) { return CapturedGraph::get_pool(); });
  py::class_<Capturing>(m, "graph")
      .def(py::init(
               [torch_stream](const py::object& graph, const py::object&, const py::object& on, const std::string&) {
                 const py::object stream = on.is_none() ? torch_stream(py::none()) : on;
                 return Capturing{graph, stream.attr("stream_id").cast<c10::StreamId>()};
               }),
           py::arg("cuda_graph"), py::arg("pool") = py::none(), py::arg("stream") = py::none(),
           py::arg("capture_error_mode") = "global")
      .def("__enter__", &Capturing::enter)
      .def("__exit__", [](Capturing& self, const py::args&) { self.exit(); });
  m.def("memory_stats", memory_stats, device);
  m.def(
      "memory_allocated", [](const py::object& on) { return memory_statistics(index_of(on)).allocated_bytes; }, device);
  m.def(
      "max_memory_allocated", [](const py::object& on) { return memory_statistics(index_of(on)).peak_bytes; }, device);
  m.def("reset_peak_memory_stats", [](const py::object& on) { reset_peak(index_of(on)); }, device);
  m.def("manual_seed", [](const py::object&) {});  // random numbers come from the CPU's generator
  m.def("manual_seed_all", [](const py::object&) {});
  m.def("_is_in_bad_fork", [] { return false; });
  m.def("get_amp_supported_dtype", [] {
    const py::module_ torch = py::module_::import("torch");
    return py::make_tuple(torch.attr("float16"), torch.attr("bfloat16"));
  });
  py::class_<OnDevice>(m, "device")
      .def(py::init([](const py::object& on) { return OnDevice{index_of(on)}; }))
      .def("__enter__",
           [](OnDevice& self) {
             self.before = current_device;
             current_device = static_cast<c10::DeviceIndex>(self.wanted);
           })
      .def("__exit__",
           [](OnDevice& self, const py::args&) { current_device = static_cast<c10::DeviceIndex>(self.before); });

  // For tests.
  m.def("take_faults", take_texts, "What kernels did that they must not, since the last call.");
  m.def("take_launches", take_launches, "How many blocks each launch since the last call had.");
  m.def("set_blocks", set_blocks, py::arg("only"),
        "Of the launches to come, only these blocks run; all, if it is empty.");
  m.def("skip_launches", skip_launches, py::arg("skip"), "Whether the launches to come do nothing but count.");
  m.def(
      "set_order", [](bool ascending) { set_order(ascending ? Order::kAscending : Order::kDescending); },
      py::arg("ascending"), "The order in which blocks and threads run.");
  m.def("synchronisations", [] { return synchronisations.load(); }, "How often the host has waited for a device.");
  m.def(
      "forbid_synchronisation", [](bool forbid) { synchronisation_is_forbidden = forbid; }, py::arg("forbid"),
      "Whether waiting for a device raises, as under torch.cuda.set_sync_debug_mode('error').");
  m.def(
      "set_capturing", [](bool on) { capturing = on; }, py::arg("capturing"),
      "Whether the streams say that a graph is being captured.");
  m.def(
      "set_seed", [](std::optional<uint64_t> seed) { set_seed(seed.value_or(usual_seed())); },
      py::arg("seed") = py::none(),
      "In which order streams do their work. 0: late, and the latest first; another seed draws; None: as at first.");
  m.def("malloc", malloc_on_device, py::arg("bytes"), "As cudaMalloc: the address of memory that is not torch's.");
  m.def("copy_by_kernel", copy_by_kernel, py::arg("source"), py::arg("target"), py::arg("on_current_stream") = true,
        "Runs a kernel that copies a float32 between two addresses.");
  m.def("write_by_kernel", write_by_kernel, py::arg("address"), py::arg("value"), py::arg("on_current_stream") = true,
        "Runs a kernel that writes a float32 there, as a wrong one might.");
  py::module_::import("atexit").attr("register")(py::cpp_function(finish_all));  // what was launched shows its faults
  py::module_::import("torch").attr("_register_device_module")("simt", m);
}

}  // namespace simt

namespace trainopt::aten {

cuda::Stream current_stream(c10::Device device) {
  using namespace simt;
  return static_cast<cuda::Stream>(handle_of(checked(device.index()), current_streams[device.index()]));
}

bool is_capturing(c10::Device device) { return simt::capturing || simt::is_capturing(simt::current_stream_of(device)); }

}  // namespace trainopt::aten
