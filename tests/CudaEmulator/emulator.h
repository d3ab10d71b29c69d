// Runs CUDA kernels on the CPU, for tests only: README.md says how. A kernel source is included after this header and sees
// CUDA's names; the PTX instructions that Device.cuh wraps for a GPU are functions of the same names here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define CUDA_EMULATOR
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define KERNEL(...) static
#define SHARED(type, name, count) \
    static char name##_key; \
    type* const name = (type*)emulator::shared(&name##_key, sizeof(type) * (count))
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared()

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

/// A parameter of a function that a launch can name.
struct Parameter {
    uint8_t bytes;
    bool pointer;
};

/// A kernel, or a function of the host that takes its arguments like one (threads = 0).
struct Function {
    const char* name;
    int threads;  // the most a block may have
    const Parameter* parameters;
    int count;
    void (*call)(void** arguments);
};

/// The functions of one source; as what a module of it holds.
struct Source {
    const char* name;
    const char* text;
    size_t length;
    std::vector<Function> functions;

    Source(const char* name, const char* text, size_t length, std::vector<Function> functions);
};

const std::vector<Source*>& sources();
const Function* find(const char* name);

template<auto F> struct Signature;

template<class... A, void (*F)(A...)> struct Signature<F> {
    static constexpr int count = sizeof...(A);
    static constexpr Parameter parameters[count] = {{(uint8_t)sizeof(A), std::is_pointer_v<A>}...};

    static void call(void** arguments) { spread(arguments, std::index_sequence_for<A...>{}); }

private:
    template<size_t... I> static void spread(void** arguments, std::index_sequence<I...>) {
        F(*(std::remove_cv_t<A>*)arguments[I]...);
    }
};

/// A function under its name in the table of its source.
template<auto F> Function function(const char* name, int threads) {
    using S = Signature<F>;
    return {name, threads, S::parameters, S::count, S::call};
}

/// Runs every block of a grid; false, with a line on stderr, where a kernel breaks a rule of CUDA.
bool launch(const Function& function, dim3 grid, unsigned threads, size_t shared_bytes, void** arguments);

extern int schedule;    // the order of blocks and of threads: 0 ascending, 1 descending, else the seed of a random one
extern int os_threads;  // on which blocks run

void fill(void* memory, uint8_t value, size_t bytes);

[[noreturn]] void fail(const char* message);
unsigned char* dynamic_shared();
void* shared(const void* key, size_t bytes);

/// What a lane hands to the warp, and gets back.
struct Lane {
    uint32_t a[4], b[2], r[4];
    float d[4];
    uint64_t value;
};

Lane collective(const char* name, unsigned mask, const Lane& in, bool orders_memory, void (*all)(Lane*));
uint64_t shuffle(const char* name, unsigned mask, uint64_t value, int source);
unsigned ballot(unsigned mask, bool predicate);
int lane();

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

void copy_queue(const Copy& copy);
void copy_close();
bool copy_next(int open_groups, Copy& copy);

template<class T> T shuffle(const char* name, unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = shuffle(name, mask, bits, source);
    memcpy(&value, &bits, sizeof value);
    return value;
}

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
void barrier();

inline uint16_t bf16_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float bf16_value(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

inline void __syncthreads() { emulator::barrier(); }

inline void __syncwarp(unsigned mask = ~0u) { emulator::collective("__syncwarp", mask, {}, true, nullptr); }

template<class T> T __shfl_xor_sync(unsigned mask, T value, int distance) {
    return emulator::shuffle("__shfl_xor_sync", mask, value, emulator::lane() ^ distance);
}

template<class T> T __shfl_down_sync(unsigned mask, T value, int distance) {
    return emulator::shuffle("__shfl_down_sync", mask, value, emulator::lane() + distance);
}

template<class T> T __shfl_sync(unsigned mask, T value, int source) {
    return emulator::shuffle("__shfl_sync", mask, value, source & 31);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) { return (unsigned)emulator::ballot(mask, predicate != 0); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// What Device.cuh says of each.
inline uint16_t bf16_from_float(float value) { return emulator::bf16_bits(value); }
inline uint32_t pack_bf16x2(float low, float high) {
    return (uint32_t)emulator::bf16_bits(low) | ((uint32_t)emulator::bf16_bits(high) << 16);
}
inline uint16_t f16_from_float(float value) {
    const _Float16 half = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
inline float float_from_f16(uint16_t bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}
inline int round_to_int(float value) { return (int)lrintf(value); }
inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
typedef uintptr_t SharedAddress;
inline SharedAddress shared_address(const void* pointer) { return (SharedAddress)pointer; }
void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row);
void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row);
void cp_async_16(SharedAddress to, const void* from, int bytes);
void atomic_add(float* to, float x, float y);
inline void store_shared_4(SharedAddress to, uint32_t word) { memcpy((void*)to, &word, 4); }
inline void store_shared_16(SharedAddress to, const uint32_t (&words)[4]) { memcpy((void*)to, words, 16); }
void cp_async_commit();
void cp_async_wait_group(int open_groups);
template<int N> void cp_async_wait() { cp_async_wait_group(N); }
