#include "Device.cuh"

// An entry is a number that orders logits, of equal ones the smaller column first; no two of a row are equal. Its upper 32 bits
// order as logits do, what is not a number above all, the lower ones against columns.
constexpr int ColumnBits = 20;

__device__ __forceinline__ u64 entry_of(float logit, int column) {
    const u32 bits = logit == 0.0f ? 0u : __float_as_uint(logit);  // -0 is as large as 0
    const u32 order = logit != logit ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
    return (u64)order << ColumnBits | (u32)((1 << ColumnBits) - 1 - column);
}

// A number that exactly `count` entries of the row reach, found from the highest bit on; known to every thread.
__device__ __forceinline__ u64 threshold_of(const float* row, int vocabulary, int count) {
    u64 threshold = 0;
    float reached = 0.0f;
    for (int bit = 31 + ColumnBits; bit >= 0 && reached != (float)count; bit--) {
        const u64 higher = threshold | (u64)1 << bit;
        int mine = 0;
        for (int v = threadIdx.x; v < vocabulary; v += blockDim.x) {
            mine += entry_of(row[v], v) >= higher;
        }

        const float all = block_sum((float)mine);  // exact: fewer than 2²⁴
        if (all >= (float)count) {
            threshold = higher;
            reached = all;
        }
    }

    return threshold;
}

// The sum over the lanes of the warp that come before this one.
__device__ __forceinline__ float sum_of_lanes_before(float value) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const float before = __shfl_sync(~0u, value, max(lane - distance, 0));
        value += lane >= distance ? before : 0.0f;
    }

    const float before = __shfl_sync(~0u, value, max(lane - 1, 0));
    return lane > 0 ? before : 0.0f;
}

// Row n of top: the `count` largest logits of row n, their columns, and Σ exp((logit - largest) · inverse temperature) over the
// other logits to the left of each; then that sum over all others, and the same at temperature 1. A block is a row, a warp owns
// neighbouring columns, and all is in the order of columns.
KERNEL(1024) void top_logits(float* top, const float* logits, i64 stride, const float* inverse_temperatures, int vocabulary, int count) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const float* row = logits + blockIdx.x * stride;
    top += (i64)blockIdx.x * (3 * count + 2);
    const u64 threshold = threshold_of(row, vocabulary, count);

    float largest = -infinity();
    for (int v = threadIdx.x; v < vocabulary; v += blockDim.x) {
        largest = fmaxf(largest, row[v]);
    }

    largest = block_max(largest);
    const float scale = inverse_temperatures[blockIdx.x] * 1.4426950408889634f;
    const int columns = ((vocabulary + warps - 1) / warps + 31) / 32 * 32, first = warp * columns, end = min(first + columns, vocabulary);
    int winners = 0;
    float others = 0.0f, others_at_one = 0.0f;
    for (int v = first + lane; v < end; v += 32) {
        const float x = row[v];
        if (entry_of(x, v) >= threshold) {
            winners++;
        } else {
            others += exp2_approx((x - largest) * scale);
            others_at_one += exp_approx(x - largest);
        }
    }

    int place = (int)sum_of_warps((float)winners, warp);
    const float before = sum_of_warps(others, warp);
    float passed = 0.0f;
    for (int tile = first; tile < end; tile += 32) {
        const int v = tile + lane;
        const float x = v < end ? row[v] : -infinity();
        const bool wins = v < end && entry_of(x, v) >= threshold;
        const float other = wins || v >= end ? 0.0f : exp2_approx((x - largest) * scale);
        const u32 winning = __ballot_sync(~0u, wins);
        if (winning != 0) {
            const float left = before + warp_sum(passed) + sum_of_lanes_before(other);
            if (wins) {
                float* to = top + place + __popc(winning & ((1u << lane) - 1));
                to[0] = x;
                to[count] = (float)v;
                to[2 * count] = left;
            }

            place += __popc(winning);
        }

        passed += other;
    }

    others = block_sum(others);
    others_at_one = block_sum(others_at_one);
    if (threadIdx.x == 0) {
        top[3 * count] = others;
        top[3 * count + 1] = others_at_one;
    }
}
