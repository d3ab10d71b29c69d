// The instructions that read and write memory on behalf of a lane. Built with the sanitizers, so that they see its accesses.
#include "emulator.h"

namespace emulator {
void distribute(bool transposed, const Lane& in, uint32_t (&r)[4]);
}

static void ldmatrix(bool transposed, uint32_t (&r)[4], const void* row) {
    if ((uintptr_t)row % 16 != 0) {
        emulator::fail("ldmatrix: the address of a row is no multiple of 16");
    }

    emulator::Lane in{};
    for (int i = 0; i < 4; i++) {
        in.a[i] = ((const uint32_t*)row)[i];
    }

    emulator::distribute(transposed, in, r);
}

void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) { ldmatrix(false, r, (const void*)row); }
void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) { ldmatrix(true, r, (const void*)row); }

static void add(float* to, float x) {
    float before;
    __atomic_load(to, &before, __ATOMIC_RELAXED);
    for (float after = before + x; !__atomic_compare_exchange(to, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);) {
        after = before + x;
    }
}

void atomic_add(float* to, float x, float y) {
    if ((uintptr_t)to % 8 != 0) {
        emulator::fail("red: the address of two floats is no multiple of 8");
    }

    add(to, x);
    add(to + 1, y);
}

// What arrives is there after the wait that covers it, and NaN until then.
void cp_async_16(SharedAddress to, const void* from, int bytes) {
    if ((to | (uintptr_t)from) % 16 != 0) {
        emulator::fail("cp.async: an address is no multiple of 16");
    }

    volatile uint32_t* poisoned = (volatile uint32_t*)to;
    for (int i = 0; i < 4; i++) {
        poisoned[i] = ~0u;
    }

    emulator::copy_queue({(void*)to, from, bytes});
}

void cp_async_commit() { emulator::copy_close(); }

void cp_async_wait_group(int open_groups) {
    for (emulator::Copy copy; emulator::copy_next(open_groups, copy);) {
        volatile uint32_t* to = (volatile uint32_t*)copy.to;
        const volatile uint32_t* from = (const volatile uint32_t*)copy.from;
        for (int i = 0; i < 4; i++) {
            to[i] = i * 4 < copy.bytes ? from[i] : 0u;
        }
    }
}
