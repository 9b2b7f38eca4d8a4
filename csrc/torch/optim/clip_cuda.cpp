#if defined(TRAINOPT_WITH_CUDA)

#include <ATen/ops/empty.h>

#include <vector>

#include "cuda/norm.h"
#include "torch/cuda_device.h"
#include "torch/losses/support.h"
#include "torch/optim/clip.h"

namespace trainopt::aten {
namespace {

std::vector<cuda::NormTensor> tensors_of(const TensorList& list) {
  std::vector<cuda::NormTensor> tensors;
  tensors.reserve(list.items.size());
  for (const TensorList::Item& item : list.items) tensors.push_back({item.view, item.numel});
  return tensors;
}

}  // namespace

CudaNorm norm_on_cuda(Norm norm, const TensorList& list) {
  const OnDevice on(list.device());
  const std::vector<cuda::NormTensor> tensors = tensors_of(list);
  const at::TensorOptions there = at::TensorOptions().device(list.device());
  const CudaNorm result{at::empty({}, there.dtype(at::kDouble)), at::empty({}, there.dtype(list.norm_dtype()))};
  const at::Tensor partials =
      at::empty({cuda::norm_partials(tensors.data(), tensors.size())}, there.dtype(at::kDouble));
  cuda::norm({norm, tensors.data(), tensors.size(), partials.mutable_data_ptr<double>(),
              result.exact.mutable_data_ptr<double>(), view_of(result.rounded)},
             on.stream);
  return result;
}

void clip_on_cuda(const TensorList& list, double max_norm, const at::Tensor& norm) {
  const OnDevice on(list.device());
  const std::vector<cuda::NormTensor> tensors = tensors_of(list);
  cuda::clip(tensors.data(), tensors.size(), norm.const_data_ptr<double>(), max_norm, on.stream);
}

void clamp_on_cuda(const TensorList& list, double limit) {
  const OnDevice on(list.device());
  const std::vector<cuda::NormTensor> tensors = tensors_of(list);
  cuda::clamp(tensors.data(), tensors.size(), limit, on.stream);
}

}  // namespace trainopt::aten

#endif
