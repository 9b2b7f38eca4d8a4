// Cross-entropy for few classes, whose rows are shorter than what a vector is worth: rows are turned into columns
// first.
#pragma once

#include "cpu/cross_entropy_columns.h"

namespace trainopt::cpu {
namespace {

constexpr int kFewClasses = 64;
constexpr int kSquare = 8;
static_assert(kFewClasses % kSquare == 0 && kLanes % kSquare == 0);

// Turns a square of numbers, whose rows are `from[0]`, `from[1]`, ..., into one with rows `to[0]`, ...
template <class S>
TRAINOPT_FUNCTION void transpose(const S* const (&from)[kSquare], S* const (&to)[kSquare]) {
  for (int i = 0; i < kSquare; ++i)
    for (int k = 0; k < kSquare; ++k) to[k][i] = from[i][k];
}
#if defined(__AVX2__)
// In three steps of eight shuffles. With a load and a store for each number a loss of 32 classes took 1.26 times as
// long.
TRAINOPT_FUNCTION void transpose(const float* const (&from)[kSquare], float* const (&to)[kSquare]) {
  __m256 rows[kSquare], pairs[kSquare], fours[kSquare];
  for (int i = 0; i < kSquare; ++i) rows[i] = _mm256_loadu_ps(from[i]);
  for (int i = 0; i < kSquare; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kSquare; i += 4)
    for (int half = 0; half < 2; ++half) {
      fours[i + 2 * half] = _mm256_shuffle_ps(pairs[i + half], pairs[i + half + 2], 0x44);
      fours[i + 2 * half + 1] = _mm256_shuffle_ps(pairs[i + half], pairs[i + half + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to[i], _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    _mm256_storeu_ps(to[i + 4], _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
  }
}
#endif

// Up to kLanes rows, class by class.
template <class S>
class Transposed {
 public:
  explicit Transposed(const CrossEntropyTask& task) : classes_(static_cast<int>(task.classes)) {}

  Columns columns() { return {{values_, nullptr, kDTypeOf<S>}, 0, kLanes}; }

  void read(const Rows& from, int64_t first_row, int count) {
    S buffers[kSquare][kFewClasses];
    static const S zeros[kFewClasses] = {};
    for (int first = 0; first < kLanes; first += kSquare) {
      const S* rows[kSquare];
      for (int i = 0; i < kSquare; ++i)
        rows[i] = first + i < count ? load_row_tile(from, first_row + first + i, 0, classes_, buffers[i]) : zeros;
      for_each_square(first, [&](int c, S* const* columns) {
        const S* square[kSquare];
        S* turned[kSquare];
        for (int i = 0; i < kSquare; ++i) square[i] = rows[i] + c, turned[i] = columns[i];
        transpose(square, turned);
      });
      for_each_single(first, kSquare, [&](int i, int c, S& value) { value = rows[i][c]; });
    }
  }

  void write(const Rows& to, int64_t first_row, int count) {
    const TensorView view{to.data, nullptr, to.dtype};
    S buffers[kSquare][kFewClasses];
    for (int first = 0; first < count; first += kSquare) {
      const int here = count - first < kSquare ? count - first : kSquare;
      const auto place = [&](int i) { return (first_row + first + i) * to.stride; };
      S* rows[kSquare];
      for (int i = 0; i < kSquare; ++i)
        rows[i] = is_run_of<S>(view) && i < here ? static_cast<S*>(to.data) + place(i) : buffers[i];
      for_each_square(first, [&](int c, S* const* columns) {
        const S* square[kSquare];
        S* turned[kSquare];
        for (int i = 0; i < kSquare; ++i) square[i] = columns[i], turned[i] = rows[i] + c;
        transpose(square, turned);
      });
      for_each_single(first, here, [&](int i, int c, S& value) { rows[i][c] = value; });
      for (int i = 0; i < here; ++i) store_tile(view, place(i), classes_, rows[i]);
    }
  }

 private:
  const int classes_;
  S values_[kFewClasses * kLanes];

  S* column(int c, int first) { return values_ + c * kLanes + first; }

  // Calls use(class, columns) for squares of the rows from `first` on. The last may overlap the one before it: both
  // have the same there.
  template <class Use>
  TRAINOPT_INLINE void for_each_square(int first, Use use) {
    if (classes_ < kSquare) return;
    for (int c = 0; c < classes_; c += kSquare) {
      const int begin = c + kSquare <= classes_ ? c : classes_ - kSquare;
      S* columns[kSquare];
      for (int i = 0; i < kSquare; ++i) columns[i] = column(begin + i, first);
      use(begin, columns);
    }
  }

  // Calls use(row, class, value) for each number where there are fewer classes than a square has.
  template <class Use>
  TRAINOPT_INLINE void for_each_single(int first, int count, Use use) {
    if (classes_ >= kSquare) return;
    for (int c = 0; c < classes_; ++c)
      for (int i = 0; i < count; ++i) use(i, c, column(c, first)[i]);
  }
};

template <class S>
void few_classes_forward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  Transposed<S> logits(task), probabilities(task);
  for (int64_t row = first_row; row < last_row; row += kLanes) {
    const int count = static_cast<int>(last_row - row < kLanes ? last_row - row : kLanes);
    logits.read(task.logits, row, count);
    if (task.labels == nullptr) probabilities.read(task.probabilities, row, count);
    columns_forward<S>(task, logits.columns(), probabilities.columns(), row, count);
  }
}

template <class S>
void few_classes_backward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  Transposed<S> logits(task), probabilities(task);
  for (int64_t row = first_row; row < last_row; row += kLanes) {
    const int count = static_cast<int>(last_row - row < kLanes ? last_row - row : kLanes);
    logits.read(task.logits, row, count);
    if (task.labels == nullptr) probabilities.read(task.probabilities, row, count);
    columns_backward<S>(task, logits.columns(), probabilities.columns(), logits.columns(), row, count);
    logits.write(task.gradient, row, count);
  }
}

}  // namespace
}  // namespace trainopt::cpu
