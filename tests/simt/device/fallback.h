// torch's own operators on the emulated device: by the CPU's kernels, on the device's memory, in the order of streams.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace simt {

// A device's tensor as the host sees it, at addresses of its own: for the work of streams. It has no hold on the
// memory: work that comes too late finds what is there then.
at::Tensor on_host(const at::Tensor&);

// While it lives, operators are those of the backend: no autograd, no autocast, no mode of the thread that waits.
class Plain {
 private:
  c10::impl::ForceDispatchKeyGuard guard_{
      c10::default_included_set, c10::default_excluded_set | c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                     c10::autocast_dispatch_keyset | c10::python_ks};
};

}  // namespace simt
