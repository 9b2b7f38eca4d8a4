#include "torch/layout.h"

#include <algorithm>
#include <numeric>

#include "torch/inspect.h"

namespace trainopt::aten {

bool arrange(const std::vector<Arranged>& operands, bool logical_order, std::deque<Layout>* layouts) {
  const c10::TensorImpl& first = *operands[0].tensor;
  std::vector<int64_t> order(first.dim());
  std::iota(order.begin(), order.end(), 0);
  if (!logical_order)
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return first.strides()[a] > first.strides()[b]; });

  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> strides(operands.size());
  for (const int64_t d : order) {
    const int64_t size = first.sizes()[d];
    if (size == 1) continue;
    bool joins = !sizes.empty();
    for (size_t i = 0; joins && i < operands.size(); ++i)
      joins = strides[i].back() == size * operands[i].tensor->strides()[d];
    if (joins) {
      sizes.back() *= size;
      for (size_t i = 0; i < operands.size(); ++i) strides[i].back() = operands[i].tensor->strides()[d];
    } else {
      sizes.push_back(size);
      for (size_t i = 0; i < operands.size(); ++i) strides[i].push_back(operands[i].tensor->strides()[d]);
    }
  }
  if (sizes.size() > kMaxDims) return false;
  for (size_t i = 0; i < operands.size(); ++i) {
    int64_t run = 1;
    bool dense = true;
    for (size_t d = sizes.size(); d-- > 0; run *= sizes[d]) dense = dense && strides[i][d] == run;
    if (dense) continue;
    Layout layout{static_cast<int>(sizes.size()), {}, {}};
    std::copy(sizes.begin(), sizes.end(), layout.sizes);
    std::copy(strides[i].begin(), strides[i].end(), layout.strides);
    layouts->push_back(layout);
    operands[i].view->layout = &layouts->back();
  }
  return true;
}

bool lay_shard(const Shard& shard, c10::IntArrayRef sizes, std::deque<ShardLayout>* layouts,
               const ShardLayout** layout) {
  *layout = nullptr;
  if (are_equal(sizes, shard.sizes) || sizes.size() != shard.sizes.size()) return true;
  ShardLayout found{};
  std::vector<int64_t> lengths, strides;  // from the innermost dimension outwards
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= shard.sizes[d]) {
    found.offset += shard.offset[d] * stride;
    if (sizes[d] == 1) continue;
    if (!lengths.empty() && lengths.back() * strides.back() == stride) {
      lengths.back() *= sizes[d];
    } else {
      lengths.push_back(sizes[d]);
      strides.push_back(stride);
    }
  }
  if (lengths.empty()) lengths.push_back(1), strides.push_back(1);
  if (lengths.size() > kMaxDims) return false;
  found.layout.ndim = static_cast<int>(lengths.size());
  std::reverse_copy(lengths.begin(), lengths.end(), found.layout.sizes);
  std::reverse_copy(strides.begin(), strides.end(), found.layout.strides);
  *layout = &layouts->emplace_back(found);
  return true;
}

}  // namespace trainopt::aten
