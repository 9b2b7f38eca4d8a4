// The CPU engine by itself, without torch: every rule, dtype, layout, stage and SIMD variant against a plain
// computation in double that is written here anew; conversions of 16-bit numbers; random numbers. Meant to run under
// AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`). The last line tells what passed and failed.
#include "cpu/engine.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/random.h"

namespace trainopt {
namespace {

int passed = 0, failed = 0;

void check(bool good, const std::string& what) {
  ++(good ? passed : failed);
  if (!good && failed <= 20) std::printf("FAILED: %s\n", what.c_str());
}

std::vector<cpu::Variant> variants() {
  std::vector<cpu::Variant> result;
  for (int v = 0; v < cpu::kVariants; ++v)
    if (cpu::supported(static_cast<cpu::Variant>(v))) result.push_back(static_cast<cpu::Variant>(v));
  return result;
}

// Numbers for the tests, not those under test.
struct Numbers {
  uint64_t state;
  uint64_t next() {
    state += 0x9e3779b97f4a7c15u;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  // Of either sign, sizes of 0.1 to 4, one in eleven a zero.
  double value() {
    const double size = 0.1 + 3.9 * std::pow(static_cast<double>(next() >> 11) * 0x1p-53, 2);
    const int64_t kind = below(11);
    return kind == 0 ? 0 : kind % 2 ? size : -size;
  }
};

// Storage types
// ---------------------------------------------------------------------------------------------------------

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

struct Format {
  const char* name;
  int fraction, smallest_exponent, largest_exponent;
};

Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return {"float32", 23, -126, 127};
    case DType::kFloat64: return {"float64", 52, -1022, 1023};
    case DType::kBFloat16: return {"bfloat16", 7, -126, 127};
    case DType::kFloat16: return {"float16", 10, -14, 15};
  }
  std::abort();
}

// The distance between neighbours round x.
double spacing(double x, DType dtype) {
  const Format format = format_of(dtype);
  const int exponent = x == 0 ? format.smallest_exponent : std::ilogb(x);
  return std::ldexp(1.0, std::max(exponent, format.smallest_exponent) - format.fraction);
}

// The value of a 16-bit number, by the definition of its fields.
double decode16(uint16_t bits, DType dtype) {
  const Format format = format_of(dtype);
  const int exponent_bits = 15 - format.fraction;
  const int exponent = (bits >> format.fraction) & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << format.fraction) - 1);
  const double sign = bits & 0x8000u ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(fraction, format.smallest_exponent - format.fraction);
  return sign *
         std::ldexp(fraction + (1 << format.fraction), exponent - 1 + format.smallest_exponent - format.fraction);
}

// The nearest number of a 16-bit type, ties to even, by arithmetic in double.
double round16(double x, DType dtype) {
  if (!std::isfinite(x)) return x;
  const Format format = format_of(dtype);
  const double step = spacing(x, dtype);
  const double rounded = std::nearbyint(x / step) * step;
  const double largest = (2 - std::ldexp(1.0, -format.fraction)) * std::ldexp(1.0, format.largest_exponent);
  return std::fabs(rounded) > largest ? std::copysign(HUGE_VAL, x) : rounded;
}

bool same_value(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

uint16_t convert(float x, DType dtype) { return dtype == DType::kBFloat16 ? to_bfloat16(x).bits : to_float16(x).bits; }

float convert(uint16_t bits, DType dtype) {
  return dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
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

    Numbers numbers{1};
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

// Arrays in memory
// -------------------------------------------------------------------------------------------------------

// How an array of n elements lies: as one run, or as rows of `columns` with strides.
struct Placement {
  const char* name;
  bool strided;
  int64_t columns;                   // of the rows that the engine walks; n is a multiple
  std::function<void(Layout&)> lay;  // sets the strides for sizes {rows, columns}
  int64_t shift;                     // elements before the first, so that it is not aligned
};

constexpr unsigned char kGuard = 0xa5;

// The elements of one tensor in memory that is guarded on either side and in between.
class Array {
 public:
  Array(DType dtype, int64_t numel, const Placement& placement, bool guarded) : dtype_(dtype), numel_(numel) {
    int64_t extent = numel;
    if (placement.strided) {
      layout_ = {2, {numel / placement.columns, placement.columns}, {}};
      placement.lay(layout_);
      extent = 1;
      for (int d = 0; d < 2; ++d) extent += (layout_.sizes[d] - 1) * layout_.strides[d];
    }
    strided_ = placement.strided;
    const int64_t width = size_of(dtype);
    begin_ = ((guarded ? 32 : 0) + placement.shift) * width;
    size_ = begin_ + (extent + (guarded ? 32 : 0)) * width;
    // Not a vector: the last element ends where the memory does, for AddressSanitizer to see.
    memory_ = static_cast<unsigned char*>(std::malloc(static_cast<size_t>(size_)));
    std::memset(memory_, kGuard, static_cast<size_t>(size_));
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(memory_); }

  TensorView view() const {
    TensorView result{};
    result.data = memory_ + begin_;
    result.dtype = dtype_;
    result.layout = strided_ ? &layout_ : nullptr;
    return result;
  }

  double get(int64_t i) const {
    const unsigned char* at = place(i);
    if (dtype_ == DType::kFloat64) return read<double>(at);
    if (dtype_ == DType::kFloat32) return static_cast<double>(read<float>(at));
    return decode16(read<uint16_t>(at), dtype_);
  }

  void set(int64_t i, double value) {
    unsigned char* at = place(i);
    if (dtype_ == DType::kFloat64) return write(at, value);
    if (dtype_ == DType::kFloat32) return write(at, static_cast<float>(value));
    write(at, convert(static_cast<float>(round16(value, dtype_)), dtype_));
  }

  uint64_t bits(int64_t i) const {
    uint64_t result = 0;
    std::memcpy(&result, place(i), static_cast<size_t>(size_of(dtype_)));
    return result;
  }

  // Whether all memory that belongs to no element is as it was.
  bool is_intact() const {
    std::vector<bool> owned(static_cast<size_t>(size_));
    for (int64_t i = 0; i < numel_; ++i)
      for (int64_t b = 0; b < size_of(dtype_); ++b) owned[static_cast<size_t>(place(i) - memory_ + b)] = true;
    for (int64_t b = 0; b < size_; ++b)
      if (!owned[static_cast<size_t>(b)] && memory_[b] != kGuard) return false;
    return true;
  }

 private:
  DType dtype_;
  int64_t numel_, begin_, size_;
  Layout layout_{};
  bool strided_;
  unsigned char* memory_;

  unsigned char* place(int64_t i) const {
    const int64_t offset =
        strided_ ? i / layout_.sizes[1] * layout_.strides[0] + i % layout_.sizes[1] * layout_.strides[1] : i;
    return memory_ + begin_ + offset * size_of(dtype_);
  }
  template <class T>
  static T read(const unsigned char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  template <class T>
  static void write(unsigned char* at, T value) {
    std::memcpy(at, &value, sizeof value);
  }
};

Placement run_of(int64_t shift) {
  return {"run", false, 1, [](Layout&) {}, shift};
}
const Placement kTransposed{"transposed", true, 3, [](Layout& l) { l.strides[0] = 1, l.strides[1] = l.sizes[0]; }, 1};
const Placement kSliced{"sliced", true, 3, [](Layout& l) { l.strides[0] = 7, l.strides[1] = 2; }, 3};
const Placement kExpanded{"expanded", true, 3, [](Layout& l) { l.strides[0] = 0, l.strides[1] = 1; }, 1};

// Rules
// -------------------------------------------------------------------------------------------------------------------

struct Setting {
  const char* name;
  const char* rule;
  std::vector<double> options;  // in the rule's order
  bool coupled_decay;
  double lr, weight_decay;
  bool maximize;
  double l1;
  bool l1_proximal;
  double noise, gradient_scale;
  double step;
};

// The options' order: SGD momentum, dampening, nesterov; Adam beta1, beta2, eps, amsgrad, decoupled, bias correction.
const std::vector<Setting> kSettings = {
    {"plain", "sgd", {0, 0, 0}, true, 0.1, 0, false, 0, false, 0, 1, 0},
    {"decay", "sgd", {0, 0, 0}, true, 0.1, 0.3, true, 0, false, 0, 1, 0},
    {"momentum", "sgd", {0.9, 0.2, 0}, true, 0.1, 0.3, false, 0, false, 0, 1, 0},
    {"first", "sgd", {0.9, 0.2, 0}, true, 0.1, 0.3, false, 0, false, 0, 1, 1},
    {"nesterov", "sgd", {0.9, 0, 1}, true, 0.1, 0.3, false, 0.2, false, 0.1, 3, 2},
    {"proximal", "sgd", {0.9, 0, 1}, true, 0.1, 0.3, true, 3, true, 0, 1, 5},
    {"l1, maximize", "sgd", {0.9, 0.2, 0}, true, 0.1, 0.3, true, 0.5, false, 0, 1, 2},
    {"plain", "adam", {0.9, 0.99, 0.05, 0, 0, 1}, true, 0.05, 0, false, 0, false, 0, 1, 3},
    {"beta1 0.4", "adam", {0.4, 0.9, 0.05, 0, 0, 1}, true, 0.05, 0.3, true, 0, false, 0, 1, 1},
    {"beta1 0", "adam", {0, 0.9, 0.05, 0, 0, 1}, true, 0.05, 0.3, false, 0, false, 0, 1, 2},
    {"decoupled", "adam", {0.9, 0.99, 0.05, 0, 1, 1}, false, 0.05, 0.3, false, 0, false, 0, 1, 7},
    {"amsgrad", "adam", {0.9, 0.5, 0.05, 1, 1, 1}, false, 0.05, 0.3, true, 0, false, 0, 1, 4},
    {"uncorrected", "adam", {0.9, 0.99, 0.05, 0, 0, 0}, true, 0.05, 0.3, false, 0.5, false, 0, 1, 4},
    {"everything", "adam", {0.8, 0.7, 0.05, 1, 1, 1}, false, 0.05, 0.3, true, 2, true, 0.1, 3, 4},
};

double sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }

// One element by the formulas, in double.
void reference(const Setting& s, double& p, double& g, double* state, double noise) {
  g /= s.gradient_scale;
  double slope = s.maximize ? -g : g;
  if (s.coupled_decay) slope += s.weight_decay * p;
  if (!s.l1_proximal) slope += s.l1 * sign(p);
  if (!s.coupled_decay) p *= 1 - s.lr * s.weight_decay;
  const std::vector<double>& o = s.options;
  if (std::strcmp(s.rule, "sgd") == 0) {
    if (o[0] != 0) {
      state[0] = s.step == 1 ? slope : o[0] * state[0] + (1 - o[1]) * slope;
      slope = o[2] != 0 ? slope + o[0] * state[0] : state[0];
    }
    p -= s.lr * slope;
  } else {
    state[0] = o[0] * state[0] + (1 - o[0]) * slope;
    state[1] = o[1] * state[1] + (1 - o[1]) * slope * slope;
    double v = state[1];
    if (o[3] != 0) v = state[2] = std::max(state[2], v);
    const double correction1 = o[5] != 0 ? 1 - std::pow(o[0], s.step) : 1;
    const double correction2 = o[5] != 0 ? 1 - std::pow(o[1], s.step) : 1;
    p -= s.lr / correction1 * state[0] / (std::sqrt(v) / std::sqrt(correction2) + o[2]);
  }
  if (s.l1_proximal) p = sign(p) * std::max(std::fabs(p) - s.lr * s.l1, 0.0);
  p += s.noise * noise;
}

constexpr uint64_t kSeed = 0x123456789abcdefu;

Scalars scalars_of(const Setting& s, bool wide) {
  const cpu::Rule* rule = cpu::find_rule(s.rule);
  const Moment now{s.lr, false, s.step, s.step == 1};
  const Decay decay = s.coupled_decay ? Decay::kGradient : Decay::kParameter;
  Settings settings;
  settings.lr = s.lr;
  settings.weight_decay = s.weight_decay;
  settings.l1 = s.l1;
  settings.noise = s.noise;
  settings.maximize = s.maximize;
  settings.l1_proximal = s.l1_proximal;
  settings.seed = kSeed;
  Scalars result;
  if (wide) {
    result.stages64 = prepare_stages<double>(settings, now, decay, s.gradient_scale);
  } else {
    result.stages32 = prepare_stages<float>(settings, now, decay, s.gradient_scale);
  }
  rule->prepare(s.options.data(), now, wide, &result);
  return result;
}

// The places and types of one parameter's tensors.
struct Arrangement {
  DType param_dtype, gradient_dtype, state_dtype;
  Placement param, gradient, state;
  bool guarded;
};

// Tensors of one parameter, with the same values for the same number.
struct Parameter {
  Array param, gradient;
  std::vector<Array*> states;
  int64_t numel;

  Parameter(int64_t n, int64_t number, int state_count, const Arrangement& a)
      : param(a.param_dtype, n, a.param, a.guarded), gradient(a.gradient_dtype, n, a.gradient, a.guarded), numel(n) {
    for (int s = 0; s < state_count; ++s) states.push_back(new Array(a.state_dtype, n, a.state, a.guarded));
    Numbers numbers{static_cast<uint64_t>(number)};
    const bool expanded = std::strcmp(a.gradient.name, "expanded") == 0;
    for (int64_t i = 0; i < n; ++i) {
      param.set(i, numbers.value());
      const double g = numbers.value();
      if (!expanded || i < a.gradient.columns) gradient.set(i, g);
      for (size_t s = 0; s < states.size(); ++s) {
        const double value = numbers.value();
        states[s]->set(i, s == 0 ? value : std::fabs(value));
      }
    }
  }
  Parameter(const Parameter&) = delete;
  Parameter& operator=(const Parameter&) = delete;
  ~Parameter() {
    for (Array* state : states) delete state;
  }

  bool is_intact() const {
    bool intact = param.is_intact() && gradient.is_intact();
    for (const Array* state : states) intact = intact && state->is_intact();
    return intact;
  }
};

int states_of(const Setting& s) {
  return std::strcmp(s.rule, "sgd") == 0 ? s.options[0] != 0 : s.options[3] != 0 ? 3 : 2;
}

using Parameters = std::vector<Parameter*>;

// Runs the engine over these parameters; their blocks in pieces of `piece` (all at once if 0), the last first.
void run_engine(const Setting& s, const Parameters& parameters, bool wide, int64_t piece) {
  const cpu::Rule* rule = cpu::find_rule(s.rule);
  const Scalars scalars = scalars_of(s, wide);
  std::vector<cpu::Task> tasks;
  std::vector<int64_t> starts{0};
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Parameter& from = *parameters[i];
    cpu::Task task;
    task.numel = from.numel;
    task.param = from.param.view();
    task.gradient = from.gradient.view();
    for (TensorView& state : task.state) state = TensorView{};
    for (size_t k = 0; k < from.states.size(); ++k) task.state[k] = from.states[k]->view();
    task.scalars = &scalars;
    task.tensor = static_cast<uint32_t>(i);
    task.step = static_cast<uint32_t>(s.step);
    tasks.push_back(task);
    starts.push_back(starts.back() + cpu::blocks_of(from.numel));
  }
  const cpu::Run run{tasks.data(), starts.data(), tasks.size(), rule, wide};
  const int64_t all = starts.back();
  if (piece == 0) return cpu::run_blocks(run, 0, all);
  for (int64_t at = (all - 1) / piece * piece; at >= 0; at -= piece)
    cpu::run_blocks(run, at, std::min(at + piece, all));
}

// 3 divides all, so that each is so many rows of three.
constexpr int64_t kSizes[] = {3, 6, 9, 15, 18, 33, 255, 258, 510, 513, 1029};

Parameters make(const Setting& s, const Arrangement& arrangement) {
  Parameters result;
  for (const int64_t size : kSizes) result.push_back(new Parameter(size, size, states_of(s), arrangement));
  return result;
}

void drop(Parameters& parameters) {
  for (Parameter* parameter : parameters) delete parameter;
}

bool same_bits(const Parameters& a, const Parameters& b, bool with_gradient) {
  for (size_t t = 0; t < a.size(); ++t)
    for (int64_t i = 0; i < a[t]->numel; ++i) {
      if (a[t]->param.bits(i) != b[t]->param.bits(i)) return false;
      if (with_gradient && a[t]->gradient.bits(i) != b[t]->gradient.bits(i)) return false;
      for (size_t s = 0; s < a[t]->states.size(); ++s)
        if (a[t]->states[s]->bits(i) != b[t]->states[s]->bits(i)) return false;
    }
  return true;
}

// Whether `found` is `exact` rounded once, but for the arithmetic's own error.
bool is_close(double found, double exact, DType dtype, bool wide, double scale) {
  const double arithmetic = (wide ? 0x1p-52 : 0x1p-23) * 16 * (scale + std::fabs(exact));
  return std::fabs(found - exact) <= 0.5 * spacing(exact, dtype) + arithmetic;
}

bool is_right(const Setting& s, const Parameters& before, const Parameters& after, const Arrangement& a, bool wide) {
  for (size_t t = 0; t < after.size(); ++t) {
    std::vector<float> noise(static_cast<size_t>(after[t]->numel));
    cpu::gaussian(noise.data(), 0, after[t]->numel, kSeed, static_cast<uint32_t>(s.step), static_cast<uint32_t>(t));
    for (int64_t i = 0; i < after[t]->numel; ++i) {
      double p = before[t]->param.get(i), g = before[t]->gradient.get(i), state[3] = {};
      for (size_t k = 0; k < after[t]->states.size(); ++k) state[k] = before[t]->states[k]->get(i);
      const double scale = 1 + std::fabs(p) + g * g;
      if (!wide) g = static_cast<double>(static_cast<float>(g));
      reference(s, p, g, state, static_cast<double>(noise[static_cast<size_t>(i)]));
      if (!is_close(after[t]->param.get(i), p, a.param_dtype, wide, scale)) return false;
      if (s.gradient_scale != 1 && !is_close(after[t]->gradient.get(i), g, a.gradient_dtype, wide, scale)) return false;
      for (size_t k = 0; k < after[t]->states.size(); ++k)
        if (!is_close(after[t]->states[k]->get(i), state[k], a.state_dtype, wide, scale * scale)) return false;
    }
  }
  return true;
}

bool is_intact(const Parameters& parameters) {
  for (const Parameter* parameter : parameters)
    if (!parameter->is_intact()) return false;
  return true;
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

  for (const Setting& s : kSettings) {
    for (const Types& t : types) {
      const bool wide = t.param == DType::kFloat64;
      const std::string what = std::string(s.rule) + " " + s.name + ", " + format_of(t.param).name + ", gradient " +
                               format_of(t.gradient).name + ", states " + format_of(t.state).name;
      const Arrangement plain{t.param, t.gradient, t.state, run_of(0), run_of(0), run_of(0), true};
      cpu::set_variant(cpu::Variant::kBaseline);
      Parameters before = make(s, plain), expected = make(s, plain);
      run_engine(s, expected, wide, 0);
      check(is_right(s, before, expected, plain, wide), what + ": not what the formula gives");
      for (const cpu::Variant variant : variants()) {
        cpu::set_variant(variant);
        for (const Places& p : places) {
          for (const int64_t piece : {int64_t{0}, int64_t{1}, int64_t{3}}) {
            // Guards show what is written beyond the ends; without them AddressSanitizer shows what is read.
            const bool guarded = piece != 1;
            {
              const Arrangement arrangement{t.param, t.gradient, t.state, p.param, p.gradient, p.state, guarded};
              Parameters found = make(s, arrangement);
              run_engine(s, found, wide, piece);
              const std::string where = what + ", " + cpu::name_of(variant) + ", " + p.param.name + " " +
                                        p.gradient.name + " " + p.state.name + ", pieces of " + std::to_string(piece);
              check(same_bits(expected, found, true), where + ": other bits");
              check(is_intact(found), where + ": written where nothing is to be written");
              drop(found);
            }
          }
        }
        if (s.gradient_scale == 1) {
          // A gradient of stride 0 is read, and never written.
          const Arrangement expanded{t.param, t.gradient, t.state, run_of(0), kExpanded, run_of(0), false};
          Parameters start = make(s, expanded), found = make(s, expanded);
          run_engine(s, found, wide, 0);
          check(is_right(s, start, found, expanded, wide), what + ", " + cpu::name_of(variant) + ", expanded gradient");
          drop(start);
          drop(found);
        }
      }
      drop(before);
      drop(expected);
    }
  }
}

// Conversions of each SIMD variant: what the kernels load and store.
void test_conversions_in_kernels() {
  const Setting still{"still", "sgd", {0, 0, 0}, true, 0, 0, false, 0, false, 0, 1, 0};
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
        run_engine(still, {&all}, false, 0);
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
      Numbers numbers{2};
      for (int64_t i = 0; i < n; ++i) {
        rounded.param.set(i, 0);
        const double low = decode16(static_cast<uint16_t>(i / 3), dtype);
        const double high = decode16(static_cast<uint16_t>(i / 3 + 1), dtype);
        auto middle = static_cast<float>((low + high) / 2);
        if (i % 3 == 1) middle = std::nextafter(middle, HUGE_VALF);
        if (i % 3 == 2) middle = float_of(static_cast<uint32_t>(numbers.next()));
        rounded.gradient.set(i, static_cast<double>(middle));
      }
      run_engine(copy, {&rounded}, false, 0);
      int wrong = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double g = rounded.gradient.get(i), found = rounded.param.get(i);
        wrong += std::isnan(g) ? !std::isnan(found) : found != round16(g, dtype);
      }
      check(wrong == 0, name + ": rounding of what is stored");
    }
  }
}

// Random numbers
// ----------------------------------------------------------------------------------------------------------

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
  Numbers numbers{3};
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
    cpu::gaussian(expected.data(), origin, n, kSeed, 7, 3);
    for (const cpu::Variant variant : variants()) {
      cpu::set_variant(variant);
      for (int round = 0; round < 20; ++round) {
        std::vector<float> found(n);
        for (int64_t at = 0; at < n;) {
          const int64_t count = std::min(1 + numbers.below(round < 10 ? 20 : 700), n - at);
          cpu::gaussian(found.data() + at, origin + at, count, kSeed, 7, 3);
          at += count;
        }
        check(std::memcmp(expected.data(), found.data(), n * sizeof(float)) == 0,
              std::string("noise in pieces, ") + cpu::name_of(variant));
      }
    }
    std::vector<float> first(n);
    cpu::gaussian(first.data(), 0, n, kSeed, 7, 3);
    if (origin != 0) check(first != expected, "noise repeats itself after 2^33 elements");
  }
}

}  // namespace
}  // namespace trainopt

int main() {
  using namespace trainopt;
  for (const char* name : {"sgd", "adam"}) check(cpu::find_rule(name) != nullptr, std::string("no rule ") + name);
  check(cpu::find_rule("nothing") == nullptr, "a rule that does not exist");
  test_conversions();
  test_conversions_in_kernels();
  test_random();
  test_rules();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
