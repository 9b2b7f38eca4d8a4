// The inner loop over tensors in two parts, in the ways that are meant to be fast; run_buffered has all others. A block
// is gone over twice: from load to store, with states that are codes left in a buffer as floats; and once more over
// these, when their largest magnitudes are known. What is done one tensor after the other in run_buffered is here done
// in registers, beside the divider, which is what an Adam step waits for: master24 with 8-bit states takes half the
// time.
#pragma once

#include <type_traits>

#include "core/code8.h"
#include "core/master.h"
#include "cpu/bytes.h"
#include "cpu/engine.h"
#include "cpu/tile.h"
#include "cpu/vec.h"
#include "rules/stages.h"

namespace trainopt::cpu {
namespace {

template <class Lanes>
TRAINOPT_FUNCTION Lanes load_lanes(const void* from) {
  Lanes lanes;
  __builtin_memcpy(&lanes, from, sizeof lanes);
  return lanes;
}
template <class Lanes>
TRAINOPT_FUNCTION void store_lanes(void* to, Lanes lanes) {
  __builtin_memcpy(to, &lanes, sizeof lanes);
}

// A format has rows: as many elements as lie side by side in one register. Of 16-bit elements those are two vectors of
// floats, those at even and those at odd places (see Pair), which are worked on one after the other: both at once would
// take more registers than there are. `get` takes one of them out of what was loaded, `put` puts it into what is to be
// stored.
template <class Stored>
struct Whole;

template <>
struct Whole<float> {
  using Element = float;  // of the parameter's own tensor, and of its gradient
  using Row = Vec<float>;
  static constexpr bool kHasCodes = false;

  TRAINOPT_INLINE static bool is(const TensorView& view) { return is_run_of<float>(view); }
  TRAINOPT_INLINE static Row load(const TensorView& view, int64_t at) {
    return cpu::load(static_cast<const float*>(view.data) + at);
  }
  template <int kPart>
  TRAINOPT_INLINE static Vec<float> get(const Row& row) {
    return row;
  }
  template <int kPart>
  TRAINOPT_INLINE static void put(Row& row, Vec<float> x) {
    row = x;
  }
  TRAINOPT_INLINE static void store(const TensorView& view, int64_t at, const Row& row) {
    cpu::store(static_cast<float*>(view.data) + at, row);
  }
};

// Puts 16 bits of each word into the halves of words that are the part's.
template <int kPart>
TRAINOPT_FUNCTION void put_upper(WordLanes& halves, Words bits) {
  halves = kPart == 0 ? (bits >> 16).lanes : halves | (bits & 0xffff0000u).lanes;
}
template <int kPart>
TRAINOPT_FUNCTION void put_lower(WordLanes& halves, Words bits) {
  halves = kPart == 0 ? (bits & 0xffffu).lanes : halves | (bits << 16).lanes;
}
template <int kPart>
TRAINOPT_FUNCTION WordLanes upper_bits(WordLanes halves) {
  return kPart == 0 ? halves << 16 : halves & 0xffff0000u;
}

template <>
struct Whole<BFloat16> {
  using Element = BFloat16;
  using Row = WordLanes;
  static constexpr bool kHasCodes = false;

  TRAINOPT_INLINE static bool is(const TensorView& view) { return is_run_of<BFloat16>(view); }
  TRAINOPT_INLINE static Row load(const TensorView& view, int64_t at) {
    return load_lanes<WordLanes>(static_cast<const BFloat16*>(view.data) + at);
  }
  template <int kPart>
  TRAINOPT_INLINE static Vec<float> get(const Row& row) {
    return (FloatLanes)upper_bits<kPart>(row);
  }
  template <int kPart>
  TRAINOPT_INLINE static void put(Row& row, Vec<float> x) {
    put_upper<kPart>(row, round_to_upper_half(x));
  }
  TRAINOPT_INLINE static void store(const TensorView& view, int64_t at, const Row& row) {
    store_lanes(static_cast<BFloat16*>(view.data) + at, row);
  }
};

// A bfloat16 with what it lacks. As where a pair is stored, there is no NaN with bits in its lower half, which could
// carry out of the exponent: see round_to_upper_half.
struct TwoParts {
  WordLanes upper, rest;
};

// `Rest` is how that is stored: int16_t, or int8_t for the upper 8 bits of it.
template <class Rest>
struct WithRest {
  using Element = BFloat16;
  using Row = TwoParts;
  static constexpr bool kIsExact = sizeof(Rest) == sizeof(int16_t);

  TRAINOPT_INLINE static bool is(const TensorView& view) {
    return view.dtype == (kIsExact ? DType::kMaster16 : DType::kMaster24);
  }
  TRAINOPT_INLINE static Row load(const TensorView& view, int64_t at) {
    const Rest* rest = static_cast<const Rest*>(view.beside) + at;
    const auto upper = load_lanes<WordLanes>(static_cast<const BFloat16*>(view.data) + at);
    if constexpr (kIsExact) return {upper, load_lanes<WordLanes>(rest)};
    return {upper, (WordLanes)load_byte_halves(rest)};
  }
  template <int kPart>
  TRAINOPT_INLINE static Vec<float> get(const Row& row) {
    // The rest is brought to the top of its word, and back down with its sign.
    const WordLanes top = kIsExact     ? upper_bits<kPart>(row.rest)
                          : kPart == 0 ? row.rest << 24
                                       : row.rest << 8 & 0xff000000u;
    return float_of(join<Words>(upper_bits<kPart>(row.upper), (WordLanes)((IntLanes)top >> 16)));
  }
  template <int kPart>
  TRAINOPT_INLINE static void put(Row& row, Vec<float> x) {
    const Words bits = kIsExact ? bits_of(x) : rounded_to_24(bits_of(x));
    put_upper<kPart>(row.upper, nearest_upper(bits));
    put_lower<kPart>(row.rest, kIsExact ? bits : bits >> 8);
  }
  TRAINOPT_INLINE static void store(const TensorView& view, int64_t at, const Row& row) {
    Rest* const rest = static_cast<Rest*>(view.beside) + at;
    store_lanes(static_cast<BFloat16*>(view.data) + at, row.upper);
    if constexpr (kIsExact) return store_lanes(rest, row.rest);
    store_byte_halves(rest, (HalfLanes)row.rest);
  }
};

// States in 8 bits, in rows of so many parts.
template <int kParts>
TRAINOPT_FUNCTION WordLanes load_codes(const uint8_t* from) {
  if constexpr (kParts == 1) return load_byte_words(from);
  return (WordLanes)load_byte_halves(from);
}
template <int kParts>
TRAINOPT_FUNCTION void store_codes(uint8_t* to, WordLanes codes) {
  if constexpr (kParts == 1) return store_byte_words(to, codes);
  store_byte_halves(to, (HalfLanes)codes);
}
template <int kParts, int kPart>
TRAINOPT_FUNCTION Words codes_of_part(WordLanes codes) {
  if constexpr (kParts == 1) return codes;
  return kPart == 0 ? codes & 0xffffu : codes >> 16;
}
struct InCodes {
  static constexpr bool kHasCodes = true;
  TRAINOPT_INLINE static bool is(const TensorView& view) {
    return view.dtype == DType::kSigned8 || view.dtype == DType::kUnsigned8;
  }
};

template <class Rule, int kState>
using CodeOf = std::conditional_t<contains(kUnsignedStates<Rule>, kState), UnsignedCode, SignedCode>;

// Calls use(number, as a type) for numbers of a set.
template <uint32_t kSet, int kNumber = 0, class Use>
TRAINOPT_FUNCTION void for_each_in(Use use) {
  if constexpr ((kSet >> kNumber) != 0) {
    if constexpr (contains(kSet, kNumber)) use(std::integral_constant<int, kNumber>());
    for_each_in<kSet, kNumber + 1>(use);
  }
}

// Encodes a state of a whole block.
template <class Code, int kParts>
TRAINOPT_FUNCTION void encode_block(const float* decoded, const Statistics<Words>& lanes, float rounding,
                                    uint8_t* codes, float* scale) {
  uint32_t largest[kWords], other[kWords];
  store_lanes(largest, lanes.largest.lanes);
  store_lanes(other, lanes.other.lanes);
  auto statistics = no_numbers<uint32_t>(Code());
  // Two loops, each of which becomes vector code.
  for (int i = 0; i < kWords; ++i) statistics.largest = larger(statistics.largest, largest[i]);
  for (int i = 0; i < kWords; ++i) statistics.other = combined_others(Code(), statistics.other, other[i]);
  const Encoding encoding = encoding_of(Code(), statistics, kBlock, rounding);
  *scale = encoding.stored;
  for (int at = 0; at < kBlock; at += kParts * kWords) {
    WordLanes row = encode(Code(), encoding, load(decoded + at)).lanes;
    if constexpr (kParts == 2) {
      const Words odd = encode(Code(), encoding, load(decoded + at + kWords));
      row = ((Words(row) & 0xffffu) | (odd << 16)).lanes;
    }
    store_codes<kParts>(codes + at, row);
  }
}

// Steps one whole block.
template <class Rule, bool kPlain, StateSet kSet, class Param, class State>
TRAINOPT_FUNCTION void run_coded_block(const TensorTask& task, const Stages<float>& stages,
                                       const typename Rule::template Scalars<float>& scalars, int64_t begin) {
  using Gradient = Whole<typename Param::Element>;
  using T = Vec<float>;
  constexpr int kCount = kStateCount<Rule>, kParts = Register<typename Param::Element>::kSize / T::kSize;
  alignas(64) float decoded[kCount][kBlock];  // states that are codes, a row's parts one after the other
  Statistics<Words> statistics[kCount];
  Decoding decoding[kCount];
  if constexpr (State::kHasCodes)
    for_each_in<kSet>([&](auto s) {
      statistics[s] = no_numbers<Words>(CodeOf<Rule, s>());
      decoding[s] = decoding_of(CodeOf<Rule, s>(), static_cast<float*>(task.state[s].beside)[begin / kCodeBlock]);
    });
  for (int row = 0; row < kBlock; row += kParts * kWords) {
    const int64_t at = begin + row;
    const auto p_in = Param::load(task.param, at);
    const auto g_in = Gradient::load(task.gradient, at);
    auto p_out = p_in;
    auto g_out = g_in;
    WordLanes state_in[kCount], state_out[kCount];
    for_each_in<kSet>([&](auto s) {
      if constexpr (State::kHasCodes) {
        state_in[s] = load_codes<kParts>(static_cast<const uint8_t*>(task.state[s].data) + at);
      } else {
        state_in[s] = State::load(task.state[s], at);
      }
    });
    for_each_in<(1u << kParts) - 1>([&](auto index) {
      constexpr int kPart = index;
      T p = Param::template get<kPart>(p_in), g = Gradient::template get<kPart>(g_in), state[kCount];
      for (T& each : state) each = T(0.0f);
      for_each_in<kSet>([&](auto s) {
        if constexpr (State::kHasCodes) {
          state[s] = decode(CodeOf<Rule, s>(), decoding[s], codes_of_part<kParts, kPart>(state_in[s]));
        } else {
          state[s] = State::template get<kPart>(state_in[s]);
        }
      });
      step_elements<Rule, kPlain>(stages, scalars, p, g, state, T(0.0f));
      Param::template put<kPart>(p_out, p);
      if constexpr (!kPlain) Gradient::template put<kPart>(g_out, g);
      for_each_in<kSet>([&](auto s) {
        if constexpr (State::kHasCodes) {
          store(&decoded[s][row + kPart * kWords], state[s]);
          add_magnitude(CodeOf<Rule, s>(), statistics[s], bits_of(state[s]) & 0x7fffffffu);
        } else {
          State::template put<kPart>(state_out[s], state[s]);
        }
      });
    });
    Param::store(task.param, at, p_out);
    if (!kPlain && stages.leaves_unscaled()) Gradient::store(task.gradient, at, g_out);
    if constexpr (!State::kHasCodes)
      for_each_in<kWrittenStates<Rule, kSet>>([&](auto s) { State::store(task.state[s], at, state_out[s]); });
  }
  if constexpr (State::kHasCodes)
    for_each_in<kSet>([&](auto s) {
      encode_block<CodeOf<Rule, s>, kParts>(decoded[s], statistics[s], stages.code_rounding,
                                            static_cast<uint8_t*>(task.state[s].data) + begin,
                                            static_cast<float*>(task.state[s].beside) + begin / kCodeBlock);
    });
}

// Whether the tensors of a task are stored so.
template <class Param, class State>
TRAINOPT_FUNCTION bool are_stored_as(const TensorTask& task, StateSet set) {
  bool are = Param::is(task.param) && is_run_of<typename Param::Element>(task.gradient);
  for (int s = 0; s < kMaxStates; ++s)
    if (contains(set, s)) are = are && State::is(task.state[s]);
  return are;
}

}  // namespace
}  // namespace trainopt::cpu
