// trainopt._C: what Python sees of the C++ side.
#include <ATen/Version.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdlib>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/random.h"
#include "cpu/engine.h"
#include "python/clip.h"
#include "python/loss_calls.h"
#include "python/plan.h"
#include "torch/cuda_architectures.h"
#include "torch/cuda_device.h"
#include "torch/inspect.h"
#include "torch/losses/support.h"

#if defined(TRAINOPT_SIMT)
#include "device/bindings.h"
#endif

namespace trainopt::python {
namespace {

cpu::Variant parse_variant(const std::string& name) {
  const std::string wanted = name == "scalar" ? "baseline" : name;
  std::string valid;
  for (int v = 0; v < cpu::kVariants; ++v) {
    const auto variant = static_cast<cpu::Variant>(v);
    const bool usable = cpu::supported(variant);
    if (usable && wanted == cpu::name_of(variant)) return variant;
    if (usable) valid += std::string(valid.empty() ? "" : ", ") + cpu::name_of(variant);
  }
  throw pybind11::value_error("'" + name + "' is not a SIMD variant that this processor can run; valid are: " + valid +
                              " (scalar is another name for baseline)");
}

// TRAINOPT_CPU if set, else what torch's own kernels use (ATEN_CPU_CAPABILITY or the processor), else the best.
void choose_variant() {
  if (const char* forced = std::getenv("TRAINOPT_CPU"); forced != nullptr && *forced != '\0') {
    try {
      cpu::set_variant(parse_variant(forced));
    } catch (const pybind11::value_error& error) {
      throw pybind11::value_error(std::string("TRAINOPT_CPU: ") + error.what());
    }
    return;
  }
  const std::string torchs = at::get_cpu_capability();
  cpu::Variant variant = cpu::current_variant();
  if (torchs == "DEFAULT" || torchs == "NO AVX") variant = cpu::Variant::kBaseline;
  if (torchs == "AVX2" && cpu::supported(cpu::Variant::kAvx2)) variant = cpu::Variant::kAvx2;
  cpu::set_variant(variant);
}

std::map<std::string, bool> variants() {
  std::map<std::string, bool> result;
  for (int v = 0; v < cpu::kVariants; ++v) {
    const auto variant = static_cast<cpu::Variant>(v);
    result[cpu::name_of(variant)] = cpu::supported(variant);
  }
  return result;
}

pybind11::tuple names(const char* const* first, int count) {
  return pybind11::tuple(pybind11::cast(std::vector<std::string>(first, first + count)));
}

// What each rule's header says of it: for every name (options, states, counts_steps, sums, sums_over_all, unsigned,
// numbers, factors).
pybind11::dict rules() {
  const auto facts =
      pybind11::module_::import("collections")
          .attr("namedtuple")("Rule", "options states counts_steps sums sums_over_all unsigned numbers factors");
  pybind11::dict result;
  for (int i = 0; const cpu::Rule* rule = cpu::rule_at(i); ++i) {
    const auto named = [&](StateSet set) {
      std::vector<std::string> states;
      for (int s = 0; s < rule->state_count; ++s)
        if (trainopt::contains(set, s)) states.emplace_back(rule->states[s]);
      return pybind11::tuple(pybind11::cast(states));
    };
    result[rule->name] =
        facts(names(rule->options, rule->option_count), names(rule->states, rule->state_count), rule->counts_steps,
              names(rule->sums, rule->sum_count), rule->sums_over_all, named(rule->unsigned_states),
              names(rule->numbers, rule->number_count), named(rule->factors));
  }
  return result;
}

bool is_observed() { return at::hasCallbacks(); }

// A contiguous tensor of this type on the CPU.
const at::Tensor& tensor_to_fill(const std::string& caller, const pybind11::handle& object, at::ScalarType dtype,
                                 const char* dtype_name) {
  if (!THPVariable_Check(object.ptr())) throw pybind11::type_error(caller + ": not a tensor");
  const at::Tensor& out = THPVariable_Unpack(object.ptr());
  if (!is_plain_cpu(out.unsafeGetTensorImpl()) || out.scalar_type() != dtype || !out.is_contiguous())
    throw pybind11::value_error(caller + ": the tensor must be a contiguous " + dtype_name + " one on the CPU");
  check_memory("out", out.unsafeGetTensorImpl());
  return out;
}

// Fills a contiguous float32 CPU tensor with the noise of one parameter at one step, in the logical order of elements.
void gaussian_(const pybind11::handle& object, uint64_t seed, uint64_t step, uint32_t tensor) {
  const at::Tensor& out = tensor_to_fill("gaussian_", object, at::kFloat, "float32");
  const RandomKey key = random_key(seed, static_cast<double>(step));
  cpu::gaussian(static_cast<float*>(out.mutable_data_ptr()), 0, out.numel(), {key.seed, key.step, tensor});
}

// Likewise an int16 tensor with the bits by which the parameter's elements are rounded at random.
void rounding_bits_(const pybind11::handle& object, uint64_t seed, uint64_t step, uint32_t tensor) {
  const at::Tensor& out = tensor_to_fill("rounding_bits_", object, at::kShort, "int16");
  const RandomKey key = random_key(seed, static_cast<double>(step));
  cpu::rounding_bits(static_cast<uint16_t*>(out.mutable_data_ptr()), 0, out.numel(), {key.seed, key.step, tensor});
}

// Whether the fused losses take all of these tensors (or None) together as they are now.
bool take(const pybind11::args& tensors) {
  std::optional<c10::Device> device;
  for (const pybind11::handle& object : tensors) {
    if (object.is_none()) continue;
    if (!THPVariable_Check(object.ptr())) return false;
    const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
    if (!takes(tensor) || tensor.device() != device.value_or(tensor.device())) return false;
    device = tensor.device();
  }
  return true;
}

// The plan in an object of Python's. Where that was made without __init__ (Plan.__new__), pybind11 would hand out
// memory in which there is none.
Plan& plan_in(const pybind11::object& object) {
  const bool is_plan = pybind11::isinstance<Plan>(object);
  const auto* type = pybind11::detail::get_type_info(typeid(Plan));
  if (!is_plan ||
      !reinterpret_cast<pybind11::detail::instance*>(object.ptr())->get_value_and_holder(type).holder_constructed())
    throw pybind11::type_error("not a Plan, or one that was made without __init__");
  return object.cast<Plan&>();
}

// The device types that there are kernels for.
std::vector<std::string> device_types() {
#if defined(TRAINOPT_WITH_CUDA)
  return {"cpu", c10::DeviceTypeName(kCudaDeviceType, true)};
#else
  return {"cpu"};
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  choose_variant();
  m.doc() = "trainopt's compiled side";
  m.def("cpu_variant", [] { return cpu::name_of(cpu::current_variant()); });
  m.def("cpu_variants", variants);
  m.def("set_cpu_variant", [](const std::string& name) { cpu::set_variant(parse_variant(name)); });
  m.def("rules", rules,
        "What the header of each rule says of it: its options and states, if it counts steps, its sums and numbers.");
  m.def("numbers_needed", numbers_needed, pybind11::arg("rule"), pybind11::arg("group"),
        "The names of the rule's numbers that a group's options call for, in the order of the rule.");
  m.def("states_needed", states_needed, pybind11::arg("rule"), pybind11::arg("group"), pybind11::arg("dimensions") = 1,
        "The names of the states that a group's options call for, of a parameter of so many dimensions.");
  m.def("decay_of", decay_of, pybind11::arg("rule"), pybind11::arg("group"),
        "Where the weight decay of a parameter group belongs: \"gradient\", \"parameter\", \"update\"; or \"none\".");
  step_is_done();
  m.def("is_observed", is_observed, "Whether a profiler or another observer of record_function is active.");
  m.def("takes", take, "Whether the fused losses take all of these tensors (or None) together as they are now.");
  m.def("device_types", device_types, "The device types that there are kernels for.");
  m.def("cuda_architectures", cuda_architectures, "What the CUDA kernels were compiled for; empty without them.");
  m.def(
      "cuda_covers",
      [](std::pair<int, int> capability, const std::string& architectures) {
        return covers(architectures, capability.first, capability.second);
      },
      pybind11::arg("capability"), pybind11::arg("architectures") = cuda_architectures(),
      "Whether a GPU of this compute capability runs the CUDA kernels, as compiled for these architectures.");
  m.def(
      "no_kernels_for",
      [](const std::string& name, std::pair<int, int> capability, const std::string& device) {
        return no_kernels_for(name, capability.first, capability.second, device);
      },
      pybind11::arg("name"), pybind11::arg("capability"), pybind11::arg("device"),
      "What is said of a GPU that the CUDA kernels do not run on.");
  m.def("set_install_command", set_install_command, "The command that installs trainopt here, for such words.");
  m.def("gaussian_", gaussian_, pybind11::arg("out"), pybind11::arg("seed"), pybind11::arg("step"),
        pybind11::arg("tensor"));
  m.def("rounding_bits_", rounding_bits_, pybind11::arg("out"), pybind11::arg("seed"), pybind11::arg("step"),
        pybind11::arg("tensor"));
  m.def("is_number", is_number, pybind11::arg("value"));
  bind_loss_calls(m);
  m.def("norm_of", norm_of, pybind11::arg("tensors"), pybind11::arg("order"), pybind11::arg("of_gradients"));
  m.def("clip_gradients", clip_gradients, pybind11::arg("parameters"), pybind11::arg("max_norm"),
        pybind11::arg("norm"));
  m.def("clamp_gradients", clamp_gradients, pybind11::arg("parameters"), pybind11::arg("limit"));
  pybind11::class_<Plan>(m, "Plan")
      .def(pybind11::init<const std::string&, uint32_t, std::vector<pybind11::str>, pybind11::object>(),
           pybind11::arg("rule"), pybind11::arg("first_tensor") = 0,
           pybind11::arg("checked") = std::vector<pybind11::str>(), pybind11::arg("check") = pybind11::none())
      .def(
          "step",
          [](const pybind11::object& plan, const pybind11::object& groups, const pybind11::object& state,
             double gradient_scale, Indices new_states, Indices stepped, const pybind11::object& device_scale,
             const pybind11::object& found_inf, const pybind11::object& gradient_norm, bool gradients_seen) {
            return plan_in(plan).step(groups, state, gradient_scale, std::move(new_states), std::move(stepped),
                                      device_scale, found_inf, gradient_norm, gradients_seen);
          },
          pybind11::arg("groups"), pybind11::arg("state"), pybind11::arg("gradient_scale"),
          pybind11::arg("new_states") = Indices(), pybind11::arg("stepped") = Indices(),
          pybind11::arg("device_scale") = pybind11::none(), pybind11::arg("found_inf") = pybind11::none(),
          pybind11::arg("gradient_norm") = pybind11::none(), pybind11::arg("gradients_seen") = false)
      .def("sums_over_all", [](const pybind11::object& plan) { return plan_in(plan).sums_over_all(); })
      .def("stats", [](const pybind11::object& plan) { return plan_in(plan).stats(); })
      .def(
          "paths",
          [](const pybind11::object& plan, const pybind11::object& groups, const pybind11::object& state) {
            return plan_in(plan).paths(groups, state);
          },
          pybind11::arg("groups"), pybind11::arg("state"));
#if defined(TRAINOPT_SIMT)
  simt::bind_device(m);
#endif
}

}  // namespace trainopt::python
