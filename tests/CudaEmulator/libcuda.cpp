// libcuda as far as the product calls it. A module is what the emulator was built with. Every call is done when it returns, but
// for copies that a device makes by itself and for what needs other devices.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#include "driver.h"

using driver::planned_failure;
using driver::queue;
using driver::Result;
using driver::Stream;

static const std::map<int, const char*> names = {
    {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {201, "CUDA_ERROR_INVALID_CONTEXT"}, {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {500, "CUDA_ERROR_NOT_FOUND"}, {719, "CUDA_ERROR_LAUNCH_FAILED"}, {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};

static Result run(Stream* stream, const std::function<Result()>& work) {
    const Result result = work();
    if (stream->failure == driver::Success && result == driver::LaunchFailed) {
        stream->failure = result;
    }

    return stream->failure != driver::Success ? stream->failure : result;
}

// Memory of the host that a device reads by itself, and the copies from it: made as late as may be, so that who writes there
// too early is found out.
struct Late {
    Stream* stream;
    uint64_t to;
    const void* from;
    size_t bytes;
};

static std::mutex late_mutex;
static std::vector<Late> late;
static std::map<uint64_t, size_t> pinned;

static bool is_pinned(const void* memory) {
    auto next = pinned.upper_bound((uint64_t)memory);
    return next != pinned.begin() && (--next, (uint64_t)memory < next->first + next->second);
}

static void finish_where(const std::function<bool(const Late&)>& due) {
    std::lock_guard lock(late_mutex);
    std::vector<Late> rest;
    for (const Late& copy : late) {
        if (due(copy)) {
            run(copy.stream, [&] { return driver::write(copy.to, copy.from, copy.bytes); });
        } else {
            rest.push_back(copy);
        }
    }

    late.swap(rest);
}

static void finish(Stream* stream) {
    finish_where([&](const Late& copy) { return copy.stream == stream; });
}

// Runs what was put off, up to a number of all that ever was.
static void make_up(Stream* stream, long number) {
    while (stream->made_up < number) {
        const auto work = std::move(stream->late.front());
        stream->late.pop_front();
        run(stream, work);
        stream->made_up++;
    }
}

Result driver::put_off(Stream* stream, std::function<Result()> work) {
    stream->late.push_back(std::move(work));
    stream->put_off++;
    return stream->failure;
}

Result driver::queue(Stream* stream, std::function<Result()> work) {
    if (stream->captures) {
        stream->captured.push_back(std::move(work));
        return Success;
    }

    if (!stream->late.empty()) {
        return put_off(stream, std::move(work));
    }

    finish(stream);
    return run(stream, work);
}

Result driver::queue_launch(
    Stream* stream, const emulator::Function& function, dim3 grid, unsigned threads, size_t shared_bytes, void** arguments) {
    std::vector<uint64_t> values;
    for (int i = 0; i < function.count && arguments[i]; i++) {
        values.push_back(0);
        memcpy(&values.back(), arguments[i], function.parameters[i].bytes);
    }

    return queue(stream, [=, &function]() mutable {
        std::vector<void*> pointers;
        for (uint64_t& value : values) {
            pointers.push_back(&value);
        }

        pointers.push_back(nullptr);
        return driver::launch(function, grid, threads, shared_bytes, pointers.data());
    });
}

static int environment(const char* name, int otherwise) {
    const char* value = getenv(name);
    return value ? atoi(value) : otherwise;
}

// What TINYLLAMA_CUDA_FAIL says: "cuLaunchKernel 100 719" lets 100 launches succeed, and from the next on 719 is the result.
int driver::planned_failure(const char* function) {
    static std::atomic<long> calls;
    const char* value = getenv("TINYLLAMA_CUDA_FAIL");
    char name[64];
    long successes;
    int error;
    if (!value || sscanf(value, "%63s %ld %d", name, &successes, &error) != 3 || strcmp(name, function) != 0 || calls++ < successes) {
        return 0;
    }

    return error;
}

extern "C" {

int cuInit(unsigned) {
    emulator::schedule = environment("TINYLLAMA_CUDA_SCHEDULE", 0);
    return planned_failure("cuInit");
}

int cuDriverGetVersion(int* version) {
    *version = environment("TINYLLAMA_CUDA_VERSION", 13000);
    return 0;
}

int cuDeviceGetCount(int* count) {
    *count = 1;
    return 0;
}

int cuDeviceGet(int* device, int) {
    *device = 0;
    return 0;
}

int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, length, "CUDA emulator");
    return 0;
}

// The attributes of one H200; its compute capability can be told otherwise.
int cuDeviceGetAttribute(int* value, int attribute, int) {
    const int capability = environment("TINYLLAMA_CUDA_CAPABILITY", 90);
    switch (attribute) {
        case 16: *value = 132; return 0;                 // multiprocessors
        case 75: *value = capability / 10; return 0;
        case 76: *value = capability % 10; return 0;
        case 97: *value = 227 << 10; return 0;           // shared memory of a block, opt-in
        default: return driver::InvalidValue;
    }
}

int cuDeviceTotalMem_v2(size_t* bytes, int) {
    size_t free;
    driver::memory_info(free, *bytes);
    return 0;
}

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    driver::memory_info(*free, *total);
    return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    *context = (void*)1;
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int) { return 0; }

static thread_local void* context_of_thread;

int cuCtxSetCurrent(void* context) {
    context_of_thread = context;
    return 0;
}

int cuStreamCreate(Stream** stream, unsigned) {
    *stream = new Stream;
    return 0;
}

int cuStreamDestroy_v2(Stream* stream) {
    finish(stream);
    make_up(stream, stream->put_off);
    delete stream;
    return 0;
}

// The stream that captures, if this thread began a capture: what other threads do meanwhile is free, as in the real
// mode CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, the only one that is emulated.
static thread_local Stream* capturing;
constexpr int capture_thread_local = 1;

int cuStreamSynchronize(Stream* stream) {
    if (stream->captures) {
        return driver::CaptureUnsupported;
    }

    finish(stream);
    make_up(stream, stream->put_off);
    return stream->failure;
}

// All that its stream was given until it was recorded.
struct Event {
    Stream* stream = nullptr;
    long put_off = 0;
};

int cuEventCreate(Event** event, unsigned) {
    *event = new Event;
    return 0;
}

int cuEventDestroy_v2(Event* event) {
    delete event;
    return 0;
}

int cuEventRecord(Event* event, Stream* stream) {
    event->stream = stream;
    event->put_off = stream->put_off;
    return stream->failure;
}

static Result wait(const Event* event) {
    if (!event->stream) {
        return driver::Success;
    }

    finish(event->stream);
    make_up(event->stream, event->put_off);
    return event->stream->failure;
}

int cuEventSynchronize(Event* event) { return event->stream && event->stream->captures ? driver::CaptureUnsupported : wait(event); }

int cuEventQuery(Event* event) {
    return !event->stream || event->stream->made_up >= event->put_off ? (int)driver::Success : (int)driver::NotReady;
}

// The stream waits by not returning, unless it has not come that far itself.
int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    if (stream->captures) {
        return driver::CaptureUnsupported;
    }

    return stream->late.empty() ? wait(event) : driver::put_off(stream, [event = *event] { return wait(&event); });
}

int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    std::lock_guard lock(late_mutex);
    *memory = malloc(bytes);
    pinned[(uint64_t)*memory] = bytes;
    return *memory ? 0 : driver::OutOfMemory;
}

int cuMemFreeHost(void* memory) {
    std::lock_guard lock(late_mutex);
    pinned.erase((uint64_t)memory);
    free(memory);
    return 0;
}

int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    return !context_of_thread ? driver::InvalidContext : capturing ? driver::CaptureUnsupported : driver::allocate(*address, bytes);
}

int cuMemFree_v2(uint64_t address) {
    if (capturing) {
        return driver::CaptureUnsupported;
    }

    finish_where([](const Late&) { return true; });
    return driver::release(address);
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* stream) {
    if (!context_of_thread) {
        return driver::InvalidContext;
    }

    if (stream->captures) {
        return driver::CaptureUnsupported;
    }

    {
        std::lock_guard lock(late_mutex);
        if (is_pinned(from)) {
            if (!driver::holds(to, bytes)) {
                return driver::InvalidValue;
            }

            late.push_back({stream, to, from, bytes});
            return stream->failure;
        }
    }

    return queue(stream, [=] { return driver::write(to, from, bytes); });
}

int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* stream) {
    return stream->captures ? driver::CaptureUnsupported : queue(stream, [=] { return driver::read(to, from, bytes); });
}

int cuMemsetD8Async(uint64_t to, uint8_t value, size_t bytes, Stream* stream) {
    return queue(stream, [=] { return driver::fill(to, value, bytes); });
}

int cuMemsetD2D8Async(uint64_t to, size_t pitch, uint8_t value, size_t width, size_t height, Stream* stream) {
    return queue(stream, [=] {
        Result result = driver::Success;
        for (size_t row = 0; row < height && result == driver::Success; row++) {
            result = driver::fill(to + row * pitch, value, width);
        }

        return result;
    });
}

// CUDA_MEMCPY2D.
struct Copy2D {
    size_t from_x, from_y;
    int from_type;
    const void* from_host;
    uint64_t from;
    void* from_array;
    size_t from_pitch;
    size_t to_x, to_y;
    int to_type;
    void* to_host;
    uint64_t to;
    void* to_array;
    size_t to_pitch;
    size_t width, height;
};

int cuMemcpy2DAsync_v2(const Copy2D* copy, Stream* stream) {
    constexpr int Device = 2;
    return queue(stream, [copy = *copy] {
        Result result = copy.from_type == Device && copy.to_type == Device ? driver::Success : driver::InvalidValue;
        for (size_t row = 0; row < copy.height && result == driver::Success; row++) {
            result = driver::copy(copy.to + row * copy.to_pitch, copy.from + row * copy.from_pitch, copy.width);
        }

        return result;
    });
}

int cuStreamBeginCapture_v2(Stream* stream, int mode) {
    if (capturing || mode != capture_thread_local) {
        return driver::InvalidValue;
    }

    stream->captures = true;
    capturing = stream;
    return 0;
}

// A graph, and one that can be launched, is the list of what was captured.
typedef std::vector<std::function<Result()>> Graph;

int cuStreamEndCapture(Stream* stream, Graph** graph) {
    if (!stream->captures) {
        return driver::InvalidValue;
    }

    *graph = new Graph(std::move(stream->captured));
    stream->captured.clear();
    stream->captures = false;
    capturing = nullptr;
    return 0;
}

int cuGraphInstantiateWithFlags(Graph** executable, const Graph* graph, unsigned long long) {
    *executable = new Graph(*graph);
    return 0;
}

int cuGraphLaunch(const Graph* executable, Stream* stream) {
    if (int error = planned_failure("cuGraphLaunch")) {
        stream->failure = (Result)error;
    }

    for (const auto& work : *executable) {
        if (const Result result = queue(stream, work)) {
            return result;
        }
    }

    return stream->failure;
}

int cuGraphDestroy(Graph* graph) {
    delete graph;
    return 0;
}

int cuGraphExecDestroy(Graph* executable) {
    delete executable;
    return 0;
}

// A module is a source; its image is the source's name, as nvrtcGetCUBIN below gives it.
int cuModuleLoadData(void** module, const char* image) {
    if (int error = planned_failure("cuModuleLoadData")) {
        return error;
    }

    for (emulator::Source* source : emulator::sources()) {
        if (strcmp(source->name, image) == 0) {
            *module = source;
            return 0;
        }
    }

    return driver::InvalidValue;
}

int cuModuleUnload(void*) { return 0; }

int cuModuleGetFunction(const void** function, const emulator::Source* module, const char* name) {
    for (const emulator::Function& candidate : module->functions) {
        if (strcmp(candidate.name, name) == 0) {
            *function = &candidate;
            return 0;
        }
    }

    return driver::NotFound;
}

int cuFuncGetAttribute(int* value, int, const emulator::Function*) {
    *value = 0;
    return 0;
}

// What a launch of a function may ask for, where it may be more than 48 KiB.
static std::mutex shared_mutex;
static std::map<const emulator::Function*, unsigned> shared_bytes_of;

int cuFuncSetAttribute(const emulator::Function* function, int attribute, int value) {
    constexpr int MaxDynamicSharedBytes = 8;
    std::lock_guard lock(shared_mutex);
    if (attribute == MaxDynamicSharedBytes) {
        shared_bytes_of[function] = value;
    }

    return 0;
}

static bool may_ask_for(const emulator::Function* function, unsigned shared_bytes) {
    std::lock_guard lock(shared_mutex);
    const auto found = shared_bytes_of.find(function);
    return shared_bytes <= (found == shared_bytes_of.end() ? 48u << 10 : found->second);
}

int cuLaunchKernel(
    const emulator::Function* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
    unsigned shared_bytes, Stream* stream, void** arguments, void**) {
    if (int error = planned_failure("cuLaunchKernel")) {
        stream->failure = (Result)error;
    }

    if (stream->failure != driver::Success) {
        return stream->failure;
    }

    if (!context_of_thread) {
        return driver::InvalidContext;
    }

    return threads_y != 1 || threads_z != 1 || !may_ask_for(function, shared_bytes)
        ? (int)driver::InvalidValue
        : (int)driver::queue_launch(stream, *function, {x, y, z}, threads, shared_bytes, arguments);
}

int cuGetErrorName(int error, const char** name) {
    auto found = names.find(error);
    *name = found == names.end() ? "CUDA_ERROR_UNKNOWN" : found->second;
    return 0;
}

}  // extern "C"

bool driver::has_context() { return context_of_thread != nullptr; }
