#include "python/fresh_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>

#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trainopt::python {
namespace {

constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
constexpr size_t kLarge = size_t(4) << 20;  // bytes; below, the C library hands out warm memory

bool is_wanted() {
  const char* setting = std::getenv("TRAINOPT_HUGE_PAGES");
  return setting == nullptr || std::strcmp(setting, "0") != 0;
}

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  // Advice only: where it cannot be followed, the pages are small ones.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

at::Tensor advised(at::Tensor tensor) {
  static const bool wanted = is_wanted();
  const size_t bytes = tensor.storage().nbytes();
  if (wanted && bytes >= kLarge) advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

}  // namespace

at::Tensor fresh(c10::IntArrayRef sizes, c10::ScalarType dtype) { return advised(at::detail::empty_cpu(sizes, dtype)); }

at::Tensor fresh_like(const at::Tensor& tensor, c10::ScalarType dtype) {
  if (tensor.is_contiguous()) return fresh(tensor.sizes(), dtype);
  return advised(at::empty_like(tensor, tensor.options().dtype(dtype), c10::MemoryFormat::Preserve));
}

}  // namespace trainopt::python
