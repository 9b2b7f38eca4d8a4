#define TRAINOPT_LOSS_KERNEL_TABLE kBaselineLossKernels
#include "cpu/loss_kernels.h"
