// CUDA graphs on the emulated device.
#pragma once

#include <memory>

#include "device/memory.h"

namespace simt {

// As torch.cuda.CUDAGraph, on the current stream.
class CapturedGraph {
 public:
  void capture_begin();
  void capture_end();
  void replay() const;
  void reset() { pool_ = nullptr; }

 private:
  std::shared_ptr<Pool> pool_;
};

}  // namespace simt
