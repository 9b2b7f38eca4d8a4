#if defined(TRAINOPT_WITH_CUDA)

#include <ATen/ops/empty.h>

#include <vector>

#include "cuda/norm.h"
#include "python/clip.h"
#include "python/cuda_device.h"
#include "python/losses.h"

namespace trainopt::python {
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
  const auto count = static_cast<int64_t>(tensors.size());
  int64_t chunks = 0;
  for (const cuda::NormTensor& tensor : tensors) chunks += norm_chunks(tensor.numel);
  const at::TensorOptions there = at::TensorOptions().device(list.device());
  const CudaNorm result{at::empty({}, there.dtype(at::kDouble)), at::empty({}, there.dtype(list.norm_dtype()))};
  const at::Tensor sums = at::empty({chunks + count}, there.dtype(at::kDouble));
  const at::Tensor first_chunk = at::empty({count}, there.dtype(at::kLong));
  double* partials = sums.mutable_data_ptr<double>();
  cuda::norm({norm, tensors.data(), tensors.size(), partials, first_chunk.mutable_data_ptr<int64_t>(),
              partials + chunks, result.exact.mutable_data_ptr<double>(), view_of(result.rounded)},
             on.stream);
  return result;
}

void clip_on_cuda(const TensorList& list, double max_norm, const at::Tensor& norm) {
  const OnDevice on(list.device());
  const std::vector<cuda::NormTensor> tensors = tensors_of(list);
  cuda::clip(tensors.data(), tensors.size(), norm.const_data_ptr<double>(), max_norm, on.stream);
}

}  // namespace trainopt::python

#endif
