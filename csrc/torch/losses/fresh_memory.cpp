#include "torch/losses/fresh_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <list>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trainopt::aten {

#if defined(__linux__)
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kLarge = 2 * kHugePage;  // bytes; below, the C library hands out warm memory

// The value of an environment variable that is a whole number.
size_t setting(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == '\0' ? otherwise : std::strtoull(text, nullptr, 10);
}

size_t rounded(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

// Mapped memory of a whole number of huge pages.
struct Block {
  void* data;
  size_t bytes;
};

Block map(size_t bytes) {
  char* start =
      static_cast<char*>(mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (start == MAP_FAILED) return {nullptr, 0};
  // Only the part that begins on a huge page is kept.
  const size_t before = rounded(reinterpret_cast<uintptr_t>(start)) - reinterpret_cast<uintptr_t>(start);
  if (before != 0) munmap(start, before);
  if (before != kHugePage) munmap(start + before + bytes, kHugePage - before);
  static const bool wants_huge_pages = setting("TRAINOPT_HUGE_PAGES", 1) != 0;
  if (wants_huge_pages) madvise(start + before, bytes, MADV_HUGEPAGE);  // advice: where it fails, pages are small
  return {start + before, bytes};
}

// Blocks that nobody holds, the longest unused first.
class Store {
 public:
  // Never destroyed: tensors may outlive what runs at exit.
  static Store& instance() {
    static Store* const store = new Store;
    return *store;
  }

  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block)
        if (block->bytes == bytes) {
          const Block found = *block;
          blocks_.erase(std::next(block).base());
          total_ -= bytes;
          return found;
        }
    }
    return map(bytes);
  }

  void give(const Block& block) {
    std::list<Block> unwanted;
    if (block.bytes > limit_) {
      unwanted.push_back(block);
    } else {
      madvise(block.data, block.bytes, MADV_FREE);
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks_.push_back(block);
      for (total_ += block.bytes; total_ > limit_; total_ -= unwanted.back().bytes)
        unwanted.splice(unwanted.end(), blocks_, blocks_.begin());
    }
    for (const Block& old : unwanted) munmap(old.data, old.bytes);
  }

 private:
  std::mutex mutex_;
  std::list<Block> blocks_;
  size_t total_ = 0;
  const size_t limit_ = setting("TRAINOPT_KEEP_MEMORY", 1024) << 20;
};

void give_back(void* context) {
  Block* block = static_cast<Block*>(context);
  Store::instance().give(*block);
  delete block;
}

// A storage of at least this size, or none.
c10::Storage kept_storage(size_t bytes) {
  const Block block = Store::instance().take(rounded(bytes));
  if (block.data == nullptr) return {};
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes,
                      c10::DataPtr(block.data, new Block(block), give_back, c10::DeviceType::CPU),
                      c10::GetCPUAllocator(), /*resizable=*/true);
}

}  // namespace

at::Tensor fresh(c10::IntArrayRef sizes, c10::ScalarType dtype) {
  const size_t bytes =
      at::detail::computeStorageNbytesContiguous(sizes, c10::elementSize(dtype));  // raises if too many
  if (bytes >= kLarge)
    if (c10::Storage storage = kept_storage(bytes)) {
      at::Tensor tensor = at::detail::empty_cpu({0}, dtype);
      tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
      tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
      return tensor;
    }
  return at::detail::empty_cpu(sizes, dtype);
}
#else
at::Tensor fresh(c10::IntArrayRef sizes, c10::ScalarType dtype) { return at::detail::empty_cpu(sizes, dtype); }
#endif

at::Tensor fresh_like(const at::Tensor& tensor, c10::ScalarType dtype) {
  if (!tensor.is_cpu() || !tensor.is_non_overlapping_and_dense())
    return at::empty_like(tensor, tensor.options().dtype(dtype), c10::MemoryFormat::Preserve);
  const at::Tensor result = fresh(tensor.sizes(), dtype);
  return result.strides().equals(tensor.strides()) ? result : result.as_strided(tensor.sizes(), tensor.strides());
}

}  // namespace trainopt::aten
