// Finds the parameters' entries in torch's state dict.
#pragma once

#include <Python.h>

#include <unordered_map>
#include <utility>
#include <vector>

namespace trainopt::python {

using StateEntries = std::vector<std::pair<PyObject*, PyObject*>>;

// Finds each parameter's entry in torch's state dict. Tensors equal but themselves there, so they are looked for by
// address: to hash one runs Python code. The dict's order is nearly always that of the parameters.
class StateCursor {
 public:
  explicit StateCursor(const StateEntries& entries) : entries_(entries) {}

  PyObject* find(PyObject* param) {
    if (PyObject* found = pass(param)) return found;
    if (places_.empty())
      for (const auto& [key, value] : entries_) places_[key] = value;
    const auto found = places_.find(param);
    return found == places_.end() ? nullptr : found->second;
  }

  // Moves on if the next entry is this parameter's; its value then.
  PyObject* pass(PyObject* param) {
    if (next_ == entries_.size() || entries_[next_].first != param) return nullptr;
    return entries_[next_++].second;
  }

 private:
  const StateEntries& entries_;
  size_t next_ = 0;
  std::unordered_map<PyObject*, PyObject*> places_;
};

}  // namespace trainopt::python
