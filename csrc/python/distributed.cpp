#include "python/distributed.h"

#include <structmember.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

#include "python/wrap.h"
#include "torch/inspect.h"

namespace trainopt::python {
namespace {

// torch's class, and where its two slots are in an object.
struct DTensorClass {
  PyTypeObject* type = nullptr;
  Py_ssize_t local = 0, spec = 0;
};

// The place of a slot (__slots__) in the objects of a type; 0 if that is no slot.
Py_ssize_t place_of_slot(PyObject* type, const char* name) {
  const auto found = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttrString(type, name));
  if (!found) PyErr_Clear();
  if (!found || Py_TYPE(found.ptr()) != &PyMemberDescr_Type) return 0;
  const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(found.ptr())->d_member;
  return member->type == T_OBJECT_EX ? member->offset : 0;
}

// The class, once somebody has imported it: to import it takes a second.
const DTensorClass& dtensor_class(const PyTypeObject* candidate) {
  static DTensorClass known;
  if (known.type != nullptr || std::strcmp(candidate->tp_name, "DTensor") != 0) return known;
  PyObject* module = PyDict_GetItemString(PyImport_GetModuleDict(), "torch.distributed.tensor");
  if (module == nullptr || !PyModule_Check(module)) return known;
  PyObject* type = PyDict_GetItemString(PyModule_GetDict(module), "DTensor");
  if (type == nullptr || reinterpret_cast<PyTypeObject*>(type) != candidate) return known;
  const Py_ssize_t local = place_of_slot(type, "_local_tensor"), spec = place_of_slot(type, "_spec");
  if (local == 0 || spec == 0) return known;
  Py_INCREF(type);
  return known = {reinterpret_cast<PyTypeObject*>(type), local, spec};
}

PyObject* in_slot(PyObject* object, Py_ssize_t place) {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + place);
}

}  // namespace

bool is_dtensor(PyObject* object) {
  return object != nullptr && dtensor_class(Py_TYPE(object)).type == Py_TYPE(object);
}

PyObject* local_of(PyObject* dtensor) { return in_slot(dtensor, dtensor_class(Py_TYPE(dtensor)).local); }

PyObject* spec_of(PyObject* dtensor) { return in_slot(dtensor, dtensor_class(Py_TYPE(dtensor)).spec); }

Leaf leaf_of(PyObject* object, Specs* specs) {
  if (!is_dtensor(object)) return {};
  PyObject* local = local_of(object);
  const Shard* shard = specs->find(spec_of(object));
  if (local == nullptr || !THPVariable_CheckExact(local) || shard == nullptr) return {};
  return {THPVariable_Unpack(local).unsafeGetTensorImpl(), THPVariable_Unpack(object).unsafeGetTensorImpl(), shard};
}

bool have_same_placements(const Leaf& a, const Leaf& b) {
  return a.shard != nullptr && b.shard != nullptr && a.shard->kind == b.shard->kind &&
         are_equal(a.outer->sizes(), b.outer->sizes());
}

const Shard* Specs::find(PyObject* spec) {
  if (spec == nullptr) return nullptr;
  const auto found = known_.find(spec);
  if (found != known_.end()) {
    found->second.used = true;
    return &found->second.shard;
  }
  strangers_.push_back(pybind11::reinterpret_borrow<pybind11::object>(spec));
  return nullptr;
}

bool Specs::learn() {
  if (strangers_.empty()) return false;
  const auto describe = pybind11::module_::import("trainopt.optim.distributed").attr("describe");
  for (const pybind11::object& spec : std::exchange(strangers_, {})) {
    using Sizes = std::vector<int64_t>;
    const auto [key, is_pending, is_elsewhere, cuts, sizes, offset] =
        describe(spec).cast<std::tuple<pybind11::object, bool, bool, Sizes, Sizes, std::optional<Sizes>>>();
    const auto same = [&key = key](const pybind11::object& other) { return other.equal(key); };
    const auto kind = std::find_if(placements_.begin(), placements_.end(), same) - placements_.begin();
    if (kind == static_cast<std::ptrdiff_t>(placements_.size())) placements_.push_back(key);
    const Shard shard{kind, is_pending, is_elsewhere, cuts, sizes, offset.value_or(Sizes()), offset.has_value()};
    known_[spec.ptr()] = {spec, shard, true};
  }
  return true;
}

void Specs::add_shards(const at::Tensor& sums, const std::vector<const Shard*>& shards,
                       const std::vector<int64_t>& rows) const {
  const pybind11::gil_scoped_acquire acquired;
  pybind11::list placements;
  for (const Shard* shard : shards)
    placements.append(shard == nullptr ? pybind11::none() : placements_[static_cast<size_t>(shard->kind)]);
  pybind11::module_::import("trainopt.optim.distributed").attr("add_shards")(wrap(sums), placements, rows);
}

void Specs::forget_unused() {
  std::vector<pybind11::object> dropped;  // until the table is whole again: to let go of one may run Python code
  for (auto entry = known_.begin(); entry != known_.end();) {
    if (std::exchange(entry->second.used, false)) {
      ++entry;
    } else {
      dropped.push_back(entry->second.spec);
      entry = known_.erase(entry);
    }
  }
}

}  // namespace trainopt::python
