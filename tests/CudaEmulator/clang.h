// CUDA's names for clang without a CUDA toolkit: enough to compile the kernels to PTX, as a check of them.
#pragma once
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))

#define EVERYWHERE static __device__ __forceinline__

// threadIdx and its like: properties that read a special register.
#define SPECIAL_REGISTER(type, name) \
    struct type { \
        __declspec(property(get = get_x)) unsigned x; \
        __declspec(property(get = get_y)) unsigned y; \
        __declspec(property(get = get_z)) unsigned z; \
        EVERYWHERE unsigned get_x() { return __nvvm_read_ptx_sreg_##name##_x(); } \
        EVERYWHERE unsigned get_y() { return __nvvm_read_ptx_sreg_##name##_y(); } \
        EVERYWHERE unsigned get_z() { return __nvvm_read_ptx_sreg_##name##_z(); } \
    };
SPECIAL_REGISTER(ThreadIndex, tid)
SPECIAL_REGISTER(BlockIndex, ctaid)
SPECIAL_REGISTER(BlockSize, ntid)
SPECIAL_REGISTER(GridSize, nctaid)
extern const __device__ __attribute__((weak)) ThreadIndex threadIdx;
extern const __device__ __attribute__((weak)) BlockIndex blockIdx;
extern const __device__ __attribute__((weak)) BlockSize blockDim;
extern const __device__ __attribute__((weak)) GridSize gridDim;

EVERYWHERE void __syncwarp(unsigned mask = ~0u) { __nvvm_bar_warp_sync(mask); }
EVERYWHERE unsigned __ballot_sync(unsigned mask, int predicate) { return __nvvm_vote_ballot_sync(mask, predicate); }
EVERYWHERE int __ffs(int bits) { return __builtin_ffs(bits); }
EVERYWHERE int __popc(unsigned bits) { return __builtin_popcount(bits); }
EVERYWHERE unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
EVERYWHERE float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
EVERYWHERE float __shfl_xor_sync(unsigned mask, float value, int distance) {
    return __nvvm_shfl_sync_bfly_f32(mask, value, distance, 0x1f);
}
EVERYWHERE unsigned __shfl_xor_sync(unsigned mask, unsigned value, int distance) {
    return __nvvm_shfl_sync_bfly_i32(mask, value, distance, 0x1f);
}
EVERYWHERE int __shfl_xor_sync(unsigned mask, int value, int distance) {
    return __nvvm_shfl_sync_bfly_i32(mask, value, distance, 0x1f);
}
EVERYWHERE float __shfl_sync(unsigned mask, float value, int source) {
    return __nvvm_shfl_sync_idx_f32(mask, value, source, 0x1f);
}
EVERYWHERE int __shfl_sync(unsigned mask, int value, int source) {
    return __nvvm_shfl_sync_idx_i32(mask, value, source, 0x1f);
}
EVERYWHERE float __shfl_down_sync(unsigned mask, float value, int distance) {
    return __nvvm_shfl_sync_down_f32(mask, value, distance, 0x1f);
}
EVERYWHERE float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
EVERYWHERE float fminf(float a, float b) { return __builtin_fminf(a, b); }
EVERYWHERE float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EVERYWHERE float fabsf(float x) { return __builtin_fabsf(x); }
EVERYWHERE float rintf(float x) { return __builtin_rintf(x); }
EVERYWHERE float sqrtf(float x) { return __nvvm_sqrt_rn_f(x); }
EVERYWHERE double sqrt(double x) { return __nvvm_sqrt_rn_d(x); }
EVERYWHERE int min(int a, int b) { return a < b ? a : b; }
EVERYWHERE int max(int a, int b) { return a > b ? a : b; }
