// The scheduler: a CUDA thread is a fiber, a block runs on one thread of the system. Built without the thread sanitizer,
// which is told instead what orders what: only launches, __syncthreads and __syncwarp do.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(EMULATOR_TSAN)
extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
}
#endif

namespace emulator {

int schedule = 0;
int os_threads = 2;

namespace {

constexpr size_t StackBytes = 64 << 10;
constexpr size_t MostShared = 227 << 10, MostStaticShared = 48 << 10;
constexpr unsigned Warp = 32, MostThreads = 1024;

enum class State { Ready, InCollective, AtBarrier, Done };

struct WarpOf32;

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    State state = State::Ready;
    unsigned index = 0;
    WarpOf32* warp = nullptr;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
    void* tsan = nullptr;
    bool started = false;
    void* fake_stack = nullptr;
};

struct WarpOf32 {
    Fiber* fibers[Warp];
    unsigned count = 0, live = 0, arrived = 0, parity = 0;
    const char* name = nullptr;
    Lane lanes[2][Warp];
};

struct SharedArray {
    const void* key;
    void* memory;
    size_t bytes;
};

struct Block {
    const Function* function;
    void** arguments;
    dim3 index, size, grid;
    size_t shared_bytes = 0;
    unsigned char* dynamic = nullptr;
    std::vector<SharedArray> arrays;
    std::vector<Fiber> fibers;
    std::vector<WarpOf32> warps;
    unsigned live = 0, arrived = 0;
    bool failed = false;
    void* stack_pointer = nullptr;
    void* tsan = nullptr;
    void* fake_stack = nullptr;
    const void* stack_bottom = nullptr;
    size_t stack_bytes = 0;
};

thread_local Block* block;
thread_local Fiber* current;

// ---- what the sanitizers must be told -----------------------------------------------------------------------------

#if defined(EMULATOR_TSAN)
constexpr bool InTurn = true;
void release(void* token) { __tsan_release(token); }
void acquire(void* token) { __tsan_acquire(token); }
void* create_tsan() { return __tsan_create_fiber(0); }
void switch_tsan(void* fiber, bool ordered) { __tsan_switch_to_fiber(fiber, ordered ? 0 : 1); }
void* current_tsan() { return __tsan_get_current_fiber(); }
#else
constexpr bool InTurn = false;
void release(void*) {}
void acquire(void*) {}
void* create_tsan() { return nullptr; }
void switch_tsan(void*, bool) {}
void* current_tsan() { return nullptr; }
#endif

#if defined(__SANITIZE_ADDRESS__)
void start_switch(void** save, const void* bottom, size_t bytes) { __sanitizer_start_switch_fiber(save, bottom, bytes); }
void finish_switch(void* saved, const void** bottom, size_t* bytes) { __sanitizer_finish_switch_fiber(saved, bottom, bytes); }
void unpoison(void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
#else
void start_switch(void**, const void*, size_t) {}
void finish_switch(void*, const void**, size_t*) {}
void unpoison(void*, size_t) {}
#endif

// ---- fibers -------------------------------------------------------------------------------------------------------

extern "C" void emulator_switch(void** save, void* to);
asm(R"(.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
 push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
 mov %rsp,(%rdi); mov %rsi,%rsp
 pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
 ret
)");

void to_scheduler() {
    Fiber* me = current;
    start_switch(me->state == State::Done ? nullptr : &me->fake_stack, block->stack_bottom, block->stack_bytes);
    switch_tsan(block->tsan, false);
    emulator_switch(&me->stack_pointer, block->stack_pointer);
    finish_switch(me->fake_stack, &block->stack_bottom, &block->stack_bytes);
}

void to_fiber(Fiber& fiber) {
    current = &fiber;
    start_switch(&block->fake_stack, fiber.stack, StackBytes);
    switch_tsan(fiber.tsan, !fiber.started);
    fiber.started = true;
    emulator_switch(&block->stack_pointer, fiber.stack_pointer);
    finish_switch(block->fake_stack, nullptr, nullptr);
}

void leave_barrier() {
    block->arrived = 0;
    for (Fiber& fiber : block->fibers) {
        if (fiber.state == State::AtBarrier) {
            fiber.state = State::Ready;
        }
    }
}

void fiber_main() {
    finish_switch(nullptr, &block->stack_bottom, &block->stack_bytes);
    block->function->call(block->arguments);
    Fiber* me = current;
    me->warp->live--;
    block->live--;
    if (me->warp->arrived > 0) {
        fail("a lane ended while others of its warp wait in a collective");
    }

    me->state = State::Done;
    release(&block->live);
    if (block->live > 0 && block->arrived == block->live) {
        leave_barrier();
    }

    to_scheduler();
    abort();
}

/// What a thread of the system needs to run blocks; kept for the next launch, because it is slow to make.
struct Worker {
    char* stacks = (char*)mmap(
        nullptr, MostThreads * StackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    std::vector<void*> tsan;
};

std::mutex idle_mutex;
std::vector<std::unique_ptr<Worker>> idle;

std::unique_ptr<Worker> take_worker() {
    std::lock_guard lock(idle_mutex);
    if (idle.empty()) {
        return std::make_unique<Worker>();
    }

    std::unique_ptr<Worker> worker = std::move(idle.back());
    idle.pop_back();
    return worker;
}

void give_worker(std::unique_ptr<Worker> worker) {
    std::lock_guard lock(idle_mutex);
    idle.push_back(std::move(worker));
}

void prepare(Fiber& fiber, unsigned index, Worker& worker) {
    fiber.state = State::Ready;
    fiber.index = index;
    fiber.warp = &block->warps[index / Warp];
    fiber.warp->fibers[fiber.warp->count++] = &fiber;
    fiber.warp->live++;
    fiber.groups.clear();
    fiber.open.clear();
    fiber.stack = worker.stacks + index * StackBytes;
    fiber.started = false;
    if (index == worker.tsan.size()) {
        worker.tsan.push_back(create_tsan());
    }

    fiber.tsan = worker.tsan[index];
    unpoison(fiber.stack, StackBytes);
    void** top = (void**)(fiber.stack + StackBytes - 64);
    *--top = nullptr;
    *--top = (void*)fiber_main;
    for (int saved = 0; saved < 6; saved++) {
        *--top = nullptr;
    }

    fiber.stack_pointer = top;
}

void* allocate_shared(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, bytes) != 0) {
        abort();
    }

    fill(memory, 0xff, bytes);
    return memory;
}

void run_block(Block& b, Worker& worker, std::mt19937& random) {
    block = &b;
    b.tsan = current_tsan();
    const unsigned threads = b.size.x;
    b.dynamic = b.shared_bytes > 0 ? (unsigned char*)allocate_shared(b.shared_bytes) : nullptr;
    b.fibers.resize(threads);
    b.warps.assign((threads + Warp - 1) / Warp, WarpOf32{});
    b.live = threads;
    b.arrived = 0;
    std::vector<unsigned> order(threads);
    for (unsigned i = 0; i < threads; i++) {
        prepare(b.fibers[i], i, worker);
        order[i] = schedule == 1 ? threads - 1 - i : i;
    }

    while (b.live > 0 && !b.failed) {
        if (schedule > 1) {
            std::shuffle(order.begin(), order.end(), random);
        }

        bool any = false;
        for (unsigned i : order) {
            if (b.fibers[i].state == State::Ready && !b.failed) {
                any = true;
                to_fiber(b.fibers[i]);
            }
        }

        if (!any && !b.failed) {
            unsigned in_collective = 0;
            for (Fiber& fiber : b.fibers) {
                in_collective += fiber.state == State::InCollective;
            }

            fprintf(
                stderr, "emulator: %s: deadlock in block (%u, %u, %u): %u threads wait in a collective, %u at __syncthreads\n",
                b.function->name, b.index.x, b.index.y, b.index.z, in_collective, b.arrived);
            b.failed = true;
        }
    }

    acquire(&b.live);
    free(b.dynamic);
    for (SharedArray& array : b.arrays) {
        free(array.memory);
    }

    b.arrays.clear();
}

void leave_collective(WarpOf32& warp) {
    warp.arrived = 0;
    warp.name = nullptr;
    for (unsigned i = 0; i < warp.count; i++) {
        if (warp.fibers[i]->state == State::InCollective) {
            warp.fibers[i]->state = State::Ready;
        }
    }
}

}  // namespace

// ---- kernels and their launch -------------------------------------------------------------------------------------

static std::vector<Source*>& registry() {
    static std::vector<Source*> all;
    return all;
}

Source::Source(const char* name, const char* text, size_t length, std::vector<Function> functions)
    : name(name), text(text), length(length), functions(std::move(functions)) {
    registry().push_back(this);
}

const std::vector<Source*>& sources() { return registry(); }

const Function* find(const char* name) {
    for (const Source* source : sources()) {
        for (const Function& function : source->functions) {
            if (strcmp(function.name, name) == 0) {
                return &function;
            }
        }
    }

    return nullptr;
}

bool launch(const Function& function, dim3 grid, unsigned threads, size_t shared_bytes, void** arguments) {
    for (int i = 0; i <= function.count; i++) {
        if ((arguments[i] == nullptr) != (i == function.count)) {
            fprintf(stderr, "emulator: %s: called with another number of arguments than %d\n", function.name, function.count);
            return false;
        }
    }

    if (function.threads == 0) {
        function.call(arguments);
        return true;
    }

    const unsigned long long blocks = (unsigned long long)grid.x * grid.y * grid.z;
    if (threads == 0 || threads > MostThreads || (int)threads > function.threads || threads % Warp != 0 || blocks == 0
        || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || shared_bytes > MostShared) {
        fprintf(
            stderr, "emulator: %s: a launch of (%u, %u, %u) blocks of %u threads with %zu bytes of shared memory; at most %d threads, whole warps, (2^31 - 1, 65535, 65535) blocks and %zu bytes\n",
            function.name, grid.x, grid.y, grid.z, threads, shared_bytes, function.threads, MostShared);
        return false;
    }

    // Blocks go to whom is free; where races between blocks are looked for, in turn, so that neighbours have no order.
    std::atomic<unsigned long long> next{0};
    std::atomic<bool> failed{false};
    auto work = [&](int number) {
        std::unique_ptr<Worker> worker = take_worker();
        Block b;
        b.function = &function;
        b.arguments = arguments;
        b.size = {threads, 1, 1};
        b.grid = grid;
        b.shared_bytes = shared_bytes;
        std::mt19937 random(schedule * 7919 + number);
        for (unsigned long long turn = 0, i; !failed && (i = InTurn ? turn++ * os_threads + number : next++) < blocks;) {
            const unsigned long long j = schedule == 1 ? blocks - 1 - i : i;
            b.index = {(unsigned)(j % grid.x), (unsigned)(j / grid.x % grid.y), (unsigned)(j / grid.x / grid.y)};
            run_block(b, *worker, random);
            failed = failed || b.failed;
        }

        give_worker(std::move(worker));
    };
    std::vector<std::thread> others;
    for (int number = 1; number < os_threads && (unsigned)number < blocks; number++) {
        others.emplace_back(work, number);
    }

    work(0);
    for (std::thread& other : others) {
        other.join();
    }

    return !failed;
}

// ---- what a CUDA thread calls -------------------------------------------------------------------------------------

dim3 thread_index() { return {current->index, 0, 0}; }
dim3 block_index() { return block->index; }
dim3 block_size() { return block->size; }
dim3 grid_size() { return block->grid; }
int lane() { return current->index % Warp; }
unsigned char* dynamic_shared() { return block->dynamic; }

// Not memset: the thread sanitizer would take it for an access of the CUDA thread, and a slow one.
void fill(void* memory, uint8_t value, size_t bytes) {
    asm volatile("rep stosb" : "+D"(memory), "+c"(bytes) : "a"(value) : "memory");
}

void fail(const char* message) {
    const dim3 i = block->index;
    fprintf(stderr, "emulator: %s: %s: block (%u, %u, %u), thread %u\n", block->function->name, message, i.x, i.y, i.z, current->index);
    block->failed = true;
    current->state = State::Done;
    release(&block->live);
    to_scheduler();
    abort();
}

void* shared(const void* key, size_t bytes) {
    size_t total = bytes;
    for (SharedArray& array : block->arrays) {
        if (array.key == key) {
            acquire(array.memory);
            return array.memory;
        }

        total += array.bytes;
    }

    if (total > MostStaticShared || total + block->shared_bytes > MostShared) {
        fail("more shared memory than a block may have");
    }

    block->arrays.push_back({key, allocate_shared(bytes), bytes});
    release(block->arrays.back().memory);
    return block->arrays.back().memory;
}

void barrier() {
    release(block);
    if (++block->arrived == block->live) {
        leave_barrier();
    } else {
        current->state = State::AtBarrier;
        to_scheduler();
    }

    acquire(block);
}

Lane collective(const char* name, unsigned mask, const Lane& in, bool orders_memory, void (*all)(Lane*)) {
    WarpOf32& warp = *current->warp;
    const unsigned parity = warp.parity & 1;
    if (mask != ~0u) {
        fail("a collective of part of a warp");
    }

    if (warp.live != Warp) {
        fail("a collective of a warp with lanes that have ended");
    }

    if (warp.name && strcmp(warp.name, name) != 0) {
        fail("the lanes of a warp are in different collectives");
    }

    warp.name = name;
    warp.lanes[parity][lane()] = in;
    if (orders_memory) {
        release(&warp);
    }

    if (++warp.arrived == Warp) {
        if (all) {
            all(warp.lanes[parity]);
        }

        warp.parity++;
        leave_collective(warp);
    } else {
        current->state = State::InCollective;
        to_scheduler();
    }

    if (orders_memory) {
        acquire(&warp);
    }

    return warp.lanes[parity][lane()];
}

uint64_t shuffle(const char* name, unsigned mask, uint64_t value, int source) {
    Lane in{};
    in.value = value;
    WarpOf32& warp = *current->warp;
    const unsigned parity = warp.parity & 1;
    collective(name, mask, in, false, nullptr);
    return warp.lanes[parity][source < 0 || source >= (int)Warp ? lane() : source].value;
}

unsigned ballot(unsigned mask, bool predicate) {
    Lane in{};
    in.value = predicate;
    return collective("__ballot_sync", mask, in, false, [](Lane* lanes) {
        uint32_t bits = 0;
        for (unsigned l = 0; l < Warp; l++) {
            bits |= (uint32_t)lanes[l].value << l;
        }

        for (unsigned l = 0; l < Warp; l++) {
            lanes[l].r[0] = bits;
        }
    }).r[0];
}

void copy_queue(const Copy& copy) { current->open.push_back(copy); }

void copy_close() {
    current->groups.push_back(std::move(current->open));
    current->open.clear();
}

bool copy_next(int open_groups, Copy& copy) {
    auto& groups = current->groups;
    while ((int)groups.size() > open_groups) {
        if (!groups.front().empty()) {
            copy = groups.front().front();
            groups.front().erase(groups.front().begin());
            return true;
        }

        groups.erase(groups.begin());
    }

    return false;
}

}  // namespace emulator
