// Arrays in guarded memory, with any layout.
#pragma once

#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "core/tensor_view.h"
#include "formats.h"

namespace trainopt {

// How an array of n elements lies: as one run, or as rows of `columns` with strides.
struct Placement {
  const char* name;
  bool strided;
  int64_t columns;                   // of the rows that the engine walks; n is a multiple
  std::function<void(Layout&)> lay;  // sets the strides for sizes {rows, columns}
  int64_t shift;                     // elements before the first, so that it is not aligned
};

// The elements of one tensor in memory that is guarded on either side and in between.
class Array {
 public:
  Array(DType dtype, int64_t numel, const Placement& placement, bool guarded) : dtype_(dtype), numel_(numel) {
    int64_t extent = numel;
    if (placement.strided) {
      layout_ = {2, {numel / placement.columns, placement.columns}, {}};
      placement.lay(layout_);
      extent = 1;
      for (int d = 0; d < 2; ++d) extent += (layout_.sizes[d] - 1) * layout_.strides[d];
    }
    strided_ = placement.strided;
    const int64_t width = size_of(dtype);
    begin_ = ((guarded ? 32 : 0) + placement.shift) * width;
    size_ = begin_ + (extent + (guarded ? 32 : 0)) * width;
    // Not a vector: the last element ends where the memory does, for AddressSanitizer to see.
    memory_ = static_cast<unsigned char*>(std::malloc(static_cast<size_t>(size_)));
    std::memset(memory_, guard_, static_cast<size_t>(size_));
    // The same in every array: what no engine has written compares equal.
    for (int64_t i = 0; i < numel; ++i) std::memset(place(i), 0xa5, static_cast<size_t>(width));
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(memory_); }

  TensorView view() const {
    TensorView result{};
    result.data = memory_ + begin_;
    result.dtype = dtype_;
    result.layout = strided_ ? &layout_ : nullptr;
    return result;
  }

  double get(int64_t i) const {
    const unsigned char* at = place(i);
    if (dtype_ == DType::kFloat64) return read<double>(at);
    if (dtype_ == DType::kFloat32) return static_cast<double>(read<float>(at));
    return decode16(read<uint16_t>(at), dtype_);
  }

  void set(int64_t i, double value) {
    unsigned char* at = place(i);
    if (dtype_ == DType::kFloat64) return write(at, value);
    if (dtype_ == DType::kFloat32) return write(at, static_cast<float>(value));
    write(at, convert(static_cast<float>(round16(value, dtype_)), dtype_));
  }

  uint64_t bits(int64_t i) const {
    uint64_t result = 0;
    std::memcpy(&result, place(i), static_cast<size_t>(size_of(dtype_)));
    return result;
  }

  // Whether all memory that belongs to no element is as it was.
  bool is_intact() const {
    std::vector<unsigned char> owned(static_cast<size_t>(size_));
    const auto width = static_cast<size_t>(size_of(dtype_));
    for (int64_t i = 0; i < numel_; ++i) std::memset(owned.data() + (place(i) - memory_), 1, width);
    for (int64_t b = 0; b < size_; ++b)
      if (owned[static_cast<size_t>(b)] == 0 && memory_[b] != guard_) return false;
    return true;
  }

 private:
  // What is written beyond the end is often made of what lies there, of several tensors: no two of them have the same,
  // or an average of it would go unseen.
  static unsigned char next_guard() {
    static unsigned made = 0;
    return static_cast<unsigned char>(1 + made++ % 251);
  }

  const unsigned char guard_ = next_guard();
  DType dtype_;
  int64_t numel_, begin_, size_;
  Layout layout_{};
  bool strided_;
  unsigned char* memory_;

  unsigned char* place(int64_t i) const {
    const int64_t offset =
        strided_ ? i / layout_.sizes[1] * layout_.strides[0] + i % layout_.sizes[1] * layout_.strides[1] : i;
    return memory_ + begin_ + offset * size_of(dtype_);
  }
  template <class T>
  static T read(const unsigned char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  template <class T>
  static void write(unsigned char* at, T value) {
    std::memcpy(at, &value, sizeof value);
  }
};

inline Placement run_of(int64_t shift) {
  return {"run", false, 1, [](Layout&) {}, shift};
}
inline const Placement kTransposed{"transposed", true, 3,
                                   [](Layout& l) { l.strides[0] = 1, l.strides[1] = l.sizes[0]; }, 1};
inline const Placement kSliced{"sliced", true, 3, [](Layout& l) { l.strides[0] = 7, l.strides[1] = 2; }, 3};
inline const Placement kExpanded{"expanded", true, 3, [](Layout& l) { l.strides[0] = 0, l.strides[1] = 1; }, 1};

}  // namespace trainopt
