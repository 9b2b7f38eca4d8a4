// Cross-entropy for few classes, whose rows are shorter than what a vector is worth: rows are turned into columns
// first.
#pragma once

#include "cpu/cross_entropy_columns.h"

namespace trainopt::cpu {
namespace {

constexpr int kFewClasses = 64;

// Up to kLanes rows, class by class.
template <class S>
class Transposed {
 public:
  explicit Transposed(const CrossEntropyTask& task) : classes_(static_cast<int>(task.classes)) {}

  Columns columns() { return {{values_, nullptr, kDTypeOf<S>}, 0, kLanes}; }

  void read(const Rows& from, int64_t first_row, int count) {
    S row[kFewClasses];
    for (int i = 0; i < kLanes; ++i) {
      if (i >= count) {
        for (int c = 0; c < classes_; ++c) values_[c * kLanes + i] = S(0);
        continue;
      }
      const S* values = load_row_tile(from, first_row + i, 0, classes_, row);
      for (int c = 0; c < classes_; ++c) values_[c * kLanes + i] = values[c];
    }
  }

  void write(const Rows& to, int64_t first_row, int count) const {
    const TensorView view{to.data, nullptr, to.dtype};
    S row[kFewClasses];
    for (int i = 0; i < count; ++i) {
      const int64_t place = (first_row + i) * to.stride;
      S* out = is_run_of<S>(view) ? static_cast<S*>(to.data) + place : row;
      for (int c = 0; c < classes_; ++c) out[c] = values_[c * kLanes + i];
      store_tile(view, place, classes_, out);
    }
  }

 private:
  const int classes_;
  S values_[kFewClasses * kLanes];
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
