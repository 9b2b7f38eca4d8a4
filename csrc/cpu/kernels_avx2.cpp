// The kernels for AVX2, with -mavx2 -mfma -mf16c.
#define TRAINOPT_KERNEL_TABLE kAvx2Kernels
#include "cpu/kernel.h"
