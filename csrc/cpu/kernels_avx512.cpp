// The kernels for AVX-512 F, BW, DQ and VL.
#define TRAINOPT_KERNEL_TABLE kAvx512Kernels
#include "cpu/kernel.h"
