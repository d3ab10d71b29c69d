// The memory and the launches of the one device that there is, with or without a trace of them: see README.md.
#pragma once
#include "emulator.h"

namespace driver {

enum Result { Success = 0, InvalidValue = 1, OutOfMemory = 2, NotFound = 500, LaunchFailed = 719 };

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

/// Makes the copies that a stream has put off (libcuda.cpp).
void finish(void* stream);

/// What a trace keeps of the bytes that were read.
uint64_t hash(const void* memory, size_t bytes);

}  // namespace driver
