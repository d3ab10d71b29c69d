#include "Device.cuh"

// Rotates the pairs (i, i + D/2) of every head, in place, by the row of cosines and sines of the token's position. A thread
// rotates eight neighbouring pairs; sign -1 turns back.
KERNEL(256) void rope(
    bf16* heads, i64 stride, const int* positions, const float* table, i64 table_stride, int rows, int head_count, int head_dim, float sign) {
    const int half = head_dim / 2, eights = half / 8, row_threads = head_count * eights;
    const i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x, n = index / row_threads;
    if (n >= rows) {
        return;
    }

    const int within = (int)(index % row_threads), i = within % eights * 8;
    bf16* x = heads + n * stride + within / eights * head_dim + i;
    const float* cosines = table + positions[n] * table_stride + i;
    float a[8], b[8], c[8], s[8], turned_a[8], turned_b[8];
    load(a, x);
    load(b, x + half);
    load(c, cosines);
    load(s, cosines + half);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const float sine = s[k] * sign;
        turned_a[k] = fmaf(a[k], c[k], -(b[k] * sine));
        turned_b[k] = fmaf(b[k], c[k], a[k] * sine);
    }

    store(x, turned_a);
    store(x + half, turned_b);
}
