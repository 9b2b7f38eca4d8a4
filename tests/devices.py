"""Where the tests of kernels run: here, on a GPU, or on the device that the tests emulate."""

import torch

from trainopt._extension import _C

IS_EMULATED = "simt" in _C.device_types()
HAS_GPU = "cuda" in _C.device_types() and torch.cuda.is_available()

#: For the tests that take a `device`: under `make emulated` the emulated one alone.
DEVICES = ["simt"] if IS_EMULATED else ["cpu", *(["cuda"] if HAS_GPU else [])]

#: The SIMD variants that this processor can run.
VARIANTS = [name for name, usable in _C.cpu_variants().items() if usable]
