// Problems for cross-entropy, and its formulas written anew in double: what every engine is compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "checks.h"
#include "formats.h"
#include "losses/cross_entropy_batch.h"
#include "pointwise_judge.h"

namespace trainopt {

// Elements of one type, in memory that ends where the last one does, and begins `shift` elements before the first.
class Stored {
 public:
  Stored(DType dtype, const std::vector<double>& values, int64_t shift = 0)
      : dtype_(dtype),
        before_(static_cast<size_t>(shift * size_of(dtype))),
        bytes_(before_ + values.size() * size_of(dtype)) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  void* data() { return bytes_.data() + before_; }
  DType dtype() const { return dtype_; }
  double operator[](size_t i) const {
    const unsigned char* at = bytes_.data() + before_ + i * size_of(dtype_);
    if (dtype_ == DType::kFloat64) return read<double>(at);
    if (dtype_ == DType::kFloat32) return static_cast<double>(read<float>(at));
    return static_cast<double>(convert(read<uint16_t>(at), dtype_));
  }
  bool operator==(const Stored& other) const {
    return std::equal(bytes_.begin() + before_, bytes_.end(), other.bytes_.begin() + other.before_, other.bytes_.end());
  }

 private:
  DType dtype_;
  size_t before_;
  std::vector<unsigned char> bytes_;

  template <class T>
  static T read(const unsigned char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  void set(size_t i, double value) {
    unsigned char* at = bytes_.data() + before_ + i * size_of(dtype_);
    const float single = static_cast<float>(value);
    if (dtype_ == DType::kFloat64) std::memcpy(at, &value, 8);
    if (dtype_ == DType::kFloat32) std::memcpy(at, &single, 4);
    if (size_of(dtype_) != 2) return;
    const uint16_t bits = convert(single, dtype_);
    std::memcpy(at, &bits, 2);
  }
};

inline std::vector<double> numbers(size_t count, uint64_t seed, const std::function<double(double)>& shape) {
  RandomNumbers source{seed};
  std::vector<double> result(count);
  for (double& value : result) value = shape(source.value());
  return result;
}

// Memory for the log-sum-exp of each row.
struct StoredLse {
  std::vector<double> peak, log_sum;

  explicit StoredLse(int64_t rows)
      : peak(static_cast<size_t>(rows), std::nan("")), log_sum(static_cast<size_t>(rows), std::nan("")) {}
  LogSumExp parts() { return {peak.data(), log_sum.data()}; }
  double of(int64_t row) const { return peak[row] + log_sum[row]; }
};

struct Case {
  int64_t classes, outer, inner;  // inner > 1: rows side by side
  bool probabilities, weighted;
  double smoothing, softcap, z, temperature = 1;
};

struct CrossEntropyProblem {
  static constexpr int64_t kIgnored = -7;

  Case c;
  DType dtype;
  int64_t rows;
  Stored x, t;
  std::vector<double> weight;  // numbers that a float has
  double total_weight = 0;
  std::vector<int64_t> labels;

  CrossEntropyProblem(const Case& of, DType type, int64_t shift = 0)
      : c(of),
        dtype(type),
        rows(of.outer * of.inner),
        x(type, numbers(count(), 7, as_it_is), shift),
        t(type, numbers(count(), 8, into_unit), shift),
        weight(numbers(static_cast<size_t>(of.classes), 9,
                       [](double v) { return static_cast<double>(static_cast<float>(into_unit(v))); })),
        labels(static_cast<size_t>(rows)) {
    for (int64_t k = 0; k < c.classes; ++k) total_weight += c.weighted ? weight[k] : 1;
    for (int64_t row = 0; row < rows; ++row) labels[row] = row % 5 == 3 ? kIgnored : row * 31 % c.classes;
  }
  CrossEntropyProblem(const CrossEntropyProblem&) = delete;

  size_t count() const { return static_cast<size_t>(rows * c.classes); }
  size_t place(int64_t row, int64_t k) const {
    return static_cast<size_t>(c.inner == 1 ? row * c.classes + k
                                            : (row / c.inner * c.classes + k) * c.inner + row % c.inner);
  }
  bool is_ignored(int64_t row) const { return !c.probabilities && labels[row] == kIgnored; }
  Rows rows_in(Stored& s) const { return {s.data(), c.classes * c.inner, c.inner, s.dtype()}; }

  void describe_to(CrossEntropyBatch& batch) {
    batch.classes = c.classes;
    batch.inner = c.inner;
    batch.logits = rows_in(x);
    if (c.probabilities) {
      batch.probabilities = rows_in(t);
    } else {
      batch.labels = labels.data();
    }
    batch.ignore_index = kIgnored;
    batch.smoothing = c.smoothing;
    batch.softcap = c.softcap;
    batch.temperature = c.temperature;
  }

  struct Row {
    double peak, log_sum, lse, loss, all_mass;
    std::vector<double> logit, mass;
  };

  Row exact(int64_t row) const {
    Row result{-HUGE_VAL, 0, 0, 0, 0, std::vector<double>(c.classes), std::vector<double>(c.classes)};
    long double sum = 0, mass = 0, loss = 0;  // the judge's own roundings, of thousands of ties, are no small ones
    for (int64_t k = 0; k < c.classes; ++k) {
      const double raw = x[place(row, k)], w = c.weighted ? weight[k] : 1;
      const double target = c.probabilities ? t[place(row, k)] : labels[row] == k;
      result.logit[k] = (c.softcap == 0 ? raw : c.softcap * std::tanh(raw / c.softcap)) / c.temperature;
      result.mass[k] =
          is_ignored(row) ? 0 : w * ((1 - c.smoothing) * target + c.smoothing / static_cast<double>(c.classes));
      mass += result.mass[k];
      result.peak = std::max(result.peak, result.logit[k]);
    }
    for (int64_t k = 0; k < c.classes; ++k) sum += std::exp(result.logit[k] - result.peak);
    result.log_sum = static_cast<double>(std::log(sum));
    result.lse = result.peak + result.log_sum;
    for (int64_t k = 0; k < c.classes; ++k) loss += result.mass[k] * ((result.peak - result.logit[k]) + result.log_sum);
    result.all_mass = static_cast<double>(mass);
    result.loss = static_cast<double>(loss);
    return result;
  }

  // The derivative by the row's logit of class k of scale * loss + lse_scale * lse.
  double slope(const Row& row, bool ignored, int64_t k, double scale, double lse_scale) const {
    if (ignored) return 0;
    const double u = row.logit[k] * c.temperature / c.softcap, cap = c.softcap == 0 ? 1 : 1 - u * u;
    const double probability = std::exp((row.logit[k] - row.peak) - row.log_sum);
    return ((scale * row.all_mass + lse_scale) * probability - scale * row.mass[k]) * cap / c.temperature;
  }

  std::string describe() const {
    return "cross-entropy, " + std::string(format_of(dtype).name) + ", " + std::to_string(c.classes) + " classes, " +
           std::to_string(c.outer) + " x " + std::to_string(c.inner) + " rows" +
           (c.probabilities ? ", probabilities" : "") + (c.weighted ? ", weighted" : "") + ", smoothing " +
           std::to_string(c.smoothing) + ", softcap " + std::to_string(c.softcap) + ", z " + std::to_string(c.z) +
           ", temperature " + std::to_string(c.temperature);
  }
};

}  // namespace trainopt
