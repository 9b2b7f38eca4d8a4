// Copies to, from and between the emulated devices, and numbers that the host reads there.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "device/fallback.h"
#include "device/pinned_memory.h"
#include "device/streams.h"
#include "queue.h"

namespace simt {
namespace {

void copy_on(const void* stream, const at::Tensor& to, const at::Tensor& from) {
  enqueue(stream, [to, from] {
    const Plain plain;
    to.copy_(from);
  });
}

// Between the host and a device, as torch's for CUDA.
void copy_from_host_or_to_it(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool is_from_host = from.device().type() != kDeviceType;
  const at::Tensor& host = is_from_host ? from : to;
  const void* const stream = current_stream_of((is_from_host ? to : from).device());
  const bool host_is_pinned = is_pinned(host.storage().data());
  if (!is_within_fallback() && non_blocking) {
    if (!host_is_pinned && is_capturing(stream))
      forbid_while_capturing(
          "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned");
    if (host_is_pinned) return copy_on(stream, on_host(to), on_host(from));
    if (is_from_host) return copy_on(stream, on_host(to), from.clone());
    finish_stream(stream);
  } else {
    synchronise("a copy", stream);
  }
  on_host(to).copy_(on_host(from));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (from.device().type() != to.device().type()) {
    copy_from_host_or_to_it(from, to, non_blocking);
    return to;
  }
  // On the source's stream; that of another device's tensor waits for it, and is waited for.
  const void *const stream = current_stream_of(from.device()), *const other = current_stream_of(to.device());
  if (other != stream) wait(stream, record(other));
  copy_on(stream, on_host(to), on_host(from));
  if (other != stream) wait(other, record(stream));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  synchronise("item()", current_stream_of(self.device()));
  return on_host(self).item();
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
}

// Copies see to these themselves; torch's way with them is to copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

}  // namespace
}  // namespace simt
