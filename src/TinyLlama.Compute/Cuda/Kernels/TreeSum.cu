#include "Device.cuh"

// sum[i] = the pairwise tree over parts[0][i], parts[1][i], …: (0 + 1) + (2 + 3) …, a power of two of them, at most 1,024, `count` elements
// from one to the next. Left sums wait in a slot of their level, as carries do in a binary counter; unrolled, they wait in registers.
template<class T>
__device__ __forceinline__ void tree_sum(float* sum, const T* parts, i64 count, int number) {
    constexpr int most_levels = 11;
    for (i64 i = (i64)blockIdx.x * 256 + threadIdx.x; i < count; i += (i64)gridDim.x * 256) {
        float waiting[most_levels] = {};
        float x = 0;
        for (int part = 0; part < number; part++) {
            x = to_float(parts[part * count + i]);
            bool carries = true;
#pragma unroll
            for (int level = 0; level < most_levels; level++) {
                const bool waits = part >> level & 1;
                const float both = waiting[level] + x;
                waiting[level] = carries && !waits ? x : waiting[level];
                carries = carries && waits;
                x = carries ? both : x;
            }
        }

        sum[i] = x;
    }
}

KERNEL(256) void tree_sum_f32(float* sum, const float* parts, i64 count, int number) { tree_sum(sum, parts, count, number); }

KERNEL(256) void tree_sum_bf16(float* sum, const bf16* parts, i64 count, int number) { tree_sum(sum, parts, count, number); }
