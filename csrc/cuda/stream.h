// CUDA's stream, for headers that do without CUDA's own.
#pragma once

struct CUstream_st;

namespace trainopt::cuda {

using Stream = CUstream_st*;  // cudaStream_t

}  // namespace trainopt::cuda
