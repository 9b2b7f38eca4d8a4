#include "torch/optim/clip.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/norm.h"
#include "torch/optim/batch.h"

namespace trainopt::aten {
namespace {

// The chunks of a list, one after the other, as the CPU's threads take them.
class Chunks {
 public:
  explicit Chunks(const TensorList& list) : list_(list) {
    starts.reserve(list.items.size() + 1);
    costs_.reserve(list.items.size() + 1);
    for (const TensorList::Item& item : list.items) {
      starts.push_back(starts.back() + norm_chunks(item.numel));
      costs_.push_back(costs_.back() + kTensorElements + item.numel);
    }
  }

  std::vector<int64_t> starts{0};  // the first of each tensor; then the number of all

  // Calls use(item, begin, end, chunk) for all chunks, on torch's threads. `backwards`: each thread takes its last
  // chunk first, which is the one that its cache may still hold from the last time.
  template <class Use>
  void for_each(bool backwards, Use use) {
    const auto run = [&](int64_t first, int64_t last) {
      if (first == last) return;
      size_t t = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), backwards ? last - 1 : first) -
                                     starts.begin() - 1);
      for (int64_t i = first; i < last; ++i) {
        const int64_t chunk = backwards ? first + last - 1 - i : i;
        while (chunk >= starts[t + 1]) ++t;
        while (chunk < starts[t]) --t;
        const int64_t begin = (chunk - starts[t]) * kNormChunk;
        use(list_.items[t], begin, std::min(begin + kNormChunk, list_.items[t].numel), chunk);
      }
    };
    const int64_t parts = threads_for(list_.elements);
    if (parts == 1) return run(0, starts.back());
    const auto run_parts = [&](int64_t first, int64_t last) {
      run(first_chunk(first, parts), first_chunk(last, parts));
    };
    at::parallel_for(0, parts, 1, run_parts);
  }

 private:
  const TensorList& list_;
  std::vector<int64_t> costs_{0};  // of all tensors before each, in elements; then of all

  // Where a thread's part begins: nearest to an equal share of the elements.
  int64_t first_chunk(int64_t part, int64_t parts) const {
    if (part == parts) return starts.back();
    const int64_t cost = costs_.back() * part / parts;
    const auto t = static_cast<size_t>(std::upper_bound(costs_.begin(), costs_.end(), cost) - costs_.begin() - 1);
    return std::min(starts[t] + (cost - costs_[t] + kNormChunk / 2) / kNormChunk, starts[t + 1]);
  }
};

}  // namespace

double norm_on_cpu(Norm norm, const TensorList& list) {
  Chunks chunks(list);
  std::vector<double> partials(static_cast<size_t>(chunks.starts.back()));
  chunks.for_each(false, [&](const TensorList::Item& item, int64_t begin, int64_t end, int64_t chunk) {
    partials[static_cast<size_t>(chunk)] = cpu::norm_of_chunk(norm, item.view, begin, end);
  });
  double total = 0;
  for (size_t t = 0; t < list.items.size(); ++t) {
    double sum = 0;
    for (int64_t c = chunks.starts[t]; c < chunks.starts[t + 1]; ++c)
      sum = combine(norm, sum, partials[static_cast<size_t>(c)]);
    total = combine(norm, total, sum);
  }
  return root(norm, total);
}

void clip_on_cpu(const TensorList& list, const ClipFactors& factors) {
  Chunks(list).for_each(true, [&](const TensorList::Item& item, int64_t begin, int64_t end, int64_t) {
    cpu::scale(item.view, begin, end, factors);
  });
}

void clamp_on_cpu(const TensorList& list, double limit) {
  Chunks(list).for_each(false, [&](const TensorList::Item& item, int64_t begin, int64_t end, int64_t) {
    cpu::clamp(item.view, begin, end, limit);
  });
}

}  // namespace trainopt::aten
