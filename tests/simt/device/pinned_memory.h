// Memory of the host's that copies between it and a device need not wait for.
#pragma once

#include <c10/core/Allocator.h>

namespace simt {

c10::Allocator* pinned_allocator();
bool is_pinned(const void* memory);

}  // namespace simt
