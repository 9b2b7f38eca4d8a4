#define TRAINOPT_LOSS_KERNEL_TABLE kAvx512LossKernels
#include "cpu/loss_kernels.h"
