// Steps of parameters by the CUDA engine on the SIMT machine.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "../cpp/parameters.h"
#include "cuda/engine.h"

namespace trainopt {

template <class List = Parameters>
std::vector<cuda::TensorTask> tasks_of(const List& parameters) {
  std::vector<cuda::TensorTask> tasks;
  for (size_t i = 0; i < parameters.size(); ++i) {
    cuda::TensorTask task{};
    parameters[i]->describe(&task);
    task.tensor = static_cast<uint32_t>(i);
    tasks.push_back(task);
  }
  return tasks;
}

inline cuda::Prepared prepared_of(const Setting& s, bool is_float64) {
  return {scalars_of(s, is_float64), static_cast<uint32_t>(s.step)};
}

// The step of all tasks, in one pass, two or three.
inline void step(const Setting& s, cuda::Update work, std::vector<cuda::TensorTask>& tasks) {
  const Sum unset{std::nan(""), std::nan("")};
  std::vector<cuda::Prepared> finished[kPasses];
  for (const Pass pass : passes_of(s)) {
    const int count = cpu::rule_at(work.rule)->sums_in(pass);
    std::vector<Sum> partials(cuda::partial_sums(work, count), unset);
    std::vector<Sum> sums(tasks.size() * static_cast<size_t>(count), unset);
    finished[pass].resize(tasks.size());
    std::memset(static_cast<void*>(finished[pass].data()), 0xff, tasks.size() * sizeof(cuda::Prepared));
    cuda::gather(work, pass, partials.data(), sums.data(), nullptr);
    cuda::finish(work, pass, sums.data(), false, finished[pass].data(), nullptr);
    for (size_t t = 0; t < tasks.size(); ++t) tasks[t].prepared = static_cast<uint32_t>(t);
    work.prepared = finished[pass].data();
    work.prepared_on_device = true;
  }
  cuda::update(work, nullptr, nullptr);
}

// With scalars that the host prepared.
template <class List = Parameters>
void run_cuda(const Setting& s, const List& parameters, bool is_float64, const float* found_inf = nullptr) {
  const cuda::Prepared prepared = prepared_of(s, is_float64);
  std::vector<cuda::TensorTask> tasks = tasks_of(parameters);
  for (cuda::TensorTask& task : tasks) task.rounds_at_random = s.tail.rounds_at_random;
  const int rule = cpu::find_rule(s.rule)->index;
  step(s, {rule, is_float64, tasks.data(), tasks.size(), &prepared, false, found_inf}, tasks);
}

}  // namespace trainopt
