#include "torch/optim/step_memory.h"

#include <c10/core/CPUAllocator.h>

#include <algorithm>

#include "torch/cuda_device.h"
#include "torch/inspect.h"
#include "torch/layout.h"

namespace trainopt::aten {
namespace {

// Whether torch's allocator has made this storage's memory, and gives it to nobody else.
bool is_allocated(const c10::StorageImpl* storage) {
  const auto was_made_by = [&](c10::DeleterFnPtr own) {
    return own != nullptr && storage->data_ptr().get_deleter() == own;
  };
  if (storage->device_type() == c10::DeviceType::CPU) {
    static const c10::DeleterFnPtr on_cpu = c10::GetCPUAllocator()->raw_deleter();
    return was_made_by(on_cpu);
  }
  if (storage->device_type() != kCudaDeviceType) return false;
  static const c10::DeleterFnPtr on_device = c10::GetAllocator(kCudaDeviceType)->raw_deleter();
  return was_made_by(on_device);
}

// Nothing but the gradient that this tensor is: it may itself be a state as well, which is another owner.
bool is_alone(const c10::TensorImpl* tensor) {
  const c10::StorageImpl* storage = storage_of(tensor);
  return c10::raw::intrusive_ptr::use_count(const_cast<c10::TensorImpl*>(tensor)) == 1 &&
         c10::raw::intrusive_ptr::use_count(const_cast<c10::StorageImpl*>(storage)) == 1 && is_allocated(storage);
}

// Where a tensor's elements lie; nothing for one that has none, or whose memory is its own affair.
bool find_span(const c10::TensorImpl* tensor, const char** begin, const char** end) {
  if (tensor == nullptr || tensor->numel() == 0 || tensor->key_set().has(c10::DispatchKey::Python) ||
      tensor->layout() != c10::kStrided || !tensor->has_storage())
    return false;
  const void* data = storage_of(tensor)->data();
  if (data == nullptr) return false;
  const auto itemsize = static_cast<int64_t>(tensor->dtype().itemsize());
  *begin = static_cast<const char*>(data) + tensor->storage_offset() * itemsize;
  *end = *begin + extent_of(tensor) * itemsize;
  return true;
}

}  // namespace

void StepMemory::clear() {
  spans_ = 0;
  owns_written_ = true;
  read_.clear();
}

void StepMemory::note_span(const Span& span) {
  if (spans_ == written_.size()) written_.push_back({});
  Span& then = written_[spans_++];
  if (then.begin == span.begin && then.end == span.end && then.tensor == span.tensor) return;
  then = span;
  sorted_is_current_ = false;
}

void StepMemory::note_written(const c10::TensorImpl* tensor, uint32_t index) {
  Span span{nullptr, nullptr, index};
  if (!find_span(tensor, &span.begin, &span.end)) return;
  note_span(span);
  owns_written_ = owns_written_ && is_allocated(storage_of(tensor));
}

void StepMemory::note_read(const c10::TensorImpl* tensor, uint32_t index) {
  Span span{nullptr, nullptr, index};
  if (find_span(tensor, &span.begin, &span.end)) read_.push_back({span, is_alone(tensor)});
}

// Sorts what is written, which has seldom moved since the last step, and finds what is written twice.
void StepMemory::sort_written() {
  written_.resize(spans_);
  sorted_ = written_;
  std::sort(sorted_.begin(), sorted_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  furthest_.resize(spans_);
  writers_.clear();
  size_t last = 0;  // the one that reaches furthest
  for (size_t i = 0; i < sorted_.size(); ++i) {
    if (i > 0 && sorted_[i].begin < sorted_[last].end) {
      writers_.push_back(sorted_[i].tensor);
      writers_.push_back(sorted_[last].tensor);
    }
    if (sorted_[i].end > sorted_[last].end) last = i;
    furthest_[i] = sorted_[last].end;
  }
  sorted_is_current_ = true;
}

// Calls `use` with all that is written where `span` lies, until it returns false.
template <class Use>
void StepMemory::for_each_written(const Span& span, Use use) const {
  const auto begins_before = [](const Span& written, const char* end) { return written.begin < end; };
  const auto after = std::lower_bound(sorted_.begin(), sorted_.end(), span.end, begins_before);
  for (auto i = static_cast<size_t>(after - sorted_.begin()); i > 0 && furthest_[i - 1] > span.begin; --i)
    if (sorted_[i - 1].end > span.begin && !use(sorted_[i - 1])) return;
}

const Indices& StepMemory::sharing() {
  if (!sorted_is_current_ || spans_ != written_.size()) sort_written();
  sharing_ = writers_;
  for (const Reading& reading : read_) {
    if (reading.alone && owns_written_) continue;
    for_each_written(reading, [&](const Span& written) {
      sharing_.push_back(reading.tensor);
      sharing_.push_back(written.tensor);
      return true;
    });
  }
  std::sort(sharing_.begin(), sharing_.end());
  sharing_.erase(std::unique(sharing_.begin(), sharing_.end()), sharing_.end());
  return sharing_;
}

bool StepMemory::is_clear(const c10::TensorImpl* gradient) const {
  Span span{nullptr, nullptr, 0};
  if (!find_span(gradient, &span.begin, &span.end) || (owns_written_ && is_alone(gradient))) return true;
  bool clear = true;
  for_each_written(span, [&](const Span&) { return clear = false; });
  return clear;
}

}  // namespace trainopt::aten
