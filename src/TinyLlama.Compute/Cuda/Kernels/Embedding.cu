#include "Device.cuh"

// output row n = table row tokens[n]; a block is a row. Eight channels a thread at a time.
template<class T>
__device__ __forceinline__ void look_up(bf16* output, i64 output_stride, const T* table, i64 table_stride, const int* tokens, int channels) {
    const i64 n = blockIdx.x, row = tokens[n];
    for (int c = threadIdx.x * 8; c < channels; c += blockDim.x * 8) {
        float x[8];
        load(x, table + row * table_stride + c);
        store(output + n * output_stride + c, x);
    }
}

KERNEL(256) void embedding_f32(bf16* output, i64 output_stride, const float* table, i64 table_stride, const int* tokens, int channels) {
    look_up(output, output_stride, table, table_stride, tokens, channels);
}

KERNEL(256) void embedding_bf16(bf16* output, i64 output_stride, const bf16* table, i64 table_stride, const int* tokens, int channels) {
    look_up(output, output_stride, table, table_stride, tokens, channels);
}

KERNEL(256) void embedding_f16(bf16* output, i64 output_stride, const f16* table, i64 table_stride, const int* tokens, int channels) {
    look_up(output, output_stride, table, table_stride, tokens, channels);
}

// dTable row tokens[n] += dOutput row n, n ascending. Block (n, y) is the only one that adds to the row of its token, if the
// token occurs nowhere before n, and adds the rows of all later ones in their order; y is a range of 8 · threads channels.
KERNEL(256) void embedding_backward(
    float* dTable, i64 table_stride, const bf16* dOutput, i64 output_stride, const int* tokens, int count, int channels) {
    SHARED(u32, matches, 8);
    const int n = blockIdx.x, token = tokens[n], threads = blockDim.x;
    int earlier = 0;
    for (int i = threadIdx.x; i < n; i += threads) {
        earlier |= tokens[i] == token;
    }

    if (block_max((float)earlier) > 0.0f) {
        return;
    }

    const int c = (blockIdx.y * threads + threadIdx.x) * 8;
    float sum[8];
    if (c < channels) {
        load(sum, dTable + token * table_stride + c);
    }

    for (int first = n; first < count; first += threads) {
        const int i = first + threadIdx.x;
        const u32 match = __ballot_sync(~0u, i < count && tokens[i] == token);
        __syncthreads();  // the matches before these have been read
        if (threadIdx.x % 32 == 0) {
            matches[threadIdx.x / 32] = match;
        }

        __syncthreads();
        for (int warp = 0; warp < threads / 32; warp++) {
            for (u32 left = matches[warp]; left != 0; left &= left - 1) {
                if (c < channels) {
                    const i64 row = first + warp * 32 + __ffs(left) - 1;
                    float x[8];
                    load(x, dOutput + row * output_stride + c);
#pragma unroll
                    for (int k = 0; k < 8; k++) {
                        sum[k] += x[k];
                    }
                }
            }
        }
    }

    if (c < channels) {
        store(dTable + token * table_stride + c, sum);
    }
}

// to row n = from row indices[n], rows of any type as numbers of 16 bits; a block is a row.
KERNEL(256) void gather_rows(u16* to, i64 to_stride, const u16* from, i64 from_stride, const int* indices, int columns) {
    const i64 n = blockIdx.x, row = indices[n];
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        to[n * to_stride + i] = from[row * from_stride + i];
    }
}
