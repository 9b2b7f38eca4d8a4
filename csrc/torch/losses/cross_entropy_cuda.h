// Cross-entropy on CUDA devices, below the operators. Nothing here waits for the device.
#pragma once

#include "torch/cuda_device.h"
#include "torch/losses/cross_entropy_target.h"

#if defined(TRAINOPT_WITH_CUDA)
#include "cuda/cross_entropy.h"
#endif

namespace trainopt::aten {

#if defined(TRAINOPT_WITH_CUDA)

// One call's work. A device guard for the target's device must be held while it lives.
class DeviceCrossEntropy {
 public:
  // IndexError for a target of an earlier call, beside CrossEntropyTarget's errors. `logits_dtype` is that of the
  // logits that the kernels see, of which one launch has `chunk` rows at most.
  DeviceCrossEntropy(const CrossEntropyTarget& target, c10::Device device, c10::ScalarType logits_dtype, int64_t chunk,
                     cuda::Stream stream);

  // The type that class weights are read in, for such logits.
  static c10::ScalarType weight_dtype(c10::ScalarType logits_dtype);

  // What is kept of all rows, (2, rows): each one's peak, and the sum of e^(x - peak), whose logarithm the CPU keeps in
  // its place. Made by `start`, or that of an earlier forward.
  at::Tensor lse;

  // Forward: memory for a loss of this type, then the rows by chunks, then what is made of them. With the gradient for
  // an upstream gradient of 1, if it is wanted: `count` comes before, then.
  void start(c10::ScalarType loss_dtype);
  void forward(const CrossEntropyBatch& batch, int64_t first, int64_t rows, const Rows* gradient = nullptr);
  std::pair<at::Tensor, at::Tensor> finish();

  // Backward: what the rows' losses are divided by, then the rows by chunks. The upstream gradient is one number, or
  // one for each row of the chunk; undefined: 1. `unless_one`: the gradient is that for 1 already, and is left alone if
  // that is right.
  void count(bool defer);
  void backward(const CrossEntropyBatch& batch, int64_t first, int64_t rows, const at::Tensor& upstream,
                const Rows& gradient, bool unless_one = false);
  // After count(true): what the gradients are still to be multiplied by, one number.
  at::Tensor rest() const;

  // Whether the last upstream gradient of a reduced loss there was not 1, as far as the host has heard: gradients that
  // forward makes would be made again.
  static bool was_scaled(c10::Device device);

 private:
  const CrossEntropyTarget& target_;
  const at::TensorOptions on_device_;
  const bool is_float64_;
  const int64_t chunk_;
  const cuda::Stream stream_;
  at::Tensor loss_, z_, partials_, totals_;
  int64_t partial_count_ = 0;

  cuda::RowsWork rows_work(const CrossEntropyBatch& batch, int64_t first, int64_t rows) const;
};

#endif

}  // namespace trainopt::aten
