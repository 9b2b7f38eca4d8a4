// What the tests of the engines share: arrays in guarded memory with any layout, the rules' formulas written anew in
// double, and the settings under which every engine is compared with them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "cpu/engine.h"

namespace trainopt {

inline int passed = 0, failed = 0;

inline void check(bool good, const std::string& what) {
  ++(good ? passed : failed);
  if (!good && failed <= 20) std::printf("FAILED: %s\n", what.c_str());
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

inline Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return {"float32", 23, -126, 127};
    case DType::kFloat64: return {"float64", 52, -1022, 1023};
    case DType::kBFloat16: return {"bfloat16", 7, -126, 127};
    case DType::kFloat16: return {"float16", 10, -14, 15};
  }
  std::abort();
}

// The distance between neighbours round x.
inline double spacing(double x, DType dtype) {
  const Format format = format_of(dtype);
  const int exponent = x == 0 ? format.smallest_exponent : std::ilogb(x);
  return std::ldexp(1.0, std::max(exponent, format.smallest_exponent) - format.fraction);
}

// The value of a 16-bit number, by the definition of its fields.
inline double decode16(uint16_t bits, DType dtype) {
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
inline double round16(double x, DType dtype) {
  if (!std::isfinite(x)) return x;
  const Format format = format_of(dtype);
  const double step = spacing(x, dtype);
  const double rounded = std::nearbyint(x / step) * step;
  const double largest = (2 - std::ldexp(1.0, -format.fraction)) * std::ldexp(1.0, format.largest_exponent);
  return std::fabs(rounded) > largest ? std::copysign(HUGE_VAL, x) : rounded;
}

inline bool same_value(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

inline uint16_t convert(float x, DType dtype) {
  return dtype == DType::kBFloat16 ? to_bfloat16(x).bits : to_float16(x).bits;
}

inline float convert(uint16_t bits, DType dtype) {
  return dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
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

inline Placement run_of(int64_t shift) {
  return {"run", false, 1, [](Layout&) {}, shift};
}
inline const Placement kTransposed{"transposed", true, 3,
                                   [](Layout& l) { l.strides[0] = 1, l.strides[1] = l.sizes[0]; }, 1};
inline const Placement kSliced{"sliced", true, 3, [](Layout& l) { l.strides[0] = 7, l.strides[1] = 2; }, 3};
inline const Placement kExpanded{"expanded", true, 3, [](Layout& l) { l.strides[0] = 0, l.strides[1] = 1; }, 1};

// Rules
// -------------------------------------------------------------------------------------------------------------------

struct Setting {
  const char* name;
  const char* rule;
  std::vector<double> options;  // in the rule's order
  Decay decay;
  double lr, weight_decay;
  bool maximize;
  double l1;
  bool l1_proximal;
  double noise, gradient_scale;
  double step;
};

// The options' order: SGD momentum, dampening, nesterov; Adam beta1, beta2, eps, amsgrad, decoupled, bias correction;
// LAMB beta1, beta2, eps, trust_clip, always_adapt, bias correction; LARS SGD's, trust_coeff, eps, trust_clip,
// always_adapt;
// eight and four, the rules in contract/rules/rules.h, set and decay, or decay.
constexpr Decay kCoupled = Decay::kGradient, kDecoupled = Decay::kParameter, kInUpdate = Decay::kUpdate;
inline const std::vector<Setting> kSettings = {
    {"plain", "sgd", {0, 0, 0}, kCoupled, 0.1, 0, false, 0, false, 0, 1, 0},
    {"decay", "sgd", {0, 0, 0}, kCoupled, 0.1, 0.3, true, 0, false, 0, 1, 0},
    {"momentum", "sgd", {0.9, 0.2, 0}, kCoupled, 0.1, 0.3, false, 0, false, 0, 1, 0},
    {"first", "sgd", {0.9, 0.2, 0}, kCoupled, 0.1, 0.3, false, 0, false, 0, 1, 1},
    {"nesterov", "sgd", {0.9, 0, 1}, kCoupled, 0.1, 0.3, false, 0.2, false, 0.1, 3, 2},
    {"proximal", "sgd", {0.9, 0, 1}, kCoupled, 0.1, 0.3, true, 3, true, 0, 1, 5},
    {"l1, maximize", "sgd", {0.9, 0.2, 0}, kCoupled, 0.1, 0.3, true, 0.5, false, 0, 1, 2},
    {"plain", "adam", {0.9, 0.99, 0.05, 0, 0, 1}, kCoupled, 0.05, 0, false, 0, false, 0, 1, 3},
    {"beta1 0.4", "adam", {0.4, 0.9, 0.05, 0, 0, 1}, kCoupled, 0.05, 0.3, true, 0, false, 0, 1, 1},
    {"beta1 0", "adam", {0, 0.9, 0.05, 0, 0, 1}, kCoupled, 0.05, 0.3, false, 0, false, 0, 1, 2},
    {"decoupled", "adam", {0.9, 0.99, 0.05, 0, 1, 1}, kDecoupled, 0.05, 0.3, false, 0, false, 0, 1, 7},
    {"amsgrad", "adam", {0.9, 0.5, 0.05, 1, 1, 1}, kDecoupled, 0.05, 0.3, true, 0, false, 0, 1, 4},
    {"uncorrected", "adam", {0.9, 0.99, 0.05, 0, 0, 0}, kCoupled, 0.05, 0.3, false, 0.5, false, 0, 1, 4},
    {"everything", "adam", {0.8, 0.7, 0.05, 1, 1, 1}, kDecoupled, 0.05, 0.3, true, 2, true, 0.1, 3, 4},
    {"no state", "eight", {0, 0}, kCoupled, 0.05, 0.3, false, 0, false, 0, 1, 1},
    {"two ends", "eight", {1, 1}, kDecoupled, 0.05, 0.3, true, 0, false, 0, 1, 2},
    {"four apart", "eight", {2, 2}, kInUpdate, 0.05, 0.3, false, 0.5, false, 0.1, 3, 3},
    {"all", "eight", {3, 2}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 4},
    {"plain", "lamb", {0.9, 0.99, 0.05, 0, 0, 1}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 3},
    {"clipped", "lamb", {0.4, 0.9, 0.05, 1, 0, 0}, kInUpdate, 0.05, 0.3, true, 0.5, false, 0, 1, 2},
    {"without decay", "lamb", {0.9, 0.99, 0.05, 0, 0, 1}, kInUpdate, 0.05, 0, false, 0, false, 0, 1, 1},
    {"everything", "lamb", {0.8, 0.7, 0.05, 0, 1, 1}, kInUpdate, 0.05, 0, true, 2, true, 0.1, 3, 4},
    {"plain", "lars", {0, 0, 0, 0.1, 0.01, 0, 0}, kInUpdate, 0.5, 0.3, false, 0, false, 0, 1, 0},
    {"first", "lars", {0.9, 0.2, 0, 0.1, 0.01, 1, 0}, kInUpdate, 0.05, 0.3, false, 0, false, 0, 1, 1},
    {"everything", "lars", {0.9, 0, 1, 0.1, 0.01, 0, 1}, kInUpdate, 0.5, 0.3, true, 2, true, 0.1, 3, 4},
    {"sums of all kinds", "four", {0}, kCoupled, 0.05, 0.3, true, 0.5, false, 0.1, 3, 4},
    {"decoupled", "four", {1}, kDecoupled, 0.05, 0.3, false, 0, false, 0, 1, 1},
};

// What a tensor's elements add up to: for LAMB and LARS squares of the parameter, and of LAMB's update or LARS's
// gradient; for the rule of the tests what that says.
struct Sums {
  double of[kMaxSums] = {};

  double root(int i) const { return std::sqrt(of[i]); }
  double ratio_to(double by) const { return of[0] != 0 && of[1] != 0 ? root(0) / by : 1; }
};

inline double sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }

// LAMB's update before its scaling; moves the moments on.
inline double lamb_update(const Setting& s, double p, double direction, double* state) {
  const std::vector<double>& o = s.options;
  state[0] = o[0] * state[0] + (1 - o[0]) * direction;
  state[1] = o[1] * state[1] + (1 - o[1]) * direction * direction;
  const double correction1 = o[5] != 0 ? 1 - std::pow(o[0], s.step) : 1;
  const double correction2 = o[5] != 0 ? 1 - std::pow(o[1], s.step) : 1;
  return state[0] / correction1 / (std::sqrt(state[1] / correction2) + o[2]) + s.weight_decay * p;
}

// One element by the formulas, in double, of a tensor with these sums. With `gathered` it is added to them, and that is
// all.
inline void reference(const Setting& s, double& p, double& g, double* state, double noise, const Sums& sums = {},
                      Sums* gathered = nullptr) {
  g /= s.gradient_scale;
  double direction = s.maximize ? -g : g;
  if (s.decay == kCoupled) direction += s.weight_decay * p;
  if (!s.l1_proximal) direction += s.l1 * sign(p);
  if (s.decay == kDecoupled) p *= 1 - s.lr * s.weight_decay;
  const std::vector<double>& o = s.options;
  const bool is_lamb = std::strcmp(s.rule, "lamb") == 0, is_lars = std::strcmp(s.rule, "lars") == 0;
  const bool is_four = std::strcmp(s.rule, "four") == 0;
  if (gathered != nullptr) {
    if (is_lamb || is_lars) {
      const double other = is_lamb ? lamb_update(s, p, direction, state) : direction;
      gathered->of[0] += p * p;
      gathered->of[1] += other * other;
    } else if (is_four) {
      gathered->of[0] += p;
      gathered->of[1] += p * direction;
      gathered->of[2] += (state[0] / 2 + direction) * direction;
      gathered->of[3] += 1;
    }
    return;
  }
  if (is_four) {
    state[0] = state[0] / 2 + direction;
    p -= s.lr * (state[0] + (sums.of[0] + sums.of[1] - sums.of[2]) / sums.of[3]);
  }
  if (is_lars) {
    double ratio = 1;
    if (s.weight_decay != 0 || o[6] != 0) {
      ratio = sums.ratio_to((sums.root(1) + s.weight_decay * sums.root(0) + o[4]) / o[3]);
      if (o[5] != 0) ratio = std::min(ratio / s.lr, 1.0);
    }
    direction = ratio * (direction + s.weight_decay * p);
  }
  if (is_four) {
  } else if (is_lamb) {
    double ratio = s.weight_decay != 0 || o[4] != 0 ? sums.ratio_to(sums.root(1)) : 1;
    if (o[3] != 0) ratio = std::min(ratio, 1.0);
    p -= s.lr * ratio * lamb_update(s, p, direction, state);
  } else if (std::strcmp(s.rule, "sgd") == 0 || is_lars) {
    if (o[0] != 0) {
      state[0] = s.step == 1 ? direction : o[0] * state[0] + (1 - o[1]) * direction;
      direction = o[2] != 0 ? direction + o[0] * state[0] : state[0];
    }
    p -= s.lr * direction;
  } else if (std::strcmp(s.rule, "eight") == 0) {
    double sum = s.decay == kInUpdate ? s.weight_decay * p : 0;
    for (int i = 0; i < 8; ++i) sum += state[i] = state[i] / 2 + std::ldexp(direction, -i);
    p -= s.lr * sum;
  } else {
    state[0] = o[0] * state[0] + (1 - o[0]) * direction;
    state[1] = o[1] * state[1] + (1 - o[1]) * direction * direction;
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

inline Settings settings_of(const Setting& s) {
  Settings settings;
  settings.lr = s.lr;
  settings.weight_decay = s.weight_decay;
  settings.l1 = s.l1;
  settings.noise = s.noise;
  settings.maximize = s.maximize;
  settings.l1_proximal = s.l1_proximal;
  settings.seed = kSeed;
  return settings;
}

inline Scalars scalars_of(const Setting& s, bool is_float64) {
  const cpu::Rule* rule = cpu::find_rule(s.rule);
  const StepInfo info{s.lr, false, s.weight_decay, s.step, s.step == 1};
  const Decay decay = rule->decay(s.options.data());
  const Settings settings = settings_of(s);
  Scalars result;
  if (is_float64) {
    result.stages64 = prepare_stages<double>(settings, info, decay, s.gradient_scale, 0);
  } else {
    result.stages32 = prepare_stages<float>(settings, info, decay, s.gradient_scale, 0);
  }
  rule->prepare(s.options.data(), info, is_float64, &result);
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
  Array* states[kMaxStates];  // null for those that are not there
  int64_t numel;

  Parameter(int64_t n, int64_t number, StateSet set, const Arrangement& a)
      : param(a.param_dtype, n, a.param, a.guarded), gradient(a.gradient_dtype, n, a.gradient, a.guarded), numel(n) {
    for (int s = 0; s < kMaxStates; ++s)
      states[s] = contains(set, s) ? new Array(a.state_dtype, n, a.state, a.guarded) : nullptr;
    Numbers numbers{static_cast<uint64_t>(number)};
    const bool expanded = std::strcmp(a.gradient.name, "expanded") == 0;
    for (int64_t i = 0; i < n; ++i) {
      param.set(i, numbers.value());
      const double g = numbers.value();
      if (!expanded || i < a.gradient.columns) gradient.set(i, g);
      for (Array* state : states) {
        if (state == nullptr) continue;
        const double value = numbers.value();
        state->set(i, state == states[0] ? value : std::fabs(value));
      }
    }
  }
  Parameter(const Parameter&) = delete;
  Parameter& operator=(const Parameter&) = delete;
  ~Parameter() {
    for (Array* state : states) delete state;
  }

  // What every engine's task has of it.
  template <class TensorTask>
  void describe(TensorTask* task) const {
    task->numel = numel;
    task->param = param.view();
    task->gradient = gradient.view();
    for (int s = 0; s < kMaxStates; ++s) task->state[s] = states[s] == nullptr ? TensorView{} : states[s]->view();
  }

  bool is_intact() const {
    bool intact = param.is_intact() && gradient.is_intact();
    for (const Array* state : states) intact = intact && (state == nullptr || state->is_intact());
    return intact;
  }
};

inline StateSet states_of(const Setting& s) { return cpu::find_rule(s.rule)->states_needed(s.options.data()); }

using Parameters = std::vector<Parameter*>;

// Runs the engine over these parameters; their blocks in pieces of `piece` (all at once if 0), the last first.
inline void run_cpu(const Setting& s, const Parameters& parameters, bool is_float64, int64_t piece) {
  const cpu::Rule* rule = cpu::find_rule(s.rule);
  const Scalars scalars = scalars_of(s, is_float64);
  std::vector<cpu::TensorTask> tasks;
  std::vector<int64_t> starts{0};
  for (size_t i = 0; i < parameters.size(); ++i) {
    cpu::TensorTask task;
    parameters[i]->describe(&task);
    task.scalars = &scalars;
    task.tensor = static_cast<uint32_t>(i);
    tasks.push_back(task);
    starts.push_back(starts.back() + cpu::blocks_of(task.numel));
  }
  cpu::Update run{tasks.data(), starts.data(), tasks.size(), rule, is_float64};
  const int64_t all = starts.back();
  std::vector<Sum> sums(tasks.size() * static_cast<size_t>(rule->sum_count));
  if (rule->sum_count > 0) {
    std::vector<Sum> partials(cpu::partial_sums(run), Sum{std::nan(""), 0});
    for (int64_t at = 0; at < all; at += piece == 0 ? all : piece)
      cpu::gather_blocks(run, at, piece == 0 ? all : std::min(at + piece, all), partials.data());
    for (size_t t = 0; t < tasks.size(); ++t)
      cpu::sums_of(run, t, partials.data(), &sums[t * static_cast<size_t>(rule->sum_count)]);
    run.sums = sums.data();
  }
  if (piece == 0) return cpu::run_blocks(run, 0, all);
  for (int64_t at = (all - 1) / piece * piece; at >= 0; at -= piece)
    cpu::run_blocks(run, at, std::min(at + piece, all));
}

// 3 divides all, so that each is so many rows of three.
constexpr int64_t kSizes[] = {3, 6, 9, 15, 18, 33, 255, 258, 510, 513, 1029};

inline Parameters make(const Setting& s, const Arrangement& arrangement) {
  Parameters result;
  for (const int64_t size : kSizes) result.push_back(new Parameter(size, size, states_of(s), arrangement));
  return result;
}

inline void drop(Parameters& parameters) {
  for (Parameter* parameter : parameters) delete parameter;
}

inline bool same_bits(const Parameters& a, const Parameters& b, bool with_gradient) {
  for (size_t t = 0; t < a.size(); ++t)
    for (int64_t i = 0; i < a[t]->numel; ++i) {
      if (a[t]->param.bits(i) != b[t]->param.bits(i)) return false;
      if (with_gradient && a[t]->gradient.bits(i) != b[t]->gradient.bits(i)) return false;
      for (int s = 0; s < kMaxStates; ++s)
        if (a[t]->states[s] != nullptr && a[t]->states[s]->bits(i) != b[t]->states[s]->bits(i)) return false;
    }
  return true;
}

// Whether `found` is `exact` rounded once, but for the arithmetic's own error.
inline bool is_close(double found, double exact, DType dtype, bool is_float64, double scale) {
  const double arithmetic = (is_float64 ? 0x1p-52 : 0x1p-23) * 16 * (scale + std::fabs(exact));
  return std::fabs(found - exact) <= 0.5 * spacing(exact, dtype) + arithmetic;
}

inline bool is_right(const Setting& s, const Parameters& before, const Parameters& after, const Arrangement& a,
                     bool is_float64) {
  for (size_t t = 0; t < after.size(); ++t) {
    std::vector<float> noise(static_cast<size_t>(after[t]->numel));
    cpu::gaussian(noise.data(), 0, after[t]->numel, kSeed, static_cast<uint32_t>(s.step), static_cast<uint32_t>(t));
    double p, g, state[kMaxStates];
    const auto read = [&](int64_t i) {
      p = before[t]->param.get(i), g = before[t]->gradient.get(i);
      for (int k = 0; k < kMaxStates; ++k)
        state[k] = before[t]->states[k] != nullptr ? before[t]->states[k]->get(i) : 0;
    };
    Sums sums;
    for (int64_t i = 0; i < after[t]->numel; ++i) {
      read(i);
      if (!is_float64) g = static_cast<double>(static_cast<float>(g));
      reference(s, p, g, state, 0, {}, &sums);
    }
    for (int64_t i = 0; i < after[t]->numel; ++i) {
      read(i);
      const double scale = 1 + std::fabs(p) + g * g;
      if (!is_float64) g = static_cast<double>(static_cast<float>(g));
      reference(s, p, g, state, static_cast<double>(noise[static_cast<size_t>(i)]), sums);
      if (!is_close(after[t]->param.get(i), p, a.param_dtype, is_float64, scale)) return false;
      if (s.gradient_scale != 1 && !is_close(after[t]->gradient.get(i), g, a.gradient_dtype, is_float64, scale))
        return false;
      for (int k = 0; k < kMaxStates; ++k)
        if (after[t]->states[k] != nullptr &&
            !is_close(after[t]->states[k]->get(i), state[k], a.state_dtype, is_float64, scale * scale))
          return false;
    }
  }
  return true;
}

inline bool is_intact(const Parameters& parameters) {
  for (const Parameter* parameter : parameters)
    if (!parameter->is_intact()) return false;
  return true;
}

}  // namespace trainopt
