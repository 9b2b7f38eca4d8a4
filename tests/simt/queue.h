// What the emulated devices have still to do. Work on a stream is done as late as is legal: when somebody waits for it,
// and then only what that wait needs. Among the work that may be done next, that which was issued last comes first, so
// that what is not ordered by an event or by a wait is done in another order than that of the program, and a dependency
// that was forgotten shows. Another seed draws from all work that may be done, whoever needs it.
//
// A stream that is being captured keeps its work for a graph, of which each replay issues it anew.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace simt {

// A stream is known by its handle; those up to this one are the devices' default streams, CUDA's legacy ones.
constexpr uintptr_t kLastLegacyStream = 2;

struct Work;
using Event = std::shared_ptr<Work>;  // done when this work is; null: done
struct Graph;

// Each throws std::runtime_error, in CUDA's words, where CUDA refuses it, and the capture has failed then.
void enqueue(const void* stream, std::function<void()> work);
Event record(const void* stream);
void wait(const void* stream, const Event&);
void finish(const Event&);
void finish_stream(const void* stream);
void finish_streams(const std::function<bool(const void* stream)>& which);
// Whether it is done. If not, it is the next time.
bool query(const Event&);

// Does all that is not in a graph, at any time; and forgets captures that have not ended.
void finish_all();
void abandon_captures();

// The work that the stream has been given last: by what is captured, or by what is not.
Event last_captured(const void* stream);
Event last_issued(const void* stream);
// Done by itself as soon as these are: no stream waits for it. In a graph, if one of them is.
void enqueue_after(const std::vector<Event>&, std::function<void()> work);

// 0: as late as is legal, the latest first. Otherwise the seed of what is drawn.
void set_seed(uint64_t seed);
// That of all tests, if they do not ask for another: TRAINOPT_SIMT_SEED of the environment, or 0.
uint64_t usual_seed();

// Graphs --------------------------------------------------------------------------------------------------------------

void begin_capture(const void* stream);
std::shared_ptr<Graph> end_capture(const void* stream);
bool is_capturing(const void* stream);
bool is_any_capturing();
// What CUDA does not permit while there is a capture: it fails, and this throws.
void forbid_while_capturing(const std::string& message);

void replay(const std::shared_ptr<Graph>&, const void* stream);
Event last_replay(const Graph&);

}  // namespace simt
