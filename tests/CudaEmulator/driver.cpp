// Device memory is memory of the host, and a launch is done when it returns.
#include "driver.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

namespace driver {

namespace {

/// TINYLLAMA_CUDA_TRACE: where all that happens to the device is written, for replay.
class Trace {
public:
    Trace() {
        const char* path = getenv("TINYLLAMA_CUDA_TRACE");
        file_ = path ? fopen(path, "wb") : nullptr;
    }

    ~Trace() {
        if (file_) {
            fclose(file_);
        }
    }

    explicit operator bool() const { return file_ != nullptr; }

    void put(const void* bytes, size_t count) { fwrite(bytes, 1, count, file_); }

    template<class T> void put(const T& value) { put(&value, sizeof value); }

    /// The event and its fields, in their order.
    template<class... T> void event(Event event, const T&... fields) {
        put(event);
        (put(fields), ...);
    }

    void flush() { fflush(file_); }

private:
    FILE* file_;
};

std::mutex mutex;
Trace trace;
std::map<uint64_t, size_t> allocations;
size_t allocated;

/// What the device holds; TINYLLAMA_CUDA_MEMORY in bytes, by default 4 GiB.
size_t capacity() {
    const char* bytes = getenv("TINYLLAMA_CUDA_MEMORY");
    return bytes ? strtoull(bytes, nullptr, 10) : (size_t)4 << 30;
}

bool inside(uint64_t address, size_t bytes) {
    auto next = allocations.upper_bound(address);
    return next != allocations.begin() && (--next, address + bytes <= next->first + next->second);
}

}  // namespace

bool holds(uint64_t address, size_t bytes) {
    std::lock_guard lock(mutex);
    return inside(address, bytes);
}

uint64_t hash(const void* memory, size_t bytes) {
    uint64_t value = 14695981039346656037u;
    for (size_t i = 0; i < bytes; i++) {
        value = (value ^ ((const unsigned char*)memory)[i]) * 1099511628211u;
    }

    return value;
}

void memory_info(size_t& free, size_t& total) {
    std::lock_guard lock(mutex);
    total = capacity();
    free = total - allocated;
}

// Of exactly that size, for the address sanitizer; with what was there before, as on a device: NaN.
Result allocate(uint64_t& address, size_t bytes) {
    std::lock_guard lock(mutex);
    void* memory = nullptr;
    if (bytes == 0) {
        return InvalidValue;
    }

    if (allocated + bytes > capacity() || posix_memalign(&memory, 256, bytes) != 0) {
        return OutOfMemory;
    }

    emulator::fill(memory, 0xff, bytes);
    address = (uint64_t)memory;
    allocations[address] = bytes;
    allocated += bytes;
    if (trace) {
        trace.event(Event::Allocate, address, (uint64_t)bytes);
    }

    return Success;
}

Result release(uint64_t address) {
    std::lock_guard lock(mutex);
    auto found = allocations.find(address);
    if (found == allocations.end()) {
        return InvalidValue;
    }

    if (trace) {
        trace.event(Event::Free, address);
    }

    allocated -= found->second;
    allocations.erase(found);
    free((void*)address);
    return Success;
}

Result write(uint64_t to, const void* from, size_t bytes) {
    std::lock_guard lock(mutex);
    if (!inside(to, bytes)) {
        return InvalidValue;
    }

    if (trace) {
        trace.event(Event::Write, to, (uint64_t)bytes);
        trace.put(from, bytes);
    }

    memcpy((void*)to, from, bytes);
    return Success;
}

Result copy(uint64_t to, uint64_t from, size_t bytes) {
    std::lock_guard lock(mutex);
    if (!inside(to, bytes) || !inside(from, bytes)) {
        return InvalidValue;
    }

    if (trace) {
        trace.event(Event::Copy, to, from, (uint64_t)bytes);
    }

    memmove((void*)to, (void*)from, bytes);
    return Success;
}

Result fill(uint64_t to, uint8_t value, size_t bytes) {
    std::lock_guard lock(mutex);
    if (!inside(to, bytes)) {
        return InvalidValue;
    }

    if (trace) {
        trace.event(Event::Fill, to, value, (uint64_t)bytes);
    }

    emulator::fill((void*)to, value, bytes);
    return Success;
}

Result read(void* to, uint64_t from, size_t bytes) {
    std::lock_guard lock(mutex);
    if (!inside(from, bytes)) {
        return InvalidValue;
    }

    memcpy(to, (void*)from, bytes);
    if (trace) {
        trace.event(Event::Read, from, (uint64_t)bytes, hash(to, bytes));
        trace.flush();
    }

    return Success;
}

Result launch(const emulator::Function& function, dim3 grid, unsigned threads, size_t shared_bytes, void** arguments) {
    {
        std::lock_guard lock(mutex);
        for (int i = 0; i < function.count && arguments[i]; i++) {
            const uint64_t address = *(uint64_t*)arguments[i];
            if (function.parameters[i].pointer && address != 0 && !inside(address, 0)) {
                fprintf(stderr, "emulator: %s: argument %d points to no memory of the device\n", function.name, i);
                return LaunchFailed;
            }
        }
    }

    if (trace) {
        std::lock_guard lock(mutex);
        trace.event(Event::Launch, (uint32_t)strlen(function.name));
        trace.put(function.name, strlen(function.name));
        trace.put(grid);
        trace.put(threads);
        trace.put((uint64_t)shared_bytes);
        for (int i = 0; i < function.count && arguments[i]; i++) {
            uint64_t value = 0;
            memcpy(&value, arguments[i], function.parameters[i].bytes);
            trace.put(value);
        }

        trace.flush();
    }

    return emulator::launch(function, grid, threads, shared_bytes, arguments) ? Success : LaunchFailed;
}

}  // namespace driver
