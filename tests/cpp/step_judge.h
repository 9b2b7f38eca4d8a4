// Steps of parameters by the CPU engine, and what is right of a step: what every engine is compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "formulas.h"
#include "parameters.h"

namespace trainopt {

// Runs the engine over these parameters; their blocks in pieces of `piece` (all at once if 0), the last first.
template <class List = Parameters>
void run_cpu(const Setting& s, const List& parameters, bool is_float64, int64_t piece) {
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
  std::vector<Sum> sums[kPasses];
  for (const Pass pass : passes_of(s)) {
    const auto count = static_cast<size_t>(rule->sums_in(pass));
    std::vector<Sum> partials(cpu::places_of(run) * count, Sum{std::nan(""), 0});
    sums[pass].resize(tasks.size() * count);
    for (int64_t at = 0; at < all; at += piece == 0 ? all : piece)
      cpu::gather_blocks(run, pass, at, piece == 0 ? all : std::min(at + piece, all), partials.data());
    for (size_t t = 0; t < tasks.size(); ++t) cpu::sums_of(run, pass, t, partials.data(), &sums[pass][t * count]);
    run.sums[pass] = sums[pass].data();
  }
  if (piece == 0) return cpu::run_blocks(run, 0, all);
  for (int64_t at = (all - 1) / piece * piece; at >= 0; at -= piece)
    cpu::run_blocks(run, at, std::min(at + piece, all));
}

inline bool is_right(const Setting& s, const Parameters& before, const Parameters& after, const Arrangement& a,
                     bool is_float64) {
  for (size_t t = 0; t < after.size(); ++t) {
    std::vector<float> noise(static_cast<size_t>(after[t]->numel));
    cpu::gaussian(noise.data(), 0, after[t]->numel, {kSeed, static_cast<uint32_t>(s.step), static_cast<uint32_t>(t)});
    double p, g, state[kMaxViews];
    const auto read = [&](int64_t i) {
      p = before[t]->param.get(i), g = before[t]->gradient.get(i);
      for (int k = 0; k < kMaxViews; ++k) state[k] = before[t]->states[k] != nullptr ? before[t]->states[k]->get(i) : 0;
    };
    Sums sums;
    for (int64_t i = 0; i < after[t]->numel; ++i) {
      read(i);
      if (!is_float64) g = static_cast<double>(static_cast<float>(g));
      gather_element(s, p, g, state, &sums);
    }
    for (int64_t i = 0; i < after[t]->numel; ++i) {
      read(i);
      if (!is_float64) g = static_cast<double>(static_cast<float>(g));
      ask_element(s, p, g, state, &sums);
    }
    for (int64_t i = 0; i < after[t]->numel; ++i) {
      read(i);
      const double scale = 1 + std::fabs(p) + g * g;
      if (!is_float64) g = static_cast<double>(static_cast<float>(g));
      step_element(s, p, g, state, static_cast<double>(noise[static_cast<size_t>(i)]), sums);
      if (!is_close(after[t]->param.get(i), p, a.param_dtype, is_float64, scale)) return false;
      if (!s.writes_gradient() && after[t]->gradient.bits(i) != before[t]->gradient.bits(i)) return false;
      if (s.writes_gradient() && !is_close(after[t]->gradient.get(i), g, a.gradient_dtype, is_float64, scale))
        return false;
      if (s.tail.ema_decay != 0) {  // of the parameter as it is stored
        double& average = state[average_of(s)];
        average += average_weight_of(s) * (after[t]->param.get(i) - average);
      }
      for (int k = 0; k < kMaxViews; ++k)
        if (after[t]->states[k] != nullptr &&
            !is_close(after[t]->states[k]->get(i), state[k], a.state_dtype, is_float64, scale * scale))
          return false;
    }
  }
  return true;
}

}  // namespace trainopt
