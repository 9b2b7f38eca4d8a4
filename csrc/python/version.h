// The version counter of a tensor, by which autograd notices that a tensor it has saved was changed in place.
#pragma once

#include <c10/core/TensorImpl.h>

#include <type_traits>
#include <utility>

namespace trainopt::python {

// c10::VariableVersion moves on by an atomic operation, which waits for every write before it: for a small tensor that
// costs more than the arithmetic of its step. So its only member is reached by name here. The language lifts access
// checks for the arguments of an explicit instantiation, and the friend that it defines hands the pointer out.
template <auto kMember>
struct VersionAccess;
template <class T, c10::intrusive_ptr<T> c10::VariableVersion::* kMember>
struct VersionAccess<kMember> {
  friend auto counter_of(const c10::VariableVersion& version) { return (version.*kMember).get(); }
};
auto counter_of(const c10::VariableVersion& version);
template struct VersionAccess<&c10::VariableVersion::version_counter_>;

using VersionCounter = std::remove_pointer_t<decltype(counter_of(std::declval<const c10::VariableVersion&>()))>;

// Null for a tensor that was made in inference mode.
inline VersionCounter* counter_of(const c10::TensorImpl* tensor) { return counter_of(tensor->version_counter()); }

// As c10::VariableVersion::bump. A counter that nothing else refers to, no view and no saved tensor, can only be moved
// by another operation that writes to this very tensor at this very time, which is a race for its values anyhow; a
// plain write will do for it.
inline void move_on(VersionCounter* counter) {
  if (c10::raw::intrusive_ptr::use_count(counter) == 1) {
    counter->version_.store(counter->version_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  } else {
    ++counter->version_;
  }
}

}  // namespace trainopt::python
