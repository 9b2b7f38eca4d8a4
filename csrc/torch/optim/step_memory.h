// The memory that a step reads and writes, and which parameters share it.
#pragma once

#include <c10/core/TensorImpl.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace trainopt::aten {

using Indices = std::vector<int64_t>;

// What is noted is compared with the step before: a model's memory seldom moves, and then nothing is sorted again.
class StepMemory {
 public:
  void clear();

  // Notes the elements of a tensor, of the parameter of that index; null: nothing.
  void note_written(const c10::TensorImpl*, uint32_t index);
  void note_read(const c10::TensorImpl*, uint32_t index);

  // To be called when all are noted: the parameters that write memory which another one, or they themselves, read or
  // write as well. Their steps are torch's, one after the other.
  const Indices& sharing();

  // Whether what was noted last writes nothing that this tensor reads.
  bool is_clear(const c10::TensorImpl* gradient) const;

 private:
  struct Span {
    const char* begin;
    const char* end;
    uint32_t tensor;
  };

  struct Reading : Span {
    bool alone;  // no other storage has this memory, unless it lies in memory that torch has not allocated
  };

  std::vector<Span> written_;  // the memory of this step, over that of the last
  size_t spans_ = 0;           // how many are this step's
  bool owns_written_ = true;   // all of it is memory that torch has allocated for one storage
  std::vector<Reading> read_;

  bool sorted_is_current_ = false;
  std::vector<Span> sorted_;           // what is written, by where it begins
  std::vector<const char*> furthest_;  // the furthest end of each and all before it
  Indices writers_;                    // parameters that write what another one writes
  Indices sharing_;

  void note_span(const Span&);
  void sort_written();
  template <class Use>
  void for_each_written(const Span&, Use use) const;
};

}  // namespace trainopt::aten
