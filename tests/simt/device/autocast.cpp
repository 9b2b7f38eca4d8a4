// Autocast on the emulated device.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace simt {
namespace {

// Autocast's lists, which are torch's for CUDA.
#define SIMT_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define SIMT_FLOAT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define SIMT_FLOAT_OUT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define SIMT_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using namespace at::autocast;  // for the macros
  AT_FORALL_LOWER_PRECISION_FP(SIMT_LOWER)
  AT_FORALL_FP32(SIMT_FLOAT)
  AT_FORALL_FP32_SET_OPT_DTYPE(SIMT_FLOAT_OUT)
  AT_FORALL_PROMOTE(SIMT_PROMOTE)
}

}  // namespace
}  // namespace simt
