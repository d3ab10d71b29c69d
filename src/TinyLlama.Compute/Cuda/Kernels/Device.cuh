// What all kernels share. The dialect is the one that NVRTC, clang and, for the emulator, g++ take: no headers, kernels
// without templates of their own, all arithmetic in fp32, every PTX instruction in this file and nowhere else.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef CUDA_EMULATOR

// A kernel of at most so many threads a block: KERNEL(256) void name(…), at the start of a line.
#define KERNEL(...) extern "C" __global__ __launch_bounds__(__VA_ARGS__)

// Memory of the block: an array of known size, or what the launch asked for.
#define SHARED(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

// The bits of a float rounded to nearest, ties to even.
__device__ __forceinline__ u16 bf16_from_float(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ u32 pack_bf16x2(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ u16 f16_from_float(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float float_from_f16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// To the nearest whole number, ties to even.
__device__ __forceinline__ int round_to_int(float value) {
    int whole;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(whole) : "f"(value));
    return whole;
}

// 2ˣ and log₂ x to about 2 units in the last place, without a call.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Where shared memory is for the instructions below.
typedef u32 SharedAddress;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
    u32 address;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(address) : "l"(pointer));
    return address;
}

// d += a · b of a warp, (16, 16) · (16, 8) in bf16 with fp32 sums; the fragments are those of PTX's mma.m16n8k16.row.col.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 × 8 matrices of 16 bits from shared memory; lane 8m + i gives the address of row i of matrix m.
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

// Copies 16 bytes to shared memory, the first of them from global memory and zeros for the rest; there after a wait and a barrier.
__device__ __forceinline__ void cp_async_16(SharedAddress to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void store_shared_4(SharedAddress to, u32 word) {
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(to), "r"(word) : "memory");
}

__device__ __forceinline__ void store_shared_16(SharedAddress to, const u32 (&words)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" :: "r"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}

// Adds to two neighbours in global memory, at a multiple of 8 bytes; nothing is lost of what others add, in whatever order they come.
__device__ __forceinline__ void atomic_add(float* to, float x, float y) {
#if __CUDA_ARCH__ >= 900 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
    asm volatile("red.global.add.v2.f32 [%0], {%1,%2};" :: "l"(to), "f"(x), "f"(y) : "memory");
#else
    asm volatile("red.global.add.f32 [%0], %1;" :: "l"(to), "f"(x) : "memory");
    asm volatile("red.global.add.f32 [%0], %1;" :: "l"(to + 1), "f"(y) : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups are under way.
template<int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

#endif

struct bf16 {
    u16 bits;
};

struct f16 {
    u16 bits;
};

// What one instruction loads or stores, at a multiple of its size.
struct alignas(16) F32x4 {
    float v[4];
};

struct alignas(8) Words2 {
    u32 v[2];
};

struct alignas(16) Words4 {
    u32 v[4];
};

struct alignas(16) Bf16x8 {
    bf16 v[8];
};

struct alignas(16) F16x8 {
    f16 v[8];
};

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float to_float(f16 x) { return float_from_f16(x.bits); }

__device__ __forceinline__ void store(float& to, float x) { to = x; }
__device__ __forceinline__ void store(bf16& to, float x) { to.bits = bf16_from_float(x); }
__device__ __forceinline__ void store(f16& to, float x) { to.bits = f16_from_float(x); }

// Eight neighbours, the first of them at a multiple of 16 bytes.
__device__ __forceinline__ void load(float (&x)[8], const float* from) {
    const F32x4 low = *(const F32x4*)from, high = *(const F32x4*)(from + 4);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        x[k] = low.v[k];
        x[4 + k] = high.v[k];
    }
}

__device__ __forceinline__ void load(float (&x)[8], const bf16* from) {
    const Bf16x8 eight = *(const Bf16x8*)from;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        x[k] = to_float(eight.v[k]);
    }
}

__device__ __forceinline__ void load(float (&x)[8], const f16* from) {
    const F16x8 eight = *(const F16x8*)from;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        x[k] = to_float(eight.v[k]);
    }
}

__device__ __forceinline__ void store(float* to, const float (&x)[8]) {
    F32x4 low, high;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        low.v[k] = x[k];
        high.v[k] = x[4 + k];
    }

    *(F32x4*)to = low;
    *(F32x4*)(to + 4) = high;
}

__device__ __forceinline__ void store(bf16* to, const float (&x)[8]) {
    Bf16x8 eight;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        store(eight.v[k], x[k]);
    }

    *(Bf16x8*)to = eight;
}

// eˣ.
__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * 1.4426950408889634f); }

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(~0u, value, distance);
    }

    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(~0u, value, distance));
    }

    return value;
}

// The sum over the first warps of the block, as many for all threads of a warp, in one fixed tree; all threads must come here.
__device__ __forceinline__ float sum_of_warps(float value, int count) {
    SHARED(float, warps, 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    value = warp_sum(value);
    __syncthreads();  // the sums of the call before have been read
    if (lane == 0) {
        warps[warp] = value;
    }

    __syncthreads();
    return warp_sum(lane < count ? warps[lane] : 0.0f);
}

// The sum over the block, known to every thread.
__device__ __forceinline__ float block_sum(float value) { return sum_of_warps(value, (int)blockDim.x / 32); }

// The largest of the block, as block_sum.
__device__ __forceinline__ float block_max(float value) {
    SHARED(float, warps, 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    value = warp_max(value);
    __syncthreads();  // those of the call before have been read
    if (lane == 0) {
        warps[warp] = value;
    }

    __syncthreads();
    return warp_max(lane < (int)blockDim.x / 32 ? warps[lane] : -infinity());
}
