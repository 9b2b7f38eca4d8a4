#include "cpu/losses.h"

#include <cstring>

#include "cpu/engine.h"
#include "cpu/loss_kernel_table.h"

namespace trainopt::cpu {
namespace {

enum PointwiseIndex {
#define TRAINOPT_INDEX(loss) k##loss##Index,
  TRAINOPT_FOR_EACH_POINTWISE_LOSS(TRAINOPT_INDEX)
#undef TRAINOPT_INDEX
};

constexpr PointwiseLoss kPointwiseList[] = {
#define TRAINOPT_DESCRIBE(loss) {loss::kName, k##loss##Index},
    TRAINOPT_FOR_EACH_POINTWISE_LOSS(TRAINOPT_DESCRIBE)
#undef TRAINOPT_DESCRIBE
};

const LossKernelTable& table() {
#if defined(TRAINOPT_X86)
  if (current_variant() == Variant::kAvx512) return kAvx512LossKernels;
  if (current_variant() == Variant::kAvx2) return kAvx2LossKernels;
#endif
  return kBaselineLossKernels;
}

}  // namespace

const PointwiseLoss* find_pointwise_loss(const char* name) {
  for (const PointwiseLoss& loss : kPointwiseList)
    if (std::strcmp(loss.name, name) == 0) return &loss;
  return nullptr;
}

double pointwise_forward(const PointwiseLoss& loss, bool is_float64, const PointwiseTask& task, int64_t begin,
                         int64_t end) {
  return table().pointwise_forward[loss.index][is_float64](task, begin, end);
}

void pointwise_backward(const PointwiseLoss& loss, bool is_float64, const PointwiseTask& task, int64_t begin,
                        int64_t end) {
  table().pointwise_backward[loss.index][is_float64](task, begin, end);
}

void cross_entropy_forward(bool is_float64, const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  table().cross_entropy_forward[is_float64](task, first_row, last_row);
}

void cross_entropy_backward(bool is_float64, const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  table().cross_entropy_backward[is_float64](task, first_row, last_row);
}

}  // namespace trainopt::cpu
