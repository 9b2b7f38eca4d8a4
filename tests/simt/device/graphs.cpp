#include "device/graphs.h"

#include <c10/util/Exception.h>

#include <utility>

#include "device/streams.h"
#include "queue.h"

namespace simt {

void CapturedGraph::capture_begin() {
  TORCH_CHECK(pool_ == nullptr, "This CUDAGraph instance already owns a captured graph.");
  begin_capture(current_stream());
  pool_ = begin_pool();
}

void CapturedGraph::capture_end() {
  std::shared_ptr<Pool> mine = std::exchange(pool_, nullptr);
  mine->graph = end_capture(current_stream());
  pool_ = std::move(mine);
}

void CapturedGraph::replay() const {
  TORCH_CHECK(pool_ != nullptr && pool_->graph != nullptr,
              "Called CUDAGraph::replay without a preceding successful capture.");
  simt::replay(pool_->graph, current_stream());
}

}  // namespace simt
