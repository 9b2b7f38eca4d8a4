#define TRAINOPT_LOSS_KERNEL_TABLE kAvx2LossKernels
#include "cpu/loss_kernels.h"
