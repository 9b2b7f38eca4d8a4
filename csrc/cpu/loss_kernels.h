// The kernels of all losses. Included once by each loss_kernels_*.cpp, which names the table that it fills.
#pragma once

#include "cpu/cross_entropy_columns.h"
#include "cpu/cross_entropy_few_classes.h"
#include "cpu/cross_entropy_rows.h"
#include "cpu/loss_kernel_table.h"
#include "cpu/pointwise_kernel.h"

namespace trainopt::cpu {
namespace {

template <class S>
void cross_entropy_forward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  if (task.inner > 1) return columns_forward<S>(task, first_row, last_row);
  (task.classes <= kFewClasses ? few_classes_forward<S> : rows_forward<S>)(task, first_row, last_row);
}

template <class S>
void cross_entropy_backward(const CrossEntropyTask& task, int64_t first_row, int64_t last_row) {
  if (task.inner > 1) return columns_backward<S>(task, first_row, last_row);
  (task.classes <= kFewClasses ? few_classes_backward<S> : rows_backward<S>)(task, first_row, last_row);
}

}  // namespace

#define TRAINOPT_FORWARD(loss) {pointwise_forward<loss, float>, pointwise_forward<loss, double>},
#define TRAINOPT_BACKWARD(loss) {pointwise_backward<loss, float>, pointwise_backward<loss, double>},
const LossKernelTable TRAINOPT_LOSS_KERNEL_TABLE = {{TRAINOPT_FOR_EACH_POINTWISE_LOSS(TRAINOPT_FORWARD)},
                                                    {TRAINOPT_FOR_EACH_POINTWISE_LOSS(TRAINOPT_BACKWARD)},
                                                    {cross_entropy_forward<float>, cross_entropy_forward<double>},
                                                    {cross_entropy_backward<float>, cross_entropy_backward<double>}};
#undef TRAINOPT_FORWARD
#undef TRAINOPT_BACKWARD

}  // namespace trainopt::cpu
