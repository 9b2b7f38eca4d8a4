#include <type_traits>

#include "cuda/access.h"
#include "cuda/elementary.h"
#include "cuda/launch.h"
#include "cuda/pointwise.h"
#include "cuda/reduce.h"
#include "cuda/table.h"
#include "losses/pointwise.h"

namespace trainopt::cuda {
namespace {

constexpr int kFinishThreads = 512;

// A block takes a run of elements: as short as its threads have work for, and longer where that would make more blocks
// than fill any GPU, so that there are few partial sums. It depends on the size alone, and so does the order of sums.
constexpr int64_t kShortestRun = kThreads * kItem, kMostBlocks = 8192;

int64_t run_of_block(int64_t numel) {
  int64_t run = kShortestRun;
  while ((numel - 1) / run >= kMostBlocks) run *= 2;
  return run;
}

int64_t blocks_for(int64_t numel) { return numel == 0 ? 1 : (numel - 1) / run_of_block(numel) + 1; }

// One tensor of the pass.
struct Operand {
  void* data;      // null: absent
  int64_t period;  // one run that repeats after so many elements: all of them, or a row that is broadcast; 0: none
  Layout layout;   // for where there is no period
  DType dtype;
  bool vectorisable;  // eight elements at every multiple of eight, as 16-byte words
};

struct Pass {
  int64_t numel, run;
  double parameter;
  Operand input, target, weight, positive;
  bool vectorisable;  // eight elements at a time
};
struct Forward : Pass {
  Operand value;
  TensorView result;
  double divisor;
  double* partials;  // null: the only block writes the result
  int64_t* bad_probability;
};
struct Backward : Pass {
  Operand upstream, input_gradient, target_gradient;
  TensorView number;
  double divisor;
};
static_assert(sizeof(Forward) <= 4096 && sizeof(Backward) <= 4096);

// Eight elements ----------------------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ Words<S> fetch_words_of(const Operand& from, int64_t at) {
  return fetch(from.data, from.dtype, at, S());
}

template <class Stored, class S>
__device__ __forceinline__ void gather(const Operand& from, int64_t at, S (&value)[kItem]) {
  const Stored* data = static_cast<const Stored*>(from.data);
  int64_t place = at % from.period;
#pragma unroll
  for (int k = 0; k < kItem; ++k) {
    value[k] = static_cast<S>(from_stored(data[place]));
    place = place + 1 == from.period ? 0 : place + 1;  // tests break this: a factor read past its row
  }
}

// Of a factor, which may be absent, or a row that is broadcast.
template <class S>
__device__ __forceinline__ void load_factor(const Operand& from, int64_t numel, int64_t at, S (&value)[kItem]) {
  if (from.data == nullptr) {
#pragma unroll
    for (int k = 0; k < kItem; ++k) value[k] = S(1);
    return;
  }
  if (from.vectorisable)
    return unpack_words(fetch_words_of<S>(from, from.period == numel ? at : at % from.period), from.dtype, value);
  switch (from.dtype) {
    case DType::kFloat32: return gather<float>(from, at, value);
    case DType::kBFloat16: return gather<BFloat16>(from, at, value);
    case DType::kFloat16: return gather<Float16>(from, at, value);
    case DType::kFloat64: break;
  }
  gather<double>(from, at, value);
}

// One element -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t place_of(const Operand& operand, int64_t numel, int64_t i) {
  if (operand.period == numel) return i;
  return operand.period != 0 ? i % operand.period : offset_of(operand.layout, i);
}

template <class S>
__device__ __forceinline__ S load(const Operand& from, int64_t numel, int64_t i) {
  return load_one<S>(from.data, from.dtype, place_of(from, numel, i));
}

template <class S>
__device__ __forceinline__ S load_factor(const Operand& from, int64_t numel, int64_t i) {
  return from.data == nullptr ? S(1) : load<S>(from, numel, i);
}

// Kernels -----------------------------------------------------------------------------------------------------------

// Blocks that a multiprocessor should hold at least, for the compiler to bound the registers by: as many as it can do
// without spilling any.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kSingleBlocks = 2;
#else
constexpr int kSingleBlocks = 3;
#endif
template <class S>
constexpr int kMinBlocks = sizeof(S) == sizeof(float) ? kSingleBlocks : 1;

__device__ __forceinline__ int64_t end_of_run(const Pass& pass) {
  const int64_t end = (static_cast<int64_t>(blockIdx.x) + 1) * pass.run;
  return end < pass.numel ? end : pass.numel;
}

__device__ __forceinline__ void write_result(const TensorView& result, double sum, double divisor) {
  store_one(result.data, result.dtype, 0, sum / divisor);
}

template <int kBlockThreads>
__device__ __forceinline__ double add_over_block(double value) {
  TRAINOPT_SHARED(double, of_warp, kBlockThreads / 32);
  return combine_block<kBlockThreads / 32>(value, of_warp, [](double a, double b) { return a + b; });
}

// What is no probability: 1 for the input, 2 for the target, 3 for both. The loss of such an element is NaN, so
// elements are looked at only where their sum is.
template <class Loss, class S>
__device__ __forceinline__ int refusal_of(S x, S t) {
  if constexpr (!std::is_same_v<Loss, BinaryCrossEntropy>) return 0;
  return (x >= S(0) && x <= S(1) ? 0 : 1) | (t >= S(0) && t <= S(1) ? 0 : 2);
}

constexpr int64_t kStep = kThreads * kItem;

// Eight elements of each operand, in two stages: under way, and in registers.
template <class S>
struct Item {
  Words<S> input, target;

  __device__ __forceinline__ void fetch(const Pass& pass, int64_t at) {
    input = fetch_words_of<S>(pass.input, at);
    target = fetch_words_of<S>(pass.target, at);
  }
};
template <class S>
struct Values {
  S input[kItem], target[kItem], weight[kItem], positive[kItem];

  __device__ __forceinline__ Values(const Pass& pass, const Item<S>& item) {
    unpack_words(item.input, pass.input.dtype, input);
    unpack_words(item.target, pass.target.dtype, target);
#pragma unroll
    for (int i = 0; i < kItem; ++i) weight[i] = positive[i] = S(1);
  }
  __device__ __forceinline__ void load_factors(const Pass& pass, int64_t at) {
    load_factor(pass.weight, pass.numel, at, weight);
    load_factor(pass.positive, pass.numel, at, positive);
  }
};

// Walks a thread's items of a run, from `at` on: two at a time, all of whose words are under way before the first is
// waited for, as long as there are two and no factors; else one. Leaves `at` where items end.
template <class S, class Use>
__device__ __forceinline__ void for_each_item(const Pass& pass, int64_t& at, int64_t end, Use use) {
  if (!pass.vectorisable) return;
  const bool has_factors = pass.weight.data != nullptr || pass.positive.data != nullptr;
  for (; !has_factors && at + kStep + kItem <= end; at += 2 * kStep) {
    Item<S> item[2];
    item[0].fetch(pass, at);
    item[1].fetch(pass, at + kStep);
#pragma unroll
    for (int j = 0; j < 2; ++j) use(at + j * kStep, Values<S>(pass, item[j]));
  }
  for (; at + kItem <= end; at += kStep) {
    Item<S> item;
    item.fetch(pass, at);
    Values<S> values(pass, item);
    values.load_factors(pass, at);
    use(at, values);
  }
}

// Whether eight elements are loaded at once or one by one, a thread sums the same ones in the same order.
template <class Loss, class S>
__global__ void __launch_bounds__(kThreads, kMinBlocks<S>)
    pointwise_forward_kernel(const Forward __grid_constant__ pass) {
  using F = Formula<S>;
  const int64_t end = end_of_run(pass);
  const F k(static_cast<S>(pass.parameter));
  double sum = 0;
  int refused = 0;
  int64_t at = static_cast<int64_t>(blockIdx.x) * pass.run + static_cast<int64_t>(threadIdx.x) * kItem;
  for_each_item<S>(pass, at, end, [&](int64_t place, const Values<S>& of) {
    S value[kItem], item_sum = 0;
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      value[i] = value_of(Loss::value(F(of.input[i]), F(of.target[i]), F(of.positive[i]), k)) * of.weight[i];
      item_sum += value[i];
    }
    if (item_sum != item_sum) {
#pragma unroll
      for (int i = 0; i < kItem; ++i) refused |= refusal_of<Loss>(of.input[i], of.target[i]);
    }
    if (pass.value.data != nullptr) store_item(pass.value.data, pass.value.dtype, place, value);
    sum += static_cast<double>(item_sum);
  });
  for (; at < end; at += kStep) {
    const int64_t item_end = at + kItem < end ? at + kItem : end;
    S item_sum = 0;
    for (int64_t i = at; i < item_end; ++i) {  // tests break this: a loss's tail, one element too long
      const S x = load<S>(pass.input, pass.numel, i), t = load<S>(pass.target, pass.numel, i);
      const S value = value_of(Loss::value(F(x), F(t), F(load_factor<S>(pass.positive, pass.numel, i)), k)) *
                      load_factor<S>(pass.weight, pass.numel, i);
      refused |= refusal_of<Loss>(x, t);
      item_sum += value;
      if (pass.value.data != nullptr)
        store_one(pass.value.data, pass.value.dtype, place_of(pass.value, pass.numel, i), value);
    }
    sum += static_cast<double>(item_sum);
  }
  if constexpr (std::is_same_v<Loss, BinaryCrossEntropy>) {
    // Once a block: a batch of NaN would have every thread write to the host's memory.
    TRAINOPT_SHARED(int, of_warp, kThreads / 32);
    refused = combine_block<kThreads / 32>(refused, of_warp, [](int a, int b) { return a | b; });
    if (threadIdx.x == 0 && refused != 0 && pass.bad_probability != nullptr) *pass.bad_probability = refused;
  }
  if (pass.result.data == nullptr) return;
  sum = add_over_block<kThreads>(sum);
  if (threadIdx.x != 0) return;  // tests break this: a part that is not set
  if (pass.partials != nullptr) {
    pass.partials[blockIdx.x] = sum;
  } else {
    write_result(pass.result, sum, pass.divisor);
  }
}

// One block adds the partial sums.
__global__ void __launch_bounds__(kFinishThreads)
    pointwise_finish_kernel(const double* partials, int64_t count, TensorView result, double divisor) {
  double sum = 0;
  // tests break this: a sum without its last part
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum += partials[i];
  sum = add_over_block<kFinishThreads>(sum);
  if (threadIdx.x == 0) write_result(result, sum, divisor);
}

template <class Loss, class S>
__global__ void __launch_bounds__(kThreads, kMinBlocks<S>)
    pointwise_backward_kernel(const Backward __grid_constant__ pass) {
  using F = Formula<S>;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * pass.run, end = end_of_run(pass);
  const F k(static_cast<S>(pass.parameter));
  const bool by_element = pass.upstream.data != nullptr;
  const S scale =
      // tests break this: a mean that is a sum
      by_element ? S(1) : static_cast<S>(load_one<double>(pass.number.data, pass.number.dtype, 0) / pass.divisor);
  const int64_t whole = pass.vectorisable ? begin + (end - begin) / kItem * kItem : begin;
  int64_t at = begin + static_cast<int64_t>(threadIdx.x) * kItem;
  for_each_item<S>(pass, at, whole, [&](int64_t place, const Values<S>& of) {
    S above[kItem], gradient[kItem];
#pragma unroll
    for (int i = 0; i < kItem; ++i) above[i] = scale;
    if (by_element) unpack_words(fetch_words_of<S>(pass.upstream, place), pass.upstream.dtype, above);
    if (pass.input_gradient.data != nullptr) {
#pragma unroll
      for (int i = 0; i < kItem; ++i)
        gradient[i] =
            value_of(Loss::slope(F(of.input[i]), F(of.target[i]), F(of.positive[i]), k)) * of.weight[i] * above[i];
      store_item(pass.input_gradient.data, pass.input_gradient.dtype, place, gradient);
    }
    if (pass.target_gradient.data != nullptr) {
#pragma unroll
      for (int i = 0; i < kItem; ++i)
        gradient[i] = value_of(Loss::target_slope(F(of.input[i]), F(of.target[i]), F(of.positive[i]), k)) *
                      of.weight[i] * above[i];
      store_item(pass.target_gradient.data, pass.target_gradient.dtype, place, gradient);
    }
  });
  // tests break this: a gradient's tail, one element short
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) {
    const F x(load<S>(pass.input, pass.numel, i)), t(load<S>(pass.target, pass.numel, i));
    const F positive(load_factor<S>(pass.positive, pass.numel, i));
    const S weight = load_factor<S>(pass.weight, pass.numel, i);
    const S above = by_element ? load<S>(pass.upstream, pass.numel, i) : scale;
    const auto write = [&](const Operand& gradient, F slope) {
      store_one(gradient.data, gradient.dtype, place_of(gradient, pass.numel, i), value_of(slope) * weight * above);
    };
    if (pass.input_gradient.data != nullptr) write(pass.input_gradient, Loss::slope(x, t, positive, k));
    if (pass.target_gradient.data != nullptr) write(pass.target_gradient, Loss::target_slope(x, t, positive, k));
  }
}

// On the host -------------------------------------------------------------------------------------------------------

// The elements after which a view repeats itself: those of its last dimensions that are one run, if all others have
// stride 0.
int64_t period_of(const TensorView& view, int64_t numel) {
  if (view.layout == nullptr) return numel;
  const Layout& layout = *view.layout;
  int64_t period = 1;
  int d = layout.ndim - 1;
  for (; d >= 0 && layout.strides[d] == period; --d) period *= layout.sizes[d];
  for (; d >= 0; --d)
    if (layout.strides[d] != 0) return 0;
  return period;
}

template <class S>
Operand operand_of(const TensorView& view, int64_t numel) {
  Operand operand{view.data, 0, {}, view.dtype, false};
  if (view.data == nullptr) return operand;
  operand.period = period_of(view, numel);
  operand.vectorisable = is_vectorisable<S>({view.data, nullptr, view.dtype}) &&
                         (operand.period == numel || (operand.period != 0 && operand.period % kItem == 0));
  if (view.layout != nullptr) operand.layout = *view.layout;
  return operand;
}

// Whether it can be loaded, or stored, as 16-byte words.
bool is_aligned_run(const Operand& operand, int64_t numel) {
  return operand.data == nullptr || (operand.vectorisable && operand.period == numel);
}

// What both directions read.
template <class S>
void fill(Pass& pass, const PointwiseTask& task) {
  pass.numel = task.numel;
  pass.run = run_of_block(task.numel);
  pass.parameter = task.parameter;
  pass.input = operand_of<S>(task.input, task.numel);
  pass.target = operand_of<S>(task.target, task.numel);
  pass.weight = operand_of<S>(task.weight, task.numel);
  pass.positive = operand_of<S>(task.positive, task.numel);
  pass.vectorisable = is_aligned_run(pass.input, task.numel) && is_aligned_run(pass.target, task.numel);
  for (const Operand* factor : {&pass.weight, &pass.positive})
    pass.vectorisable = pass.vectorisable && (factor->data == nullptr || factor->period != 0);
}

template <class Loss, class S>
void forward(const PointwiseTask& task, const Reduced& reduced, int64_t* bad_probability, Stream stream) {
  if (task.numel == 0 && reduced.result.data == nullptr) return;
  Forward pass;
  fill<S>(pass, task);
  pass.value = operand_of<S>(task.value, task.numel);
  pass.vectorisable = pass.vectorisable && is_aligned_run(pass.value, task.numel);
  const int64_t blocks = blocks_for(task.numel);
  pass.result = reduced.result;
  pass.divisor = reduced.divisor;
  pass.partials = blocks == 1 ? nullptr : reduced.partials;
  pass.bad_probability = bad_probability;
  launch("pointwise_forward", pointwise_forward_kernel<Loss, S>, {blocks, kThreads}, stream, pass);
  if (reduced.result.data == nullptr || blocks == 1) return;
  launch("pointwise_finish", pointwise_finish_kernel, {1, kFinishThreads}, stream, reduced.partials, blocks,
         reduced.result, reduced.divisor);
}

template <class Loss, class S>
void backward(const PointwiseTask& task, const Upstream& upstream, Stream stream) {
  if (task.numel == 0) return;
  Backward pass;
  fill<S>(pass, task);
  pass.upstream = operand_of<S>(task.upstream, task.numel);
  pass.input_gradient = operand_of<S>(task.input_gradient, task.numel);
  pass.target_gradient = operand_of<S>(task.target_gradient, task.numel);
  for (const Operand* operand : {&pass.upstream, &pass.input_gradient, &pass.target_gradient})
    pass.vectorisable = pass.vectorisable && is_aligned_run(*operand, task.numel);
  pass.number = upstream.number;
  pass.divisor = upstream.divisor;
  launch("pointwise_backward", pointwise_backward_kernel<Loss, S>, {blocks_for(task.numel), kThreads}, stream, pass);
}

}  // namespace

int64_t pointwise_partials(int64_t numel) {
  const int64_t blocks = blocks_for(numel);
  return blocks == 1 ? 0 : blocks;
}

void pointwise_forward(int loss, bool is_float64, const PointwiseTask& task, const Reduced& reduced,
                       int64_t* bad_probability, Stream stream) {
  using Function = void (*)(const PointwiseTask&, const Reduced&, int64_t*, Stream);
#define TRAINOPT_FORWARD(loss) {forward<loss, float>, forward<loss, double>},
  static constexpr Function kForward[][2] = {TRAINOPT_FOR_EACH_POINTWISE_LOSS(TRAINOPT_FORWARD)};
#undef TRAINOPT_FORWARD
  kForward[loss][is_float64](task, reduced, bad_probability, stream);
}

void pointwise_backward(int loss, bool is_float64, const PointwiseTask& task, const Upstream& upstream, Stream stream) {
  using Function = void (*)(const PointwiseTask&, const Upstream&, Stream);
#define TRAINOPT_BACKWARD(loss) {backward<loss, float>, backward<loss, double>},
  static constexpr Function kBackward[][2] = {TRAINOPT_FOR_EACH_POINTWISE_LOSS(TRAINOPT_BACKWARD)};
#undef TRAINOPT_BACKWARD
  kBackward[loss][is_float64](task, upstream, stream);
}

}  // namespace trainopt::cuda
