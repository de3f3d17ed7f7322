// What the emulated driver and the emulated cuBLASLt share: streams whose work waits until somebody needs it.
#pragma once
#include <cstdint>
#include <functional>

namespace fake {

// Work returns a CUresult. It runs when the stream, or an event behind it, is waited for: as late as a card may.
using Work = std::function<int()>;

// Queues work on a stream, or records it if the stream is recording. 0 or the error that the device is stuck with.
int queue(void* stream, Work work);

// A number from the environment, by which tests choose the device's faults.
int64_t setting(const char* name, int64_t otherwise);

}  // namespace fake
