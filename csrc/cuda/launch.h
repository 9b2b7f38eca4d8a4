// The one way in which a kernel is started, and what kernels may use: CUDA's own headers, or the SIMT machine of the
// tests, which runs the same sources on the CPU.
//
// Kernels use the few built-ins that both have: the index of thread and block, barriers, warp shuffles and votes, and
// shared memory declared by TRAINOPT_SHARED (an array of a fixed size) or TRAINOPT_DYNAMIC_SHARED.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/stream.h"

#if defined(TRAINOPT_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>
#define TRAINOPT_SHARED(T, name, count) __shared__ T name[count]
#define TRAINOPT_DYNAMIC_SHARED(T, name) extern __shared__ T name[]
#endif

namespace trainopt::cuda {

// How many bytes of parameters a kernel may have: 32,764 from CUDA 12.1 on, with a driver that is as new. Every driver
// for CUDA 13 is.
#if !defined(TRAINOPT_PARAMETER_BYTES)
#if defined(CUDART_VERSION) && CUDART_VERSION >= 13000
#define TRAINOPT_PARAMETER_BYTES 32764
#else
#define TRAINOPT_PARAMETER_BYTES 4096
#endif
#endif
constexpr size_t kParameterBytes = TRAINOPT_PARAMETER_BYTES;

struct Shape {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;  // dynamic
};

// Shared memory that the blocks on a multiprocessor of the current device can have together.
inline int64_t shared_bytes_of_multiprocessor() {
#if defined(TRAINOPT_SIMT)
  return simt::kMultiprocessorSharedBytes;
#else
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (device < kDevices && (bytes = known[device].load(std::memory_order_relaxed)) > 0) return bytes;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (device < kDevices) known[device].store(bytes, std::memory_order_relaxed);
  return bytes;
#endif
}

// Starts a kernel; throws std::runtime_error if CUDA refuses it, or tells of an earlier one's fault. The arguments are
// copied before this returns.
template <class... Parameters, class... Arguments>
void launch([[maybe_unused]] const char* name, void (*kernel)(Parameters...), Shape shape, Stream stream,
            const Arguments&... arguments) {
  static_assert((size_t{0} + ... + sizeof(Arguments)) <= kParameterBytes, "more than a kernel's parameters may take");
#if defined(TRAINOPT_SIMT)
  if (!simt::begins(shape.blocks, shape.threads, shape.shared_bytes, stream)) return;
  // tests break this: a table that is gone before its launch runs
  simt::launch(shape.blocks, shape.threads, shape.shared_bytes, stream, [=] { kernel(arguments...); });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(shape.blocks);
  config.blockDim = static_cast<unsigned>(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  constexpr size_t kUnasked = 40 * 1024;  // 48 KB with a kernel's own arrays; more has to be asked for
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > kUnasked)
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shape.shared_bytes));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // said here, and not to whoever asks next
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error) + " (told when trainopt's kernel " + name +
                           " was to start; a fault in a kernel is told of later, so it may be that of an earlier one,"
                           " of whatever library: CUDA_LAUNCH_BLOCKING=1 shows which)");
#endif
}

}  // namespace trainopt::cuda
