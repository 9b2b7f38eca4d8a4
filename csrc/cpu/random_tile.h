// Random numbers for the elements of a tile, each from its place in the whole parameter.
#pragma once

#include "core/master.h"
#include "core/random.h"
#include "cpu/engine.h"
#include "rules/task.h"

namespace trainopt::cpu {
namespace {

// The words of one call of the generator after the other, and then what is made of all of them: two loops that become
// vector code.
template <int kMost>
using WordsOfCalls = uint32_t[4][kMost];
template <int kMost>
TRAINOPT_FUNCTION void random_calls(WordsOfCalls<kMost>& words, int64_t first, int calls, RandomStream stream,
                                    const TensorKey& key) {
  for (int q = 0; q < calls; ++q) {
    const RandomWords r = random_words(key.seed, key.step, key.tensor, stream, static_cast<uint64_t>(first + q));
    for (int w = 0; w < 4; ++w) words[w][q] = r.word[w];
  }
}

// Numbers of each kind: kEach of them come of one call of the generator, and `fill` makes them of so many calls;
// `begin` is a multiple of kEach.
struct Gaussians {
  using Value = float;  // standard normal
  static constexpr int kEach = 4;
  TRAINOPT_INLINE static void fill(Value* out, int64_t begin, int calls, const TensorKey& key) {
    WordsOfCalls<kBlock / kEach> words;
    random_calls(words, begin / kEach, calls, RandomStream::kNoise, key);
    for (int q = 0; q < calls; ++q) {
      const GaussianPair one = gaussian_pair(words[0][q], words[1][q]);
      const GaussianPair two = gaussian_pair(words[2][q], words[3][q]);
      out[4 * q] = one.first;
      out[4 * q + 1] = one.second;
      out[4 * q + 2] = two.first;
      out[4 * q + 3] = two.second;
    }
  }
};
struct RoundingBits {
  using Value = uint16_t;  // what a number is rounded by at random, two from each word
  static constexpr int kEach = 8;
  TRAINOPT_INLINE static void fill(Value* out, int64_t begin, int calls, const TensorKey& key) {
    WordsOfCalls<kBlock / kEach> words;
    random_calls(words, begin / kEach, calls, RandomStream::kRounding, key);
    for (int q = 0; q < calls; ++q)
      for (int i = 0; i < 8; ++i) out[8 * q + i] = static_cast<uint16_t>(words[i / 2][q] >> (16 * (i % 2)));
  }
};

// Those of elements [begin, begin + count) of the whole.
template <class Kind>
void random_range(typename Kind::Value* out, int64_t begin, int64_t count, const TensorKey& key) {
  typename Kind::Value tile[kBlock];
  for (int64_t i = begin, end = begin + count; i < end;) {
    const int64_t first = i / Kind::kEach * Kind::kEach, most = kBlock / Kind::kEach;
    const int64_t calls = (end - first + Kind::kEach - 1) / Kind::kEach;
    Kind::fill(tile, first, static_cast<int>(calls < most ? calls : most), key);
    for (; i < end && i < first + kBlock; ++i) *out++ = tile[i - first];
  }
}

// Those of a shard's elements are those of their places in the whole: run by run of its innermost dimension.
template <class Kind>
void random_shard(typename Kind::Value* out, const ShardLayout& shard, int64_t begin, int count, const TensorKey& key) {
  const Layout& layout = shard.layout;
  for (int done = 0; done < count;) {
    int64_t place = shard.offset, rest = begin + done, run = count - done;
    for (int d = layout.ndim; d-- > 0; rest /= layout.sizes[d]) {
      const int64_t index = rest % layout.sizes[d];
      place += index * layout.strides[d];
      if (d < layout.ndim - 1) continue;
      const int64_t left = layout.strides[d] == 1 ? layout.sizes[d] - index : 1;
      if (left < run) run = left;
    }
    random_range<Kind>(out + done, place, run, key);
    done += static_cast<int>(run);
  }
}

// Those of a task's tile, which begins at a multiple of kBlock.
template <class Kind>
void random_tile(typename Kind::Value* out, const TensorTask& task, int64_t begin, int count, const TensorKey& key) {
  if (task.shard != nullptr) return random_shard<Kind>(out, *task.shard, begin, count, key);
  Kind::fill(out, begin, kBlock / Kind::kEach, key);
}

// Rounds a tile at random to numbers that the parameter's type holds: `bits` are 16 for each.
[[gnu::noinline]] void round_tile_at_random(DType dtype, int count, const uint16_t* bits, float* tile) {
  if (dtype == DType::kBFloat16) {
    for (int i = 0; i < count; ++i) tile[i] = round_at_random(tile[i], bits[i], BFloat16());
  } else {
    for (int i = 0; i < count; ++i) tile[i] = round_at_random(tile[i], bits[i], Float16());
  }
}

}  // namespace
}  // namespace trainopt::cpu
