#include "torch/losses/findings.h"

#if defined(TRAINOPT_WITH_CUDA)
#include <ATen/ops/zeros.h>

#include <atomic>
#include <map>
#include <mutex>

#include "torch/cuda_device.h"
#include "torch/losses/cross_entropy_target.h"
#endif

namespace trainopt::aten {

#if defined(TRAINOPT_WITH_CUDA)

namespace {

// The findings of one device. They live as long as the process, so that a captured graph can be replayed at any time.
class Watch {
 public:
  explicit Watch(const c10::Device& device) : device_(device) {
    static_assert(sizeof(Findings) % sizeof(int64_t) == 0);
    const auto pinned = at::TensorOptions(at::kLong).pinned_memory(true);
    memory_ = at::zeros({static_cast<int64_t>(sizeof(Findings) / sizeof(int64_t))}, pinned);
    findings_ = static_cast<Findings*>(memory_.mutable_data_ptr());
  }

  Findings* memory() { return findings_; }

  void check() {
    if (take(&findings_->bad_target.found) != 0) {
      const cuda::BadTarget bad = findings_->bad_target;
      TORCH_CHECK_INDEX(false, "target ", bad.value, " at position ",
                        position({bad.position, static_cast<size_t>(bad.ndim)}), " is out of range for ", bad.classes,
                        " classes (found by an earlier call on ", device_, ")");
    }
    const int64_t bad = take(&findings_->bad_probability);
    TORCH_CHECK(bad == 0, "all elements of ", bad == 2 ? "target" : "input",
                " should be between 0 and 1 (found by an earlier binary_cross_entropy on ", device_, ")");
  }

 private:
  c10::Device device_;
  at::Tensor memory_;
  Findings* findings_;

  // What a kernel has written, or 0; then it is cleared.
  static int64_t take(volatile int64_t* found) {
    const int64_t value = *found;
    if (value == 0) return 0;
    std::atomic_thread_fence(std::memory_order_acquire);
    *found = 0;
    return value;
  }
};

struct Watches {
  std::mutex mutex;
  std::map<c10::DeviceIndex, Watch> of_device;
};

Watches& watches() {
  static Watches* const all = new Watches;  // never destroyed: kernels may still run at exit
  return *all;
}

}  // namespace

Findings* findings_of(c10::Device device) {
  const std::lock_guard lock(watches().mutex);
  auto found = watches().of_device.find(device.index());
  if (found == watches().of_device.end()) {
    if (is_capturing(device)) return nullptr;
    found = watches().of_device.emplace(device.index(), Watch(device)).first;
  }
  return found->second.memory();
}

void check_findings_on(c10::Device device) {
  const std::lock_guard lock(watches().mutex);
  const auto found = watches().of_device.find(device.index());
  if (found != watches().of_device.end()) found->second.check();
}

void check_findings() {
  const std::lock_guard lock(watches().mutex);
  for (auto& [index, watch] : watches().of_device) watch.check();
}

#else

void check_findings() {}

#endif

}  // namespace trainopt::aten
