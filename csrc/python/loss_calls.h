// The loss operators as functions of the compiled module: what torch.ops does, without its wrapping of every argument.
#pragma once

#include <pybind11/pybind11.h>

namespace trainopt::python {

void bind_loss_calls(pybind11::module_& m);

}  // namespace trainopt::python
