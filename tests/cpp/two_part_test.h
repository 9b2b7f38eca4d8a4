// Tensors in two parts (16-bit parameters with what they lack, 8-bit states with scales), in memory that ends where
// they do: every variant, cut into pieces anyhow, gives the bits of the same in plain code for one number after the
// other.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "core/code8.h"
#include "core/master.h"
#include "cpu/engine.h"
#include "rules/adam.h"
#include "settings.h"
#include "variants.h"

namespace trainopt {

// How the tensors of a parameter are stored.
struct TwoParts {
  const char* name;
  DType param, gradient, moment, square;
};
inline const TwoParts kTwoParts[] = {
    {"float32, codes", DType::kFloat32, DType::kFloat32, DType::kSigned8, DType::kUnsigned8},
    {"bfloat16, codes", DType::kBFloat16, DType::kBFloat16, DType::kSigned8, DType::kUnsigned8},
    {"rest of 16 bits, codes", DType::kMaster16, DType::kBFloat16, DType::kSigned8, DType::kUnsigned8},
    {"rest of 8 bits, codes", DType::kMaster24, DType::kBFloat16, DType::kSigned8, DType::kUnsigned8},
    {"rest of 16 bits, bfloat16", DType::kMaster16, DType::kBFloat16, DType::kBFloat16, DType::kBFloat16},
    {"rest of 8 bits, float32", DType::kMaster24, DType::kBFloat16, DType::kFloat32, DType::kFloat32},
    {"copy, codes", DType::kMasterCopy, DType::kFloat16, DType::kSigned8, DType::kUnsigned8},
    {"float32, a code and bfloat16", DType::kFloat32, DType::kFloat32, DType::kSigned8, DType::kBFloat16},
};

// One tensor: both parts, each in a block of memory of its own.
struct TwoPartTensor {
  DType dtype;
  std::vector<unsigned char> first, second;

  TwoPartTensor(DType d, int64_t n) : dtype(d), first(static_cast<size_t>(n * size_of(d))) {
    const int64_t beside = d == DType::kMaster16                            ? 2 * n
                           : d == DType::kMaster24                          ? n
                           : d == DType::kMasterCopy                        ? 4 * n
                           : d == DType::kSigned8 || d == DType::kUnsigned8 ? 4 * scales_of(n)
                                                                            : 0;
    second.resize(static_cast<size_t>(beside));
  }
  TensorView view() { return {first.data(), nullptr, dtype, second.data()}; }

  template <class T>
  T& at(std::vector<unsigned char>& part, int64_t i) {
    return reinterpret_cast<T*>(part.data())[i];
  }
  float get(int64_t i) {
    switch (dtype) {
      case DType::kFloat32: return at<float>(first, i);
      case DType::kBFloat16: return to_float(at<BFloat16>(first, i));
      case DType::kFloat16: return to_float(at<Float16>(first, i));
      case DType::kMaster16:
        return float_of(
            join(uint32_t{at<uint16_t>(first, i)} << 16, static_cast<uint32_t>(int32_t{at<int16_t>(second, i)})));
      case DType::kMaster24:
        return float_of(
            join(uint32_t{at<uint16_t>(first, i)} << 16, static_cast<uint32_t>(int32_t{at<int8_t>(second, i)}) << 8));
      case DType::kMasterCopy: return join_copy(at<Float16>(first, i), at<float>(second, i));
      case DType::kSigned8:
        return decode(SignedCode(), decoding_of(SignedCode(), at<float>(second, i / kCodeBlock)),
                      uint32_t{first[static_cast<size_t>(i)]});
      default:
        return decode(UnsignedCode(), decoding_of(UnsignedCode(), at<float>(second, i / kCodeBlock)),
                      uint32_t{first[static_cast<size_t>(i)]});
    }
  }
  template <class Code>
  void encode_all(Code code, const std::vector<float>& values, float rounding) {
    const auto n = static_cast<int64_t>(values.size());
    for (int64_t block = 0; block < n; block += kCodeBlock) {
      const int64_t end = block + kCodeBlock < n ? block + kCodeBlock : n;
      auto statistics = no_numbers<uint32_t>(code);
      for (int64_t i = block; i < end; ++i)
        add_magnitude(code, statistics, bits_of(values[static_cast<size_t>(i)]) & 0x7fffffffu);
      const Encoding encoding = encoding_of(code, statistics, static_cast<int>(end - block), rounding);
      at<float>(second, block / kCodeBlock) = encoding.stored;
      for (int64_t i = block; i < end; ++i)
        first[static_cast<size_t>(i)] =
            static_cast<unsigned char>(encode(code, encoding, values[static_cast<size_t>(i)]));
    }
  }
  void set_all(const std::vector<float>& values, float rounding) {
    if (dtype == DType::kSigned8) return encode_all(SignedCode(), values, rounding);
    if (dtype == DType::kUnsigned8) return encode_all(UnsignedCode(), values, rounding);
    for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
      const float x = values[static_cast<size_t>(i)];
      const uint32_t bits = without_payload(bits_of(x)), rounded = rounded_to_24(bits);
      switch (dtype) {
        case DType::kFloat32: at<float>(first, i) = x; break;
        case DType::kBFloat16: at<BFloat16>(first, i) = to_bfloat16(x); break;
        case DType::kFloat16: at<Float16>(first, i) = to_float16(x); break;
        case DType::kMaster16:
          at<uint16_t>(first, i) = static_cast<uint16_t>(nearest_upper(bits) >> 16);
          at<int16_t>(second, i) = static_cast<int16_t>(bits & 0xffffu);
          break;
        case DType::kMaster24:
          at<uint16_t>(first, i) = static_cast<uint16_t>(nearest_upper(rounded) >> 16);
          at<int8_t>(second, i) = static_cast<int8_t>(rounded >> 8 & 0xffu);
          break;
        default: at<Float16>(first, i) = to_float16(x); at<float>(second, i) = x;
      }
    }
  }
};

// The tensors of one parameter.
struct TwoPartParameter {
  TwoPartTensor param, gradient, moment, square;

  TwoPartParameter(const TwoParts& stored, int64_t n)
      : param(stored.param, n), gradient(stored.gradient, n), moment(stored.moment, n), square(stored.square, n) {
    RandomNumbers numbers{static_cast<uint64_t>(n)};
    std::vector<float> values[4];
    for (int64_t i = 0; i < n; ++i) {
      // The blocks of moments are of one magnitude, or of many.
      const double spread = i / kCodeBlock % 2 == 0 ? 1 : std::exp(4 * numbers.value());
      values[0].push_back(static_cast<float>(numbers.value()));
      values[1].push_back(static_cast<float>(numbers.value() * spread));
      values[2].push_back(static_cast<float>(numbers.value() * spread));
      values[3].push_back(static_cast<float>(spread * spread * (i % 5 == 0 ? 0 : std::fabs(numbers.value()))));
    }
    param.set_all(values[0], 0);
    gradient.set_all(values[1], 0);
    moment.set_all(values[2], 0);
    square.set_all(values[3], 0);
  }
  bool has_bits_of(const TwoPartParameter& other) const {
    const auto same = [](const TwoPartTensor& a, const TwoPartTensor& b) {
      return a.first == b.first && a.second == b.second;
    };
    return same(param, other.param) && same(gradient, other.gradient) && same(moment, other.moment) &&
           same(square, other.square);
  }
};

inline void step_plainly(TwoPartParameter& p, int64_t n, const Scalars& scalars) {
  Adam::Scalars<float> rule;
  std::memcpy(&rule, scalars.rule, sizeof rule);
  const Stages<float>& stages = scalars.stages32;
  std::vector<float> params, moments, squares;
  for (int64_t i = 0; i < n; ++i) {
    float x = p.param.get(i), g = p.gradient.get(i), state[] = {p.moment.get(i), p.square.get(i), 0};
    step_elements<Adam, false>(stages, rule, x, g, state, 0.0f);
    params.push_back(x);
    moments.push_back(state[0]);
    squares.push_back(state[1]);
  }
  p.param.set_all(params, 0);
  p.moment.set_all(moments, stages.code_rounding);
  p.square.set_all(squares, stages.code_rounding);
}

inline void test_two_parts() {
  const cpu::Rule* rule = cpu::find_rule("adam");
  for (const char* name : {"plain", "decoupled", "uncorrected"}) {
    const Scalars scalars = scalars_of(setting("adam", name), false);
    for (const TwoParts& stored : kTwoParts)
      for (const int64_t n : {1, 7, 31, 255, 256, 257, 511, 1029}) {
        TwoPartParameter expected(stored, n);
        step_plainly(expected, n, scalars);
        for (const cpu::Variant variant : variants()) {
          cpu::set_variant(variant);
          for (const int64_t pieces : {1, 3}) {
            TwoPartParameter found(stored, n);
            cpu::TensorTask task{};
            task.numel = n;
            task.param = found.param.view();
            task.gradient = found.gradient.view();
            task.state[0] = found.moment.view();
            task.state[1] = found.square.view();
            task.scalars = &scalars;
            const int64_t blocks = cpu::blocks_of(n), starts[] = {0, blocks};
            for (int64_t piece = 0; piece < pieces; ++piece)
              cpu::run_blocks({&task, starts, 1, rule, false}, blocks * piece / pieces, blocks * (piece + 1) / pieces);
            check(found.has_bits_of(expected), std::string("two parts: ") + stored.name + ", " + name + ", " +
                                                   std::to_string(n) + " elements, " + cpu::name_of(variant));
          }
        }
      }
  }
}

}  // namespace trainopt
