// Qualifiers shared by every header below the engines.
#pragma once

// A function of these headers has a copy of its own in each object file that uses it (internal linkage): an inline
// function with external linkage that was compiled for AVX-512 could be the copy that the linker keeps for all.
#if defined(__CUDACC__)
#define TRAINOPT_INLINE __host__ __device__ __forceinline__
#else
#define TRAINOPT_INLINE inline __attribute__((always_inline))
#endif
#define TRAINOPT_FUNCTION static TRAINOPT_INLINE
