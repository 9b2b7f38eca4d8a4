// The pointwise losses by their formulas in double, written anew, for the tests of every engine.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "formats.h"

namespace trainopt {

// What rounding to the storage and some operations in the arithmetic's type may cost.
inline bool is_near(double found, double exact, double size, DType dtype) {
  if (std::isnan(exact)) return std::isnan(found);
  if (std::isinf(exact)) return found == exact;
  const double unit = dtype == DType::kFloat64 ? 1e-15 : 2e-7;
  return std::fabs(found - exact) <= spacing(exact, dtype) + 8 * unit * size;
}

struct Formula {
  const char* name;
  std::function<double(double)> input, target;  // from any number to one of the domain
  // The loss of x, t, the weight of the positive class and the parameter; its slopes by x and t.
  std::function<double(double, double, double, double)> value, slope, target_slope;
};

inline double into_unit(double v) { return 0.02 + 0.96 * std::fabs(v) / 4; }
inline double as_it_is(double v) { return v; }
inline double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }
inline double logistic(double x) { return 1 / (1 + std::exp(-x)); }

inline const std::vector<Formula> kFormulas = {
    {"mse_loss", as_it_is, as_it_is, [](double x, double t, double, double) { return (x - t) * (x - t); },
     [](double x, double t, double, double) { return 2 * (x - t); },
     [](double x, double t, double, double) { return 2 * (t - x); }},
    {"l1_loss", as_it_is, as_it_is, [](double x, double t, double, double) { return std::fabs(x - t); },
     [](double x, double t, double, double) { return sign(x - t); },
     [](double x, double t, double, double) { return sign(t - x); }},
    {"smooth_l1_loss", as_it_is, as_it_is,
     [](double x, double t, double, double k) {
       const double d = std::fabs(x - t);
       return d < k ? d * d / (2 * k) : d - k / 2;
     },
     [](double x, double t, double, double k) { return std::fabs(x - t) < k ? (x - t) / k : sign(x - t); },
     [](double x, double t, double, double k) { return std::fabs(x - t) < k ? (t - x) / k : sign(t - x); }},
    {"huber_loss", as_it_is, as_it_is,
     [](double x, double t, double, double k) {
       const double d = std::fabs(x - t);
       return d < k ? d * d / 2 : k * (d - k / 2);
     },
     [](double x, double t, double, double k) { return std::fabs(x - t) < k ? x - t : k * sign(x - t); },
     [](double x, double t, double, double k) { return std::fabs(x - t) < k ? t - x : k * sign(t - x); }},
    {"binary_cross_entropy", into_unit, into_unit,
     [](double x, double t, double, double) { return -t * std::log(x) - (1 - t) * std::log1p(-x); },
     [](double x, double t, double, double) { return (x - t) / (x * (1 - x)); },
     [](double x, double, double, double) { return std::log1p(-x) - std::log(x); }},
    {"binary_cross_entropy_with_logits", as_it_is, into_unit,
     [](double x, double t, double p, double) { return (1 - t) * softplus(x) + p * t * softplus(-x); },
     [](double x, double t, double p, double) { return (1 - t) * logistic(x) - p * t * logistic(-x); },
     [](double x, double, double p, double) { return p * softplus(-x) - softplus(x); }},
    {"kl_div", as_it_is, into_unit, [](double x, double t, double, double) { return t * (std::log(t) - x); },
     [](double, double t, double, double) { return -t; },
     [](double x, double t, double, double) { return std::log(t) + 1 - x; }},
    {"kl_div_log_target", as_it_is, as_it_is, [](double x, double t, double, double) { return std::exp(t) * (t - x); },
     [](double, double t, double, double) { return -std::exp(t); },
     [](double x, double t, double, double) { return std::exp(t) * (t - x + 1); }},
};

// How large the numbers are that the loss of one element is made from: its error is a few roundings of that.
inline double size_of_terms(const Formula& formula, double x, double t, double weight, double exact) {
  const double steep = formula.input(0) == 0 ? 1 : 1 / (x * (1 - x));
  return std::fabs(weight) *
         (steep + std::fabs(exact) + std::exp(std::fabs(t)) + std::pow(std::fabs(x) + std::fabs(t), 2));
}

}  // namespace trainopt
