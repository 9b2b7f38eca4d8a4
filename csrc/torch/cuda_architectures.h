// Which GPUs the CUDA kernels run on.
#pragma once

#include <string>
#include <string_view>

namespace trainopt::aten {

// What they were compiled for, as in TORCH_CUDA_ARCH_LIST: "7.5 8.0 12.0+PTX". Empty in a build without them.
const char* cuda_architectures();

// Whether a GPU of this compute capability runs what was compiled for such a list: the machine code of its own major
// version and of a minor one that is not above, or PTX that is not above. What was compiled for 9.0a runs on 9.0 alone,
// and for 10.0f on that major version from there on, in either form.
bool covers(std::string_view architectures, int major, int minor);

// What is said of a GPU that these kernels do not run on, with the command that builds them for it.
std::string no_kernels_for(const std::string& name, int major, int minor, const std::string& device);

// The command that installs trainopt here, which Python knows.
void set_install_command(std::string command);

}  // namespace trainopt::aten
