#include "queue.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <utility>

#include "simt.h"

namespace simt {

struct Capture;

struct Work {
  uint64_t order = 0;  // in which it was issued
  std::function<void()> run;
  std::vector<Event> needs;      // what has to be done before
  std::vector<Event> followers;  // what is done by itself after this, among others
  size_t left = 0;               // how many of `needs` are not done: of a follower, and while it is scheduled
  bool done = false, scheduled = false, by_itself = false;
  std::vector<Work*> waiting;  // while it is scheduled: by whom it is needed
  Capture* capture = nullptr;
};

struct Capture {
  const void* origin = nullptr;
  std::vector<Event> works;
  bool failed = false;

  // Their events have nothing more to say.
  ~Capture() {
    for (const Event& work : works) {
      work->capture = nullptr;
      work->done = true;
      work->needs.clear();  // else they end each other, one call within the other
    }
  }
};

struct Graph {
  struct Step {
    std::function<void()> run;
    std::vector<size_t> needs;
    bool by_itself;
  };
  std::vector<Step> steps;
  Event last;
};

namespace {

struct Stream {
  Event issued, captured;            // the last of each
  std::shared_ptr<Capture> capture;  // that it is part of
};

struct Queue {
  std::recursive_mutex mutex;
  std::map<const void*, Stream> streams;
  std::vector<Event> pending;
  uint64_t issued = 0, seed = 0;
  std::mt19937_64 draw;
};

// Never destroyed: tensors may outlive everything.
Queue& queue() {
  static Queue* const one = new Queue;
  return *one;
}

constexpr size_t kMostPending = 1 << 13;  // more is done without a wait: that is legal at any time

void perform(Work& work) {
  try {
    if (work.run) work.run();
  } catch (const std::exception& error) {
    report_launch(std::string("work on a stream failed: ") + error.what());
  }
  work.done = true;
  work.run = nullptr;
  work.needs.clear();
  for (const Event& follower : std::exchange(work.followers, {}))
    if (--follower->left == 0) perform(*follower);
}

// The work that is done next, of what may be.
class Ready {
 public:
  explicit Ready(Queue& queue) : queue_(queue) {}

  void add(Work* work) {
    works_.push_back(work);
    if (queue_.seed == 0) std::push_heap(works_.begin(), works_.end(), is_before);
  }
  Work* take() {
    if (queue_.seed == 0) {
      std::pop_heap(works_.begin(), works_.end(), is_before);
    } else {
      std::swap(works_[queue_.draw() % works_.size()], works_.back());
    }
    Work* const work = works_.back();
    works_.pop_back();
    return work;
  }

 private:
  Queue& queue_;
  std::vector<Work*> works_;
  static bool is_before(const Work* a, const Work* b) { return a->order < b->order; }
};

void do_until(std::vector<Event> targets) {
  Queue& all = queue();
  std::vector<Event> members, found = targets;
  if (all.seed != 0) found.insert(found.end(), all.pending.begin(), all.pending.end());
  while (!found.empty()) {
    const Event work = found.back();
    found.pop_back();
    if (work == nullptr || work->done || work->scheduled) continue;
    work->scheduled = true;
    work->left = 0;
    members.push_back(work);
    found.insert(found.end(), work->needs.begin(), work->needs.end());
  }
  Ready ready(all);
  for (const Event& work : members) {
    for (const Event& need : work->needs) {
      if (need->done) continue;
      ++work->left;
      need->waiting.push_back(work.get());
    }
  }
  for (const Event& work : members)
    if (work->left == 0) ready.add(work.get());
  for (const Event& target : targets) {
    while (target != nullptr && !target->done) {
      Work* const work = ready.take();
      perform(*work);
      for (Work* other : work->waiting)
        if (--other->left == 0) ready.add(other);
    }
  }
  for (const Event& work : members) {
    work->scheduled = false;
    work->waiting.clear();
  }
  const auto is_done = [](const Event& work) { return work->done; };
  all.pending.erase(std::remove_if(all.pending.begin(), all.pending.end(), is_done), all.pending.end());
}

bool is_legacy(const void* stream) { return reinterpret_cast<uintptr_t>(stream) <= kLastLegacyStream; }

void fail(Capture& capture, const std::string& message) {
  capture.failed = true;
  throw std::runtime_error("CUDA error: " + message);
}

void fail_all(const std::string& message) {
  Capture* one = nullptr;
  for (auto& [handle, stream] : queue().streams) {
    if (stream.capture == nullptr) continue;
    one = stream.capture.get();
    one->failed = true;
  }
  if (one != nullptr) fail(*one, message);
}

constexpr char kNotPermitted[] = "operation not permitted when stream is capturing";

void check_may_wait(const void* stream) {
  if (is_capturing(stream) || is_legacy(stream)) fail_all(kNotPermitted);
}

Event make(std::function<void()> work, std::vector<Event> needs) {
  Event made = std::make_shared<Work>();
  made->order = ++queue().issued;
  made->run = std::move(work);
  needs.erase(std::remove_if(needs.begin(), needs.end(), [](const Event& e) { return e == nullptr || e->done; }),
              needs.end());
  made->needs = std::move(needs);
  return made;
}

void keep_for_graph(Capture& capture, const Event& work) {
  if (capture.failed) fail(capture, "operation failed due to a previous error during capture");
  work->capture = &capture;
  capture.works.push_back(work);
}

// The stream's next work, which also waits for `other`.
Event add(const void* handle, std::function<void()> work, const Event& other) {
  Queue& all = queue();
  Stream& stream = all.streams[handle];
  if (stream.capture != nullptr) {
    const Event made = make(std::move(work), {stream.captured, other});
    keep_for_graph(*stream.capture, made);
    return stream.captured = made;
  }
  if (is_legacy(handle)) fail_all("operation would make the legacy stream depend on a capturing blocking stream");
  if (all.pending.size() >= kMostPending) do_until(all.pending);
  const Event made = make(std::move(work), {stream.issued, other});
  all.pending.push_back(made);
  return stream.issued = made;
}

}  // namespace

void enqueue(const void* stream, std::function<void()> work) {
  const std::lock_guard lock(queue().mutex);
  add(stream, std::move(work), nullptr);
}

Event record(const void* stream) {
  const std::lock_guard lock(queue().mutex);
  return add(stream, nullptr, nullptr);
}

void wait(const void* handle, const Event& event) {
  if (event == nullptr) return;
  const std::lock_guard lock(queue().mutex);
  Stream& stream = queue().streams[handle];
  if (event->capture == nullptr) {
    if (stream.capture != nullptr) fail(*stream.capture, "dependency created on uncaptured work in another stream");
  } else if (stream.capture == nullptr) {
    // It becomes part of the capture, as that of `event`.
    if (is_legacy(handle)) fail_all("operation would make the legacy stream depend on a capturing blocking stream");
    for (const auto& [other, known] : queue().streams)
      if (known.capture.get() == event->capture) stream.capture = known.capture;
    stream.captured = nullptr;
  } else if (stream.capture.get() != event->capture) {
    fail(*stream.capture, "operation would result in a merge of separate capture sequences");
  }
  add(handle, nullptr, event);
}

void finish(const Event& event) {
  const std::lock_guard lock(queue().mutex);
  if (event == nullptr) return;
  if (event->capture != nullptr) fail_all(kNotPermitted);
  do_until({event});
}

void finish_stream(const void* stream) {
  const std::lock_guard lock(queue().mutex);
  check_may_wait(stream);
  do_until({queue().streams[stream].issued});
}

void finish_streams(const std::function<bool(const void*)>& which) {
  const std::lock_guard lock(queue().mutex);
  fail_all(kNotPermitted);
  std::vector<Event> targets;
  for (const auto& [handle, stream] : queue().streams)
    if (which(handle)) targets.push_back(stream.issued);
  do_until(targets);
}

bool query(const Event& event) {
  const std::lock_guard lock(queue().mutex);
  if (event == nullptr || event->done) return true;
  if (event->capture != nullptr) fail_all(kNotPermitted);
  do_until({event});
  return false;
}

void finish_all() {
  const std::lock_guard lock(queue().mutex);
  do_until(queue().pending);
}

void abandon_captures() {
  const std::lock_guard lock(queue().mutex);
  for (auto& [handle, stream] : queue().streams) stream.captured = nullptr, stream.capture = nullptr;
}

Event last_captured(const void* stream) {
  const std::lock_guard lock(queue().mutex);
  return queue().streams[stream].captured;
}

Event last_issued(const void* stream) {
  const std::lock_guard lock(queue().mutex);
  return queue().streams[stream].issued;
}

void enqueue_after(const std::vector<Event>& events, std::function<void()> work) {
  const std::lock_guard lock(queue().mutex);
  const Event made = make(std::move(work), events);
  made->by_itself = true;
  made->left = made->needs.size();
  for (const Event& need : made->needs)
    if (need->capture != nullptr && !need->capture->failed) return keep_for_graph(*need->capture, made);
  if (made->left == 0) return perform(*made);
  for (const Event& need : std::exchange(made->needs, {})) need->followers.push_back(made);
}

void set_seed(uint64_t seed) {
  const std::lock_guard lock(queue().mutex);
  finish_all();
  queue().seed = seed;
  queue().draw.seed(seed);
}

uint64_t usual_seed() {
  const char* const given = std::getenv("TRAINOPT_SIMT_SEED");
  return given == nullptr ? 0 : std::strtoull(given, nullptr, 10);
}

// Graphs --------------------------------------------------------------------------------------------------------------

void begin_capture(const void* stream) {
  const std::lock_guard lock(queue().mutex);
  Stream& origin = queue().streams[stream];
  if (is_legacy(stream) || origin.capture != nullptr)
    throw std::runtime_error(std::string("CUDA error: ") + kNotPermitted);
  origin.capture = std::make_shared<Capture>();
  origin.capture->origin = stream;
  origin.captured = nullptr;
}

std::shared_ptr<Graph> end_capture(const void* handle) {
  const std::lock_guard lock(queue().mutex);
  const std::shared_ptr<Capture> capture = queue().streams[handle].capture;
  if (capture == nullptr) throw std::runtime_error("CUDA error: the stream is not being captured");
  if (capture->origin != handle) fail(*capture, "capture was not initiated in this stream");

  // What the origin's last work needs, directly or not: all else was forked from it and not joined again.
  std::set<const Work*> joined;
  std::vector<Event> found{queue().streams[handle].captured};
  std::vector<Event> last;
  for (auto& [other, stream] : queue().streams) {
    if (stream.capture != capture) continue;
    last.push_back(std::exchange(stream.captured, nullptr));
    stream.capture = nullptr;
  }
  while (!found.empty()) {
    const Event work = found.back();
    found.pop_back();
    if (work == nullptr || !joined.insert(work.get()).second) continue;
    found.insert(found.end(), work->needs.begin(), work->needs.end());
  }
  if (capture->failed) fail(*capture, "operation failed due to a previous error during capture");
  for (const Event& work : last)
    if (work != nullptr && joined.count(work.get()) == 0) fail(*capture, "capturing stream has unjoined work");

  auto graph = std::make_shared<Graph>();
  std::map<const Work*, size_t> places;
  for (const Event& work : capture->works) {
    Graph::Step step{work->run, {}, work->by_itself};
    for (const Event& need : work->needs)
      if (need->capture == capture.get()) step.needs.push_back(places.at(need.get()));
    places[work.get()] = graph->steps.size();
    graph->steps.push_back(std::move(step));
  }
  return graph;
}

bool is_capturing(const void* stream) {
  const std::lock_guard lock(queue().mutex);
  const auto found = queue().streams.find(stream);
  return found != queue().streams.end() && found->second.capture != nullptr;
}

bool is_any_capturing() {
  const std::lock_guard lock(queue().mutex);
  return std::any_of(queue().streams.begin(), queue().streams.end(),
                     [](const auto& entry) { return entry.second.capture != nullptr; });
}

void forbid_while_capturing(const std::string& message) {
  const std::lock_guard lock(queue().mutex);
  fail_all(message);
}

void replay(const std::shared_ptr<Graph>& graph, const void* handle) {
  const std::lock_guard lock(queue().mutex);
  Queue& all = queue();
  fail_all(kNotPermitted);
  const Event before = add(handle, nullptr, graph->last);
  std::vector<Event> works;
  std::vector<Event> streams_wait_for{before};
  for (const Graph::Step& step : graph->steps) {
    std::vector<Event> needs;
    for (const size_t need : step.needs) needs.push_back(works[need]);
    if (needs.empty()) needs.push_back(before);
    if (step.by_itself) {
      enqueue_after(needs, step.run);
      works.push_back(nullptr);
      continue;
    }
    const Event made = make(step.run, needs);
    all.pending.push_back(made);
    works.push_back(made);
    streams_wait_for.push_back(made);
  }
  const Event after = make(nullptr, std::move(streams_wait_for));
  all.pending.push_back(after);
  all.streams[handle].issued = graph->last = after;
}

Event last_replay(const Graph& graph) {
  const std::lock_guard lock(queue().mutex);
  return graph.last;
}

}  // namespace simt
