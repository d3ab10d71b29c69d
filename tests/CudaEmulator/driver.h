// The memory and the launches of the one device that there is, with or without a trace of them: see README.md.
#pragma once
#include <atomic>
#include <deque>
#include <functional>
#include <vector>

#include "emulator.h"

namespace driver {

enum Result { Success = 0, InvalidValue = 1, OutOfMemory = 2, InvalidContext = 201, NotFound = 500, NotReady = 600, LaunchFailed = 719, CaptureUnsupported = 900 };

/// What a trace is made of. Each event is a byte, then its fields in the order of the arguments below, addresses and sizes in
/// 8 bytes: Write ends with the bytes, Read with their hash; Launch begins with the length and the letters of the name, and ends
/// with every argument in 8 bytes.
enum class Event : uint8_t { Allocate = 1, Free, Write, Copy, Fill, Read, Launch };

void memory_info(size_t& free, size_t& total);
Result allocate(uint64_t& address, size_t bytes);
Result release(uint64_t address);
Result write(uint64_t to, const void* from, size_t bytes);
Result copy(uint64_t to, uint64_t from, size_t bytes);
Result fill(uint64_t to, uint8_t value, size_t bytes);
Result read(void* to, uint64_t from, size_t bytes);
Result launch(const emulator::Function& function, dim3 grid, unsigned threads, size_t shared_bytes, void** arguments);

/// Whether an allocation has those bytes.
bool holds(uint64_t address, size_t bytes);

/// What is queued in order. A failed launch is the end of what was queued behind it: of all that the stream is asked for from
/// then on. While it captures, nothing runs. What needs other devices runs when something waits for it, and what is queued behind
/// it with it: later than a device might, so that who does not wait is found out.
struct Stream {
    Result failure = Success;
    bool captures = false;
    std::vector<std::function<Result()>> captured;
    std::deque<std::function<Result()>> late;
    std::atomic<long> put_off = 0;
    std::atomic<long> made_up = 0;
};

/// Queues work that runs when something waits for it (libcuda.cpp).
Result put_off(Stream* stream, std::function<Result()> work);

/// Whether the calling thread has a context (libcuda.cpp).
bool has_context();

/// What TINYLLAMA_CUDA_FAIL says of a function: its result, or 0 (libcuda.cpp).
int planned_failure(const char* function);

/// Runs work after the copies that the stream has put off, or keeps it for later while the stream captures (libcuda.cpp).
Result queue(Stream* stream, std::function<Result()> work);

/// `launch`, queued (libcuda.cpp).
Result queue_launch(Stream* stream, const emulator::Function& function, dim3 grid, unsigned threads, size_t shared_bytes, void** arguments);

/// What a trace keeps of the bytes that were read.
uint64_t hash(const void* memory, size_t bytes);

}  // namespace driver
