// The CPU engine by itself, without torch: every rule, dtype, layout, stage and SIMD variant against a plain
// computation in double that is written here anew; conversions of 16-bit numbers; random numbers. Meant to run under
// AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`). The last line tells what passed and failed.
//
//     test        all of it
//     test 2/3    the second of three shares, which can run side by side
#include <cstdio>
#include <limits>

#include "core/random.h"
#include "step_judge.h"
#include "two_part_test.h"
#include "variants.h"

namespace trainopt {
namespace {

// Of the settings, every `shares`-th from number `share` on.
size_t share = 0, shares = 1;
std::vector<Setting> own_settings() {
  std::vector<Setting> own;
  for (size_t i = share; i < kSettings.size(); i += shares) own.push_back(kSettings[i]);
  return own;
}

bool rounds_right(float x, DType dtype) {
  return same_value(decode16(convert(x, dtype), dtype), round16(static_cast<double>(x), dtype));
}

void test_conversions() {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const std::string name = format_of(dtype).name;
    int wrong_value = 0, wrong_trip = 0, wrong_rounding = 0;
    for (uint32_t i = 0; i < 65536; ++i) {
      const auto bits = static_cast<uint16_t>(i);
      const double value = decode16(bits, dtype);
      wrong_value += !same_value(static_cast<double>(convert(bits, dtype)), value);
      const uint16_t back = convert(convert(bits, dtype), dtype);
      wrong_trip += std::isnan(value) ? !std::isnan(decode16(back, dtype)) : back != bits;
      // The middle between this number and the next, and the floats on either side of it.
      const double next = decode16(static_cast<uint16_t>(i + 1), dtype);
      if (!std::isfinite(value) || std::isnan(next)) continue;
      const double step = std::isfinite(next) ? next - value : std::copysign(spacing(value, dtype), value);
      const auto middle = static_cast<float>(value + step / 2);
      for (const float x : {middle, std::nextafter(middle, -HUGE_VALF), std::nextafter(middle, HUGE_VALF)})
        wrong_rounding += !rounds_right(x, dtype);
    }
    check(wrong_value == 0, name + ": to_float of all 65,536 numbers");
    check(wrong_trip == 0, name + ": there and back of all 65,536 numbers");
    check(wrong_rounding == 0, name + ": rounding round every middle");

    RandomNumbers numbers{1};
    int wrong = 0;
    for (int i = 0; i < 1000000; ++i) wrong += !rounds_right(float_of(static_cast<uint32_t>(numbers.next())), dtype);
    check(wrong == 0, name + ": rounding of a million floats");
    for (const float x : {0.0f,
                          -0.0f,
                          65504.0f,
                          65519.99f,
                          65520.0f,
                          65536.0f,
                          3.3895e38f,
                          3.3961e38f,
                          3.4e38f,
                          1e-45f,
                          6e-8f,
                          2.98e-8f,
                          2.9802322e-8f,
                          2.9802326e-8f,
                          6.1e-5f,
                          1.1754942e-38f,
                          HUGE_VALF,
                          -HUGE_VALF,
                          std::numeric_limits<float>::quiet_NaN(),
                          float_of(0x7f800001u),
                          float_of(0xffffffffu)})
      check(rounds_right(x, dtype), name + ": rounding of " + std::to_string(x));
  }
}

void test_rules() {
  struct Types {
    DType param, gradient, state;
  };
  std::vector<Types> types;
  for (const DType dtype : kDTypes) types.push_back({dtype, dtype, dtype});
  types.push_back({DType::kFloat32, DType::kBFloat16, DType::kFloat32});
  types.push_back({DType::kFloat32, DType::kFloat64, DType::kBFloat16});
  types.push_back({DType::kBFloat16, DType::kFloat32, DType::kFloat32});
  types.push_back({DType::kFloat16, DType::kFloat16, DType::kFloat32});
  types.push_back({DType::kFloat64, DType::kFloat32, DType::kFloat64});
  types.push_back({DType::kFloat64, DType::kFloat16, DType::kFloat32});

  struct Places {
    Placement param, gradient, state;
  };
  const std::vector<Places> places = {
      {run_of(0), run_of(0), run_of(0)}, {run_of(1), run_of(3), run_of(5)},   {run_of(0), kTransposed, run_of(1)},
      {run_of(1), kSliced, kTransposed}, {kTransposed, run_of(0), run_of(0)}, {kSliced, kTransposed, kSliced},
  };

  for (const Setting& s : own_settings()) {
    for (const Types& t : types) {
      const bool is_float64 = t.param == DType::kFloat64;
      const std::string what = std::string(s.rule) + " " + s.name + ", " + format_of(t.param).name + ", gradient " +
                               format_of(t.gradient).name + ", states " + format_of(t.state).name;
      const Arrangement plain{t.param, t.gradient, t.state, run_of(0), run_of(0), run_of(0), true};
      cpu::set_variant(cpu::Variant::kBaseline);
      Parameters before = make(s, plain), expected = make(s, plain);
      run_cpu(s, expected, is_float64, 0);
      check(is_right(s, before, expected, plain, is_float64), what + ": not what the formula gives");
      for (const cpu::Variant variant : variants()) {
        cpu::set_variant(variant);
        for (const Places& p : places) {
          for (const int64_t piece : {int64_t{0}, int64_t{1}, int64_t{3}}) {
            // Guards show what is written beyond the ends; without them AddressSanitizer shows what is read.
            const bool guarded = piece != 1;
            {
              const Arrangement arrangement{t.param, t.gradient, t.state, p.param, p.gradient, p.state, guarded};
              Parameters found = make(s, arrangement);
              run_cpu(s, found, is_float64, piece);
              const std::string where = what + ", " + cpu::name_of(variant) + ", " + p.param.name + " " +
                                        p.gradient.name + " " + p.state.name + ", pieces of " + std::to_string(piece);
              check(same_bits(expected, found, true), where + ": other bits");
              check(is_intact(found), where + ": written where nothing is to be written");
              drop(found);
            }
          }
        }
        if (!s.writes_gradient()) {
          // A gradient of stride 0 is read, and never written.
          const Arrangement expanded{t.param, t.gradient, t.state, run_of(0), kExpanded, run_of(0), false};
          Parameters start = make(s, expanded), found = make(s, expanded);
          run_cpu(s, found, is_float64, 0);
          check(is_right(s, start, found, expanded, is_float64),
                what + ", " + cpu::name_of(variant) + ", expanded gradient");
          drop(start);
          drop(found);
        }
      }
      drop(before);
      drop(expected);
    }
  }
}

// A tensor's sums have the same bits for every SIMD variant and for any pieces of its work, whatever its size and the
// types of its tensors. As many parts of it add up to the same: in float32 arithmetic but for the last digits of a
// double.
void test_sums() {
  for (const Setting& s : own_settings()) {
    const cpu::Rule* rule = cpu::find_rule(s.rule);
    const std::vector<Pass> passes = passes_of(s);
    if (passes.empty()) continue;
    const Pass pass = passes.front();  // what comes after it does not change how sums are taken
    const auto count = static_cast<size_t>(rule->sums_in(pass));
    for (const DType type : kDTypes) {
      const bool is_float64 = type == DType::kFloat64;
      const Scalars scalars = scalars_of(s, is_float64);
      for (const int64_t n : {1, 31, 33, 255, 2047, 2049, 16383, 16385, 50001, 600007}) {
        const Arrangement a{type, type, type, run_of(0), run_of(0), run_of(0), false};
        Parameter whole(n, n, states_of(s), a);
        cpu::TensorTask task;
        whole.describe(&task);
        task.scalars = &scalars;
        const auto sums_of = [&](cpu::TensorTask part, int64_t from, int64_t to, int64_t piece) {
          const auto move = [&](TensorView& view) {
            if (view.data != nullptr) view.data = static_cast<char*>(view.data) + from * size_of(view.dtype);
          };
          move(part.param);
          move(part.gradient);
          for (TensorView& state : part.state) move(state);
          part.numel = to - from;
          const int64_t starts[] = {0, cpu::blocks_of(part.numel)};
          const cpu::Update update{&part, starts, 1, rule, is_float64};
          std::vector<Sum> partials(cpu::places_of(update) * count, Sum{std::nan(""), 0}), sums(count);
          for (int64_t at = 0; at < starts[1]; at += piece)
            cpu::gather_blocks(update, pass, at, std::min(at + piece, starts[1]), partials.data());
          cpu::sums_of(update, pass, 0, partials.data(), sums.data());
          return sums;
        };
        const std::string what = std::string(s.rule) + " " + s.name + ", " + format_of(type).name + ", " +
                                 std::to_string(n) + " elements: sums";
        cpu::set_variant(cpu::Variant::kBaseline);
        const std::vector<Sum> expected = sums_of(task, 0, n, 1 << 20);
        for (size_t k = 0; k < count; ++k) check(std::isfinite(value_of(expected[k])), what + ", not finite");
        for (const cpu::Variant variant : variants()) {
          cpu::set_variant(variant);
          for (const int64_t piece : {int64_t{1}, int64_t{65}, int64_t{1} << 20}) {
            const std::vector<Sum> found = sums_of(task, 0, n, piece);
            check(std::memcmp(found.data(), expected.data(), count * sizeof(Sum)) == 0,
                  what + ", " + cpu::name_of(variant) + ", pieces of " + std::to_string(piece));
          }
          // As processes do that hold a part each.
          for (const int64_t parts : {int64_t{2}, int64_t{3}, int64_t{7}}) {
            std::vector<Sum> total(count, Sum{0, 0});
            for (int64_t part = 0; part < parts; ++part) {
              const std::vector<Sum> own = sums_of(task, n * part / parts, n * (part + 1) / parts, 1 << 20);
              for (size_t k = 0; k < count; ++k) total[k] = add(total[k], own[k]);
            }
            for (size_t k = 0; k < count; ++k) {
              const double sum = value_of(expected[k]), difference = std::fabs(value_of(total[k]) - sum);
              const double least = is_float64 ? 0 : 1e-14 * (std::fabs(sum) + static_cast<double>(n));
              check(difference <= least, what + ", in " + std::to_string(parts) + " parts");
            }
          }
        }
      }
    }
  }
}

// Conversions of each SIMD variant: what the kernels load and store.
void test_conversions_in_kernels() {
  const Setting still{"still", "sgd", {0, 0, 0}, kCoupled, 0, 0, false, 0, false, 0, 1, 0};
  Setting copy = still;
  copy.lr = -1;
  for (const cpu::Variant variant : variants()) {
    cpu::set_variant(variant);
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      const std::string name = std::string(cpu::name_of(variant)) + ", " + format_of(dtype).name;
      // A step of nothing: all numbers through a load and a store, in the uniform and in the buffered path.
      for (const DType gradient_dtype : {dtype, DType::kFloat32}) {
        const Arrangement a{dtype, gradient_dtype, dtype, run_of(0), run_of(0), run_of(0), true};
        Parameter all(65536, 1, 0, a);
        for (int64_t i = 0; i < 65536; ++i) {
          const auto bits = static_cast<uint16_t>(i);
          std::memcpy(static_cast<uint16_t*>(all.param.view().data) + i, &bits, 2);
          all.gradient.set(i, 0);
        }
        run_cpu(still, {&all}, false, 0);
        int wrong = 0;
        for (int64_t i = 0; i < 65536; ++i) {
          const double value = decode16(static_cast<uint16_t>(i), dtype);
          wrong += std::isnan(value) ? !std::isnan(all.param.get(i)) : !same_value(all.param.get(i), value);
        }
        check(wrong == 0, name + ": a number changed by being loaded and stored");
      }
      // 0 + g: floats rounded to 16 bits.
      const Arrangement a{dtype, DType::kFloat32, dtype, run_of(0), run_of(0), run_of(0), true};
      const int64_t n = 3 * 65536;
      Parameter rounded(n, 1, 0, a);
      RandomNumbers numbers{2};
      for (int64_t i = 0; i < n; ++i) {
        rounded.param.set(i, 0);
        const double low = decode16(static_cast<uint16_t>(i / 3), dtype);
        const double high = decode16(static_cast<uint16_t>(i / 3 + 1), dtype);
        auto middle = static_cast<float>((low + high) / 2);
        if (i % 3 == 1) middle = std::nextafter(middle, HUGE_VALF);
        if (i % 3 == 2) middle = float_of(static_cast<uint32_t>(numbers.next()));
        rounded.gradient.set(i, static_cast<double>(middle));
      }
      run_cpu(copy, {&rounded}, false, 0);
      int wrong = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double g = rounded.gradient.get(i), found = rounded.param.get(i);
        wrong += std::isnan(g) ? !std::isnan(found) : found != round16(g, dtype);
      }
      check(wrong == 0, name + ": rounding of what is stored");
    }
  }
}

// Random numbers ------------------------------------------------------------------------------------------------------

void test_random() {
  // The known answers of Philox's authors (Random123, kat_vectors).
  const auto is = [](const RandomWords& r, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return r.word[0] == a && r.word[1] == b && r.word[2] == c && r.word[3] == d;
  };
  check(is(philox(0, 0, 0, 0, 0), 0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u), "philox of zeros");
  const uint32_t ones = 0xffffffffu;
  check(is(philox(~uint64_t{0}, ones, ones, ones, ones), 0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu),
        "philox of ones");
  check(is(philox(0x299f31d0a4093822u, 0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u), 0xd16cfe09u, 0x94fdccebu,
           0x5001e420u, 0x24126ea1u),
        "philox of pi");

  // Box and Muller's values against the library's functions, corners included.
  RandomNumbers numbers{3};
  const uint32_t corners[] = {0,           1,    2,           0x7fffffffu, 0x80000000u,
                              0xfffffffeu, ones, 0x3fffffffu, 0x40000000u, 0xc0000000u};
  bool finite = true, near = true;
  for (int i = 0; i < 200000; ++i) {
    const uint32_t a = i < 100 ? corners[i / 10] : static_cast<uint32_t>(numbers.next());
    const uint32_t b = i < 100 ? corners[i % 10] : static_cast<uint32_t>(numbers.next());
    const GaussianPair pair = gaussian_pair(a, b);
    finite = finite && std::isfinite(pair.first) && std::isfinite(pair.second);
    // Here the uniform number is next to 1 in float, and the radius next to 0.
    if (a >= 0xffffff00u) continue;
    const double radius = std::sqrt(-2 * std::log((a + 0.5) * 0x1p-32));
    // The quadrant's middle is its zero.
    const double place = std::ldexp(static_cast<double>(static_cast<int32_t>(b << 2) >> 8), -24) + (b >> 30);
    const double angle = place * std::acos(-1.0) / 2;
    // The uniform number has the 24 bits of a float, which tells where the radius is near 0.
    const double allowed = 4e-7 * (1 + radius) + 4e-8 / radius;
    near = near && std::fabs(static_cast<double>(pair.first) - radius * std::cos(angle)) <= allowed;
    near = near && std::fabs(static_cast<double>(pair.second) - radius * std::sin(angle)) <= allowed;
  }
  check(finite, "a normal value is not finite");
  check(near, "normal values are not those of the library's functions");

  // Any piece of any tensor, from each variant, the same bits; places beyond 2^32 included.
  for (const int64_t origin : {int64_t{0}, int64_t{1} << 33, (int64_t{1} << 40) + 4096}) {
    constexpr int64_t n = 3000;
    cpu::set_variant(cpu::Variant::kBaseline);
    std::vector<float> expected(n);
    cpu::gaussian(expected.data(), origin, n, {kSeed, 7, 3});
    for (const cpu::Variant variant : variants()) {
      cpu::set_variant(variant);
      for (int round = 0; round < 20; ++round) {
        std::vector<float> found(n);
        for (int64_t at = 0; at < n;) {
          const int64_t count = std::min(1 + numbers.below(round < 10 ? 20 : 700), n - at);
          cpu::gaussian(found.data() + at, origin + at, count, {kSeed, 7, 3});
          at += count;
        }
        check(std::memcmp(expected.data(), found.data(), n * sizeof(float)) == 0,
              std::string("noise in pieces, ") + cpu::name_of(variant));
      }
    }
    std::vector<float> first(n);
    cpu::gaussian(first.data(), 0, n, {kSeed, 7, 3});
    if (origin != 0) check(first != expected, "noise repeats itself after 2^33 elements");
  }
}

}  // namespace
}  // namespace trainopt

int main(int count, char** arguments) {
  using namespace trainopt;
  size_t number = 1;
  if (count > 1 && std::sscanf(arguments[1], "%zu/%zu", &number, &shares) != 2) return 2;
  share = number - 1;
  if (share >= shares) return 2;
  for (const char* name : {"sgd", "adam", "lamb", "lars"})
    check(cpu::find_rule(name) != nullptr, std::string("no rule ") + name);
  check(cpu::find_rule("nothing") == nullptr, "a rule that does not exist");
  test_rules();
  test_sums();
  if (share == 0) {
    test_conversions();
    test_conversions_in_kernels();
    test_random();
    test_two_parts();
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
