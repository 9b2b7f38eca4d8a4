// The norm of a list of plain tensors of one device, and gradient clipping by it.
#pragma once

#include "core/norm.h"
#include "torch/optim/tensor_list.h"

namespace trainopt::aten {

double norm_on_cpu(Norm, const TensorList&);
void clip_on_cpu(const TensorList&, const ClipFactors&);
void clamp_on_cpu(const TensorList&, double limit);

#if defined(TRAINOPT_WITH_CUDA)
// The same on CUDA, where nothing waits for the device: the norm in float64, and in the dtype that torch gives.
struct CudaNorm {
  at::Tensor exact, rounded;
};
CudaNorm norm_on_cuda(Norm, const TensorList&);
void clip_on_cuda(const TensorList&, double max_norm, const at::Tensor& norm);
void clamp_on_cuda(const TensorList&, double limit);
#endif

}  // namespace trainopt::aten
