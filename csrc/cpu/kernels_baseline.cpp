// The kernels for the instruction set that every processor of the platform has (SSE2, NEON).
#define TRAINOPT_KERNEL_TABLE kBaselineKernels
#include "cpu/kernel.h"
