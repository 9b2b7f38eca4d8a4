#include "torch/cuda_device.h"

#if defined(TRAINOPT_WITH_CUDA) && !defined(TRAINOPT_SIMT)

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAMacros.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <stdexcept>

#include "torch/cuda_architectures.h"

namespace trainopt::aten {
namespace {

int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, what, device));
  return value;
}

// The devices that have been found to run the kernels.
std::array<std::atomic<bool>, C10_COMPILE_TIME_MAX_GPUS> covered{};

// Throws for a device that does not run them. One that does is asked once.
void check_architecture(c10::Device device) {
  std::atomic<bool>& known = covered[static_cast<size_t>(device.index())];
  if (known.load(std::memory_order_relaxed)) return;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device.index());
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device.index());
  if (!covers(cuda_architectures(), major, minor)) {
    cudaDeviceProp properties;
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device.index()));
    throw std::runtime_error(no_kernels_for(properties.name, major, minor, device.str()));
  }
  known.store(true, std::memory_order_relaxed);
}

}  // namespace

cuda::Stream current_stream(c10::Device device) {
  check_architecture(device);
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

bool is_capturing(c10::Device device) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(device.index()).stream(), &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace trainopt::aten

#endif
