#include "device/bindings.h"

#include <pybind11/stl.h>

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arena.h"
#include "device/graphs.h"
#include "device/streams.h"
#include "queue.h"
#include "simt.h"

namespace simt {
namespace {

namespace py = pybind11;

// A device's index, of a torch.device, a string, a number, or None for the current one.
c10::DeviceIndex index_of(const py::object& device) {
  if (device.is_none()) return current_device();
  if (py::isinstance<py::int_>(device)) return checked(device.cast<c10::DeviceIndex>());
  const py::object index = py::module_::import("torch").attr("device")(device).attr("index");
  return index.is_none() ? current_device() : checked(index.cast<c10::DeviceIndex>());
}

py::object torch_stream(const py::object& device) {
  return py::module_::import("torch").attr("Stream")(py::arg("device") = "simt:" + std::to_string(index_of(device)));
}

py::dict memory_stats(const py::object& device) {
  const MemoryStatistics now = memory_statistics(index_of(device));
  py::dict result;
  result["allocation.all.allocated"] = now.allocations;
  result["allocated_bytes.all.current"] = now.allocated_bytes;
  result["allocated_bytes.all.peak"] = now.peak_bytes;
  return result;
}

// As torch.cuda.device.
struct OnDevice {
  c10::DeviceIndex wanted, before = 0;
};

// What torch.cuda has for CUDA, by its names.
void bind_torch_names(py::module_ m) {
  const auto device = py::arg("device") = py::none();
  m.def("is_available", [] { return true; });
  m.def("is_initialized", [] { return true; });
  m.def("device_count", [] { return kDevices; });
  m.def("current_device", [] { return static_cast<int>(current_device()); });
  m.def("set_device", [](const py::object& to) { exchange_device(index_of(to)); });
  m.def("synchronize", [](const py::object& on) { finish_device(index_of(on)); }, device);
  m.def("Stream", torch_stream, device);
  m.def("Event", [] { return py::module_::import("torch").attr("Event")("simt"); });
  m.def("stream", [](const py::object& stream) { return stream; }, py::arg("stream"), "A stream is its own context.");
  m.def(
      "current_stream",
      [](const py::object& on) {
        return py::module_::import("torch").attr("accelerator").attr("current_stream")(device_of(index_of(on)).str());
      },
      device);
  m.def(
      "default_stream",
      [](const py::object& on) {
        return py::module_::import("torch").attr("Stream")(py::arg("stream_id") = 0,
                                                           py::arg("device_index") = index_of(on),
                                                           py::arg("device_type") = static_cast<int>(kDeviceType));
      },
      device);
  m.def("empty_cache", [] {});
  m.def("memory_stats", memory_stats, device);
  m.def(
      "memory_allocated", [](const py::object& on) { return memory_statistics(index_of(on)).allocated_bytes; }, device);
  m.def(
      "max_memory_allocated", [](const py::object& on) { return memory_statistics(index_of(on)).peak_bytes; }, device);
  m.def("reset_peak_memory_stats", [](const py::object& on) { reset_peak(index_of(on)); }, device);
  m.def("manual_seed", [](const py::object&) {});  // random numbers come from the CPU's generator
  m.def("manual_seed_all", [](const py::object&) {});
  m.def("_is_in_bad_fork", [] { return false; });
  m.def("get_amp_supported_dtype", [] {
    const py::module_ torch = py::module_::import("torch");
    return py::make_tuple(torch.attr("float16"), torch.attr("bfloat16"));
  });
  py::class_<OnDevice>(m, "device")
      .def(py::init([](const py::object& on) { return OnDevice{index_of(on)}; }))
      .def("__enter__", [](OnDevice& self) { self.before = exchange_device(self.wanted); })
      .def("__exit__", [](OnDevice& self, const py::args&) { exchange_device(self.before); });
}

// Graphs --------------------------------------------------------------------------------------------------------------

std::pair<int, int> get_pool() { return {0, 0}; }  // not shared: each graph has its own

// As torch.cuda.graph: the graph is captured within it, on a stream of its own if none is given.
struct Capturing {
  py::object graph;
  c10::StreamId stream, before = 0;

  void enter() {
    finish_device(current_device());
    before = exchange_stream(current_device(), stream);
    try {
      graph.attr("capture_begin")();
    } catch (...) {
      leave();
      throw;
    }
  }
  void exit() {
    try {
      graph.attr("capture_end")();
    } catch (...) {
      leave();
      throw;
    }
    leave();
  }
  void leave() const { exchange_stream(current_device(), before); }
};

void bind_graphs(py::module_ m) {
  m.def("graph_pool_handle", get_pool);
  m.def("is_current_stream_capturing", [] { return captures(current_stream()); });
  py::class_<CapturedGraph>(m, "CUDAGraph")
      .def(py::init([](const py::args&, const py::kwargs&) { return CapturedGraph{}; }))
      .def("capture_begin", [](CapturedGraph& self, const py::args&, const py::kwargs&) { self.capture_begin(); })
      .def("capture_end", &CapturedGraph::capture_end)
      .def("replay", &CapturedGraph::replay)
      .def("reset", &CapturedGraph::reset)
      .def("pool", [](CapturedGraph&) { return get_pool(); });
  py::class_<Capturing>(m, "graph")
      .def(py::init([](const py::object& graph, const py::object&, const py::object& on, const std::string&) {
             const py::object stream = on.is_none() ? torch_stream(py::none()) : on;
             return Capturing{graph, stream.attr("stream_id").cast<c10::StreamId>()};
           }),
           py::arg("cuda_graph"), py::arg("pool") = py::none(), py::arg("stream") = py::none(),
           py::arg("capture_error_mode") = "global")
      .def("__enter__", &Capturing::enter)
      .def("__exit__", [](Capturing& self, const py::args&) { self.exit(); });
}

// For tests -----------------------------------------------------------------------------------------------------------

std::vector<std::string> take_texts() {
  abandon_captures();
  finish_all();
  std::vector<std::string> texts = take_damage();
  for (const Fault& fault : take_faults()) texts.push_back(fault.text);
  return texts;
}

// Kernels that write one number at an address, and copy one.
void run_kernel(bool on_current_stream, std::function<void()> body) {
  const void* stream = on_current_stream ? current_stream() : nullptr;
  if (begins(1, 1, 0, stream)) launch(1, 1, 0, stream, std::move(body));
}

void write_by_kernel(uintptr_t address, float value, bool on_current_stream) {
  run_kernel(on_current_stream, [=] { *reinterpret_cast<float*>(address) = value; });
}

void copy_by_kernel(uintptr_t from, uintptr_t to, bool on_current_stream) {
  run_kernel(on_current_stream, [=] { *reinterpret_cast<float*>(to) = *reinterpret_cast<const float*>(from); });
}

// As cudaMalloc, beside torch's allocator.
uintptr_t malloc_on_device(size_t bytes) {
  forbid_while_capturing("operation not permitted when stream is capturing");
  return reinterpret_cast<uintptr_t>(allocate(current_device(), bytes));
}

void bind_test_names(py::module_ m) {
  m.def("take_faults", take_texts, "What kernels did that they must not, since the last call.");
  m.def("take_launches", take_launches, "How many blocks each launch since the last call had.");
  m.def("set_blocks", set_blocks, py::arg("only"),
        "Of the launches to come, only these blocks run; all, if it is empty.");
  m.def("skip_launches", skip_launches, py::arg("skip"), "Whether the launches to come do nothing but count.");
  m.def(
      "set_order", [](bool ascending) { set_order(ascending ? Order::kAscending : Order::kDescending); },
      py::arg("ascending"), "The order in which blocks and threads run.");
  m.def("synchronisations", synchronisations, "How often the host has waited for a device.");
  m.def("forbid_synchronisation", forbid_synchronisation, py::arg("forbid"),
        "Whether waiting for a device raises, as under torch.cuda.set_sync_debug_mode('error').");
  m.def("set_capturing", pretend_to_capture, py::arg("capturing"),
        "Whether the streams say that a graph is being captured.");
  m.def(
      "set_seed", [](std::optional<uint64_t> seed) { set_seed(seed.value_or(usual_seed())); },
      py::arg("seed") = py::none(),
      "In which order streams do their work. 0: late, and the latest first; another seed draws; None: as at first.");
  m.def("malloc", malloc_on_device, py::arg("bytes"), "As cudaMalloc: the address of memory that is not torch's.");
  m.def("copy_by_kernel", copy_by_kernel, py::arg("source"), py::arg("target"), py::arg("on_current_stream") = true,
        "Runs a kernel that copies a float32 between two addresses.");
  m.def("write_by_kernel", write_by_kernel, py::arg("address"), py::arg("value"), py::arg("on_current_stream") = true,
        "Runs a kernel that writes a float32 there, as a wrong one might.");
}

}  // namespace

void bind_device(py::module_ parent) {
  py::module_ m =
      parent.def_submodule("simt", "The emulated device of the tests; as torch.simt, what torch.cuda is for CUDA.");
  bind_torch_names(m);
  bind_graphs(m);
  bind_test_names(m);
  py::module_::import("atexit").attr("register")(py::cpp_function(finish_all));  // what was launched shows its faults
  py::module_::import("torch").attr("_register_device_module")("simt", m);
}

}  // namespace simt
