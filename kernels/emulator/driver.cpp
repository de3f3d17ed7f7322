// A CUDA driver without a card, for the tests of the code that talks to one: the functions of libcuda.so that the
// engine calls, kernels run by the emulator. Built into a shared library that stands in for libcuda.so.1
// (tests/card.rs).
//
// Streams are lazy: a copy, a kernel or an event happens when somebody waits for it, so a wait that is missing shows as
// stale data. Copies from pageable memory take their bytes at once, those from pinned memory when they happen, as the
// real ones may. Otherwise, by environment: FAKE_CARD_EARLY (1: copies from pinned memory do not wait to be asked for).
// Faults: FAKE_CARD_VERSION, _COUNT, _COMPUTE (75: 7.5), _BYTES (memory), _LOST_AFTER (launches), _RECORDS
// (operations at most; 0: it cannot).
#include "driver.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

extern "C" int emu_launch(const char*, const unsigned*, const unsigned*, size_t, void**, int, uint64_t);
extern "C" int emu_argument_bytes(const char*, size_t*, int);

namespace fake {

enum Result { OK = 0, INVALID = 1, NO_MEMORY = 2, NO_DEVICE = 100, NOT_FOUND = 500, LOST = 719, UNSUPPORTED = 900 };
using Graph = std::vector<Work>;

struct Stream {
  std::deque<Work> waiting;
  uint64_t queued = 0, done = 0;
  std::shared_ptr<Graph> record;
};
struct Event {
  Stream* stream = nullptr;
  uint64_t position = 0;
};
struct Block {
  size_t bytes;
  void* base;
};

std::recursive_mutex lock;
std::map<uint64_t, Block> blocks;      // device memory
std::map<const char*, size_t> pinned;  // host memory
std::vector<Stream*> streams;
size_t held = 0;
int64_t launches = 0;
int stuck = OK;  // once lost, every call says so

int64_t setting(const char* name, int64_t otherwise) {
  const char* value = getenv(name);
  return value && *value ? atoll(value) : otherwise;
}

int advance(Stream* stream, uint64_t to) {
  while (stream->done < to && !stream->waiting.empty()) {
    Work work = std::move(stream->waiting.front());
    stream->waiting.pop_front();
    stream->done++;
    int result = stuck ? stuck : work();
    if (result && !stuck) stuck = result;
  }
  return stuck;
}

int queue(void* handle, Work work) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (stuck) return stuck;
  auto stream = static_cast<Stream*>(handle);
  if (stream->record) {
    if (int64_t(stream->record->size()) >= setting("FAKE_CARD_RECORDS", 1 << 30)) return UNSUPPORTED;
    stream->record->push_back(std::move(work));
    return OK;
  }
  stream->waiting.push_back(std::move(work));
  stream->queued++;
  return OK;
}

int drain_all() {
  for (auto stream : streams) advance(stream, stream->queued);
  return stuck;
}

bool is_pinned(const void* p, size_t bytes) {
  auto at = static_cast<const char*>(p);
  auto after = pinned.upper_bound(at);
  if (after == pinned.begin()) return false;
  --after;
  return at + bytes <= after->first + after->second;
}

// Whether the stretch lies in one block: the driver does not check, a test must.
bool is_ours(uint64_t at, size_t bytes) {
  auto after = blocks.upper_bound(at);
  if (after == blocks.begin()) return false;
  --after;
  return at + bytes <= after->first + after->second.bytes;
}

}  // namespace fake

using namespace fake;
#define API extern "C" __attribute__((visibility("default"))) int
#define GUARD std::lock_guard<std::recursive_mutex> guard(lock)

API cuInit(unsigned) { return setting("FAKE_CARD_COUNT", 1) ? OK : NO_DEVICE; }
API cuDriverGetVersion(int* version) { return *version = int(setting("FAKE_CARD_VERSION", 13000)), OK; }
API cuDeviceGetCount(int* count) { return *count = int(setting("FAKE_CARD_COUNT", 1)), OK; }
API cuDeviceGet(int* device, int ordinal) { return *device = ordinal, OK; }
API cuDeviceGetName(char* name, int bytes, int) { return snprintf(name, size_t(bytes), "Emulated card"), OK; }
API cuDeviceGetAttribute(int* value, int attribute, int) {
  const int compute = int(setting("FAKE_CARD_COMPUTE", 90));
  *value = attribute == 75 ? compute / 10 : attribute == 76 ? compute % 10 : 227 << 10;
  return OK;
}
API cuDevicePrimaryCtxRetain(void** context, int device) { return *context = reinterpret_cast<void*>(device + 1L), OK; }
API cuDevicePrimaryCtxRelease_v2(int) { return OK; }
API cuCtxSetCurrent(void*) { return OK; }
API cuGetErrorName(int, const char** text) { return *text = "FAKE_ERROR", OK; }
API cuGetErrorString(int code, const char** text) {
  *text = code == LOST ? "the emulated card was lost" : code == NO_MEMORY ? "out of memory" : "an emulated error";
  return OK;
}

API cuModuleLoadData(void** module, const void* image) { return *module = const_cast<void*>(image), OK; }
API cuModuleGetFunction(void** function, void*, const char* name) {
  if (emu_argument_bytes(name, nullptr, 0) < 0) return NOT_FOUND;
  return *function = strdup(name), OK;
}
API cuFuncSetAttribute(void*, int, int) { return OK; }

API cuMemAlloc_v2(uint64_t* at, size_t bytes) {
  GUARD;
  if (stuck) return stuck;
  if (held + bytes > size_t(setting("FAKE_CARD_BYTES", 8ll << 30))) return NO_MEMORY;
  void* base = aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset(base, 0xFF, bytes);  // NaN
  *at = reinterpret_cast<uint64_t>(base);
  blocks[*at] = Block{bytes, base};
  held += bytes;
  return OK;
}
API cuMemFree_v2(uint64_t at) {
  GUARD;
  drain_all();
  auto found = blocks.find(at);
  if (found == blocks.end()) return INVALID;
  held -= found->second.bytes;
  free(found->second.base);
  blocks.erase(found);
  return stuck;
}
API cuMemGetInfo_v2(size_t* available, size_t* total) {
  GUARD;
  *total = size_t(setting("FAKE_CARD_BYTES", 8ll << 30));
  *available = *total - held;
  return OK;
}
API cuMemHostAlloc(void** at, size_t bytes, unsigned) {
  GUARD;
  *at = malloc(bytes);
  pinned[static_cast<char*>(*at)] = bytes;
  return OK;
}
API cuMemFreeHost(void* at) {
  GUARD;
  pinned.erase(static_cast<char*>(at));
  free(at);
  return OK;
}

API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  GUARD;
  if (!is_ours(to, bytes)) return INVALID;
  if (is_pinned(from, bytes)) {
    const int queued = queue(stream, [=] { return memcpy(reinterpret_cast<void*>(to), from, bytes), OK; });
    auto at_once = static_cast<Stream*>(stream);
    return queued || !setting("FAKE_CARD_EARLY", 0) ? queued : advance(at_once, at_once->queued);
  }
  if (static_cast<Stream*>(stream)->record) return UNSUPPORTED;
  auto source = static_cast<const char*>(from);
  std::vector<char> taken(source, source + bytes);
  return queue(stream, [=] { return memcpy(reinterpret_cast<void*>(to), taken.data(), bytes), OK; });
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  GUARD;
  if (!is_ours(from, bytes)) return INVALID;
  if (static_cast<Stream*>(stream)->record) return UNSUPPORTED;
  return queue(stream, [=] { return memcpy(to, reinterpret_cast<void*>(from), bytes), OK; });
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  GUARD;
  if (!is_ours(to, bytes) || !is_ours(from, bytes)) return INVALID;
  return queue(stream, [=] { return memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes), OK; });
}

API cuStreamCreate(void** stream, unsigned) {
  GUARD;
  streams.push_back(new Stream);
  return *stream = streams.back(), OK;
}
API cuStreamSynchronize(void* handle) {
  GUARD;
  auto stream = static_cast<Stream*>(handle);
  return stream->record ? UNSUPPORTED : advance(stream, stream->queued);
}
API cuStreamDestroy_v2(void*) { return OK; }  // work that is queued goes on
API cuStreamWaitEvent(void* stream, void* handle, unsigned) {
  GUARD;
  const Event event = *static_cast<Event*>(handle);
  return event.stream ? queue(stream, [=] { return advance(event.stream, event.position); }) : OK;
}
API cuEventCreate(void** event, unsigned) { return *event = new Event, OK; }
API cuEventRecord(void* handle, void* stream) {
  GUARD;
  auto event = static_cast<Event*>(handle);
  event->stream = static_cast<Stream*>(stream);
  event->position = event->stream->queued;
  return stuck;
}
API cuEventSynchronize(void* handle) {
  GUARD;
  auto event = static_cast<Event*>(handle);
  return event->stream ? advance(event->stream, event->position) : stuck;
}
API cuEventElapsedTime_v2(float* milliseconds, void*, void*) { return *milliseconds = 1.f, stuck; }
API cuEventElapsedTime(float* milliseconds, void*, void*) { return *milliseconds = 1.f, stuck; }
API cuEventDestroy_v2(void* event) { return delete static_cast<Event*>(event), OK; }

API cuStreamBeginCapture_v2(void* stream, int) {
  GUARD;
  if (!setting("FAKE_CARD_RECORDS", 1)) return UNSUPPORTED;
  static_cast<Stream*>(stream)->record = std::make_shared<Graph>();
  return stuck;
}
API cuStreamEndCapture(void* handle, void** graph) {
  GUARD;
  auto stream = static_cast<Stream*>(handle);
  if (!stream->record) return UNSUPPORTED;
  *graph = new Graph(*stream->record);
  stream->record = nullptr;
  return stuck;
}
API cuGraphInstantiateWithFlags(void** made, void* graph, uint64_t) {
  return *made = new Graph(*static_cast<Graph*>(graph)), OK;
}
API cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), OK; }
API cuGraphExecDestroy(void* graph) { return delete static_cast<Graph*>(graph), OK; }
API cuGraphLaunch(void* graph, void* stream) {
  for (auto& work : *static_cast<Graph*>(graph))
    if (int result = queue(stream, work)) return result;
  return OK;
}

API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void**) {
  const std::string name = static_cast<const char*>(function);
  size_t bytes[32];
  const int count = emu_argument_bytes(name.c_str(), bytes, 32);
  std::vector<std::vector<uint64_t>> copies;
  for (int i = 0; i < count; i++) {
    copies.emplace_back((bytes[i] + 7) / 8);
    memcpy(copies.back().data(), arguments[i], bytes[i]);
  }
  return queue(stream, [=] {
    const int64_t last = setting("FAKE_CARD_LOST_AFTER", -1);
    if (last >= 0 && launches++ >= last) return int(LOST);
    const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    std::vector<void*> pointers;
    for (auto& copy : copies) pointers.push_back(const_cast<uint64_t*>(copy.data()));
    return emu_launch(name.c_str(), grid, block, shared, pointers.data(), 2, 3) ? int(NOT_FOUND) : int(OK);
  });
}
