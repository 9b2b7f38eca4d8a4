// CUDA as torch has it: which tensors lie there, and the current stream.
//
// In a build without the CUDA engine (TRAINOPT_WITH_CUDA) no tensor lies there. In the emulated build of the tests
// (TRAINOPT_SIMT) a device of the tests' own stands for CUDA's: tests/simt/device.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/TensorOptions.h>

#include "core/macros.h"
#include "cuda/stream.h"

// The key that operators are registered under for this device, and that of its autocast.
#if defined(TRAINOPT_SIMT)
#define TRAINOPT_CUDA_KEY PrivateUse1
#define TRAINOPT_AUTOCAST_CUDA_KEY AutocastPrivateUse1
#else
#define TRAINOPT_CUDA_KEY CUDA
#define TRAINOPT_AUTOCAST_CUDA_KEY AutocastCUDA
#endif

namespace trainopt::aten {

constexpr c10::DispatchKey kCudaKey = c10::DispatchKey::TRAINOPT_CUDA_KEY;
inline const c10::DeviceType kCudaDeviceType = c10::dispatchKeyToDeviceType(kCudaKey);

// An ordinary tensor there has these dispatch keys and no others; see kOrdinaryKeys.
inline const uint64_t kOrdinaryCudaKeys = [] {
  const c10::InferenceMode off(false);
  return c10::TensorImpl(c10::DispatchKeySet(kCudaKey), caffe2::TypeMeta::Make<float>(),
                         c10::Device(kCudaDeviceType, 0))
      .key_set()
      .raw_repr();
}();

// A dense, real, materialised CUDA tensor and nothing else, as `is_plain_cpu` has it; false in a build without CUDA.
TRAINOPT_INLINE bool is_plain_cuda(const c10::TensorImpl* tensor) {
#if defined(TRAINOPT_WITH_CUDA)
  const c10::DispatchKeySet keys = tensor->key_set();
  return (keys.raw_repr() & ~kOrdinaryCudaKeys) == 0 && keys.has(kCudaKey);
#else
  (void)tensor;
  return false;
#endif
}

#if defined(TRAINOPT_WITH_CUDA)
// torch's current stream on a device. RuntimeError for a device that the kernels were not built for.
cuda::Stream current_stream(c10::Device);

// Whether that stream is being captured into a CUDA graph.
bool is_capturing(c10::Device);

// Makes a device the current one while it lives: what the engine asks for.
class OnDevice {
 public:
  explicit OnDevice(c10::Device device) : guard_(device), stream(current_stream(device)) {}

 private:
  c10::DeviceGuard guard_;

 public:
  const cuda::Stream stream;
};
#endif

}  // namespace trainopt::aten
