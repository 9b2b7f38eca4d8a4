// torch's own operators on the emulated device: by the CPU's kernels, on the device's memory, in the order of streams.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace simt {

// Gives an operator to the stream, if what it returns can be told without its results, by its meta kernel: the results
// are put in place of the arguments then. False if it has to be computed at once.
bool defer(const c10::OperatorHandle& op, std::vector<c10::IValue>* stack, const void* stream);

// While it lives, operators are those of the backend: no autograd, no autocast, no mode of the thread that waits.
class Plain {
 private:
  c10::impl::ForceDispatchKeyGuard guard_{
      c10::default_included_set, c10::default_excluded_set | c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                     c10::autocast_dispatch_keyset | c10::python_ks};
};

}  // namespace simt
