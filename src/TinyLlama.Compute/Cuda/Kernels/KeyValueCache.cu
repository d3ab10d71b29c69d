#include "Attention.cuh"

// Writes the keys and values of each token of a batch to its position in a cache, whose order Attention.cu reads. Block x is
// a token; y is 0 for keys and 1 for values. Memory-bound.

// Where a token's keys go: the block of the cache, and the position in it.
struct Slot {
    int block, place;
};

__device__ __forceinline__ Slot slot_of(int token, const int* segments, int segment_count, const int* table) {
    const int s = last_where(segment_count, [&](int i) { return segments[4 * i] <= token; });
    const int* fields = segments + 4 * s;
    const int position = fields[2] + token - fields[0];
    return {table[fields[3] + position / Keys], position % Keys};
}

#define APPEND_PARAMETERS \
    u8 *cache_keys, u8 *cache_values, const bf16 *keys, const bf16 *values, const int *segments, const int *table, int segment_count, \
        int key_heads, int head_dim, i64 key_stride, i64 value_stride

KERNEL(128) void append_bf16(APPEND_PARAMETERS) {
    const int token = blockIdx.x;
    const Slot slot = slot_of(token, segments, segment_count, table);
    const bf16* from = blockIdx.y == 0 ? keys + token * key_stride : values + token * value_stride;
    bf16* cache = (bf16*)(blockIdx.y == 0 ? cache_keys : cache_values);
    for (int at = threadIdx.x * 8; at < key_heads * head_dim; at += Threads * 8) {
        const int head = at / head_dim;
        bf16* to = cache + (((i64)slot.block * key_heads + head) * Keys + slot.place) * head_dim + at % head_dim;
        *(Bf16x8*)to = *(const Bf16x8*)(from + at);
    }
}

// A thread for each 32 channels of a head, or what is left of it: whole multiples of the largest of them / 127.
KERNEL(128) void append_q8_0(APPEND_PARAMETERS) {
    const int token = blockIdx.x, groups = (head_dim + 31) / 32;
    const Slot slot = slot_of(token, segments, segment_count, table);
    const bf16* row = blockIdx.y == 0 ? keys + token * key_stride : values + token * value_stride;
    u8* cache = blockIdx.y == 0 ? cache_keys : cache_values;
    for (int at = threadIdx.x; at < key_heads * groups; at += Threads) {
        const int head = at / groups, group = at % groups, channels = min(head_dim - group * 32, 32);
        const Bf16x8* from = (const Bf16x8*)(row + head * head_dim + group * 32);
        u8* bytes = cache + ((i64)slot.block * key_heads + head) * (Keys * groups * 34);
        f16* scale = (f16*)(bytes + Keys * groups * 32) + slot.place * groups + group;
        bytes += slot.place * head_dim + group * 32;

        float largest = 0;
        for (int i = 0; i < channels / 8; i++) {
            const Bf16x8 x = from[i];
#pragma unroll
            for (int c = 0; c < 8; c++) {
                largest = fmaxf(largest, fabsf(to_float(x.v[c])));
            }
        }

        store(*scale, largest / 127.0f);
        const float rounded = to_float(*scale), inverse = rounded == 0 ? 0.0f : 1.0f / rounded;
        for (int i = 0; i < channels / 8; i++) {
            const Bf16x8 x = from[i];
            Words2 words = {};
#pragma unroll
            for (int c = 0; c < 8; c++) {
                const int whole = min(max(round_to_int(to_float(x.v[c]) * inverse), -127), 127);
                words.v[c / 4] |= (u32)(whole & 0xff) << c % 4 * 8;
            }

            *(Words2*)(bytes + i * 8) = words;
        }
    }
}
