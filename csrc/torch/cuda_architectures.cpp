#include "torch/cuda_architectures.h"

#include <charconv>
#include <utility>

#if !defined(TRAINOPT_CUDA_ARCHITECTURES)
#define TRAINOPT_CUDA_ARCHITECTURES ""
#endif

namespace trainopt::aten {
namespace {

bool entry_covers(std::string_view entry, int major, int minor) {
  int built_major = 0;
  int built_minor = 0;
  const char* end = entry.data() + entry.size();
  const char* rest = std::from_chars(entry.data(), end, built_major).ptr;
  if (rest != end) rest = std::from_chars(rest + 1, end, built_minor).ptr;
  const std::string_view kind(rest, static_cast<size_t>(end - rest));  // such as "a" or "+PTX"
  if (kind.substr(0, 1) == "a") return major == built_major && minor == built_minor;
  if (major == built_major) return minor >= built_minor;
  return kind == "+PTX" && major > built_major;
}

std::string& install_command() {
  static std::string command;
  return command;
}

}  // namespace

void set_install_command(std::string command) { install_command() = std::move(command); }

const char* cuda_architectures() { return TRAINOPT_CUDA_ARCHITECTURES; }

bool covers(std::string_view architectures, int major, int minor) {
  while (!architectures.empty()) {
    const size_t space = architectures.find(' ');
    if (entry_covers(architectures.substr(0, space), major, minor)) return true;
    architectures = space == std::string_view::npos ? std::string_view() : architectures.substr(space + 1);
  }
  return false;
}

std::string no_kernels_for(const std::string& name, int major, int minor, const std::string& device) {
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  return "trainopt: no CUDA kernels for " + name + " (compute capability " + capability + ", device " + device +
         "); built for " + cuda_architectures() + ". Build again: TORCH_CUDA_ARCH_LIST=" + capability + " " +
         install_command();
}

}  // namespace trainopt::aten
