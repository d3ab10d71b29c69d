// Products with few rows, and rows of quantized weights in bf16. All other products are cuBLASLt's.
#include "Device.cuh"

// Weights (O, I), of which a lane loads 8 neighbours at a time: elements 8 · part … 8 · part + 7 of a block of 32 inputs,
// as pairs of bf16. They are to be multiplied by the block's scale.
struct Bf16Weights {
    int outputs, blocks;  // blocks of a row
    const bf16* values;

    __device__ Bf16Weights(const u8* weight, int outputs, int inputs)
        : outputs(outputs), blocks(inputs / 32), values((const bf16*)weight) {}

    __device__ Words4 load(i64 row, int block, int part) const { return *(const Words4*)(values + (row * blocks + block) * 32 + part * 8); }

    __device__ float scale(i64, int) const { return 1.0f; }
};

// ggml's quantized types as WeightBlocks.cs orders them: the quants of all rows, then the scales of all rows, in F16. Every
// quant is a bf16 exactly. Q8_0: a signed byte a quant.
struct Q8Weights {
    int outputs, blocks;
    const u8* quants;
    const f16* scales;

    __device__ Q8Weights(const u8* weight, int outputs, int inputs)
        : outputs(outputs), blocks(inputs / 32), quants(weight), scales((const f16*)(weight + (i64)outputs * inputs)) {}

    __device__ Words4 load(i64 row, int block, int part) const {
        const Words2 bytes = *(const Words2*)(quants + (row * blocks + block) * 32 + part * 8);
        return {{pair(bytes.v[0]), pair(bytes.v[0] >> 16), pair(bytes.v[1]), pair(bytes.v[1] >> 16)}};
    }

    __device__ float scale(i64 row, int block) const { return to_float(scales[row * blocks + block]); }

    static __device__ u32 pair(u32 bytes) { return pack_bf16x2((float)(signed char)bytes, (float)(signed char)(bytes >> 8)); }
};

// Q4_0: two neighbours a byte, the first in the low nibble, each 8 too large.
struct Q4Weights {
    int outputs, blocks;
    const u8* quants;
    const f16* scales;

    __device__ Q4Weights(const u8* weight, int outputs, int inputs)
        : outputs(outputs), blocks(inputs / 32), quants(weight), scales((const f16*)(weight + (i64)outputs * inputs / 2)) {}

    __device__ Words4 load(i64 row, int block, int part) const {
        const u32 nibbles = *(const u32*)(quants + (row * blocks + block) * 16 + part * 4);
        return {{pair(nibbles), pair(nibbles >> 8), pair(nibbles >> 16), pair(nibbles >> 24)}};
    }

    __device__ float scale(i64 row, int block) const { return to_float(scales[row * blocks + block]); }

    static __device__ u32 pair(u32 nibbles) {
        return pack_bf16x2((float)((int)(nibbles & 15) - 8), (float)((int)(nibbles >> 4 & 15) - 8));
    }
};

// output (N, O) = or += input (N, I) · weightᵀ for N up to 8 · Tiles, as in decoding, whose time is that of reading the
// weight: each of its bytes is read once.
//
// A block of threads owns 16 outputs; its warps take groups of 128 inputs in turn, ascending, and the sums of the warps are
// added in order. A row of input is a column of mma.sync, which comes out the same whatever the others are: so a row has
// the same bits alone and among others.
constexpr int Warps = 8;
constexpr int BlockOutputs = 16;
constexpr int TileRows = 8;
constexpr int Together = 4;  // blocks of 32 inputs whose loads are under way at once, to hide the latency of memory

template<int Tiles, class Weights>
__device__ __forceinline__ void multiply(
    const Weights& weights, void* output, const bf16* input, int rows, int output_stride, int input_stride, int output_is_bf16,
    int accumulate) {
    SHARED(float, sums, Warps * Tiles * TileRows * BlockOutputs);
    const int warp = threadIdx.x / 32, quad = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
    // Past the end the last output, or row, is computed once more, and not written.
    const int first = blockIdx.x * BlockOutputs, last = weights.outputs - 1;
    const int upper = min(first + quad, last), lower = min(first + quad + 8, last);

    float sum[Tiles][4] = {};
    for (int group = warp * Together; group < weights.blocks; group += Warps * Together) {
        Words4 a[Together], b[Together];
        float upper_scale[Together], lower_scale[Together];
#pragma unroll
        for (int i = 0; i < Together; i++) {
            const int block = min(group + i, weights.blocks - 1);
            a[i] = weights.load(upper, block, part);
            b[i] = weights.load(lower, block, part);
            upper_scale[i] = weights.scale(upper, block);
            lower_scale[i] = weights.scale(lower, block);
        }

#pragma unroll
        for (int i = 0; i < Together; i++) {
            if (group + i < weights.blocks) {
                // A lane's 8 neighbours are its k of two instructions, in the same order in both operands.
                const u32 first_half[4] = {a[i].v[0], b[i].v[0], a[i].v[1], b[i].v[1]};
                const u32 second_half[4] = {a[i].v[2], b[i].v[2], a[i].v[3], b[i].v[3]};
#pragma unroll
                for (int t = 0; t < Tiles; t++) {
                    const int row = min(t * TileRows + quad, rows - 1);
                    const Words4 x = *(const Words4*)(input + (i64)row * input_stride + (group + i) * 32 + part * 8);
                    float products[4] = {};
                    mma_m16n8k16(products, first_half, x.v[0], x.v[1]);
                    mma_m16n8k16(products, second_half, x.v[2], x.v[3]);
                    sum[t][0] += upper_scale[i] * products[0];
                    sum[t][1] += upper_scale[i] * products[1];
                    sum[t][2] += lower_scale[i] * products[2];
                    sum[t][3] += lower_scale[i] * products[3];
                }
            }
        }
    }

#pragma unroll
    for (int t = 0; t < Tiles; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = t * TileRows + part * 2 + i % 2, column = quad + i / 2 * 8;
            sums[(warp * Tiles * TileRows + row) * BlockOutputs + column] = sum[t][i];
        }
    }

    __syncthreads();
    for (int i = threadIdx.x; i < rows * BlockOutputs; i += blockDim.x) {
        const int row = i / BlockOutputs, column = first + i % BlockOutputs;
        float total = 0.0f;
        for (int w = 0; w < Warps; w++) {
            total += sums[w * Tiles * TileRows * BlockOutputs + i];
        }

        const i64 place = (i64)row * output_stride + column;
        if (column <= last && output_is_bf16) {
            bf16& to = ((bf16*)output)[place];
            store(to, accumulate ? to_float(to) + total : total);
        } else if (column <= last) {
            float& to = ((float*)output)[place];
            store(to, accumulate ? to + total : total);
        }
    }
}

KERNEL(256) void mat_mul_bf16_8_rows(
    void* output, const bf16* input, const u8* weight, int rows, int outputs, int inputs, int output_stride, int input_stride,
    int output_is_bf16, int accumulate) {
    multiply<1>(Bf16Weights(weight, outputs, inputs), output, input, rows, output_stride, input_stride, output_is_bf16, accumulate);
}

KERNEL(256) void mat_mul_q8_0_8_rows(
    void* output, const bf16* input, const u8* weight, int rows, int outputs, int inputs, int output_stride, int input_stride,
    int output_is_bf16, int accumulate) {
    multiply<1>(Q8Weights(weight, outputs, inputs), output, input, rows, output_stride, input_stride, output_is_bf16, accumulate);
}

KERNEL(256) void mat_mul_q8_0_32_rows(
    void* output, const bf16* input, const u8* weight, int rows, int outputs, int inputs, int output_stride, int input_stride,
    int output_is_bf16, int accumulate) {
    multiply<4>(Q8Weights(weight, outputs, inputs), output, input, rows, output_stride, input_stride, output_is_bf16, accumulate);
}

KERNEL(256) void mat_mul_q4_0_8_rows(
    void* output, const bf16* input, const u8* weight, int rows, int outputs, int inputs, int output_stride, int input_stride,
    int output_is_bf16, int accumulate) {
    multiply<1>(Q4Weights(weight, outputs, inputs), output, input, rows, output_stride, input_stride, output_is_bf16, accumulate);
}

KERNEL(256) void mat_mul_q4_0_32_rows(
    void* output, const bf16* input, const u8* weight, int rows, int outputs, int inputs, int output_stride, int input_stride,
    int output_is_bf16, int accumulate) {
    multiply<4>(Q4Weights(weight, outputs, inputs), output, input, rows, output_stride, input_stride, output_is_bf16, accumulate);
}

// output row n (I) = the weight's row first + n, or row indices[n] where there are indices. A thread takes 8 elements.
template<class Weights>
__device__ __forceinline__ void decode(
    const Weights& weights, bf16* output, const int* indices, int first, int rows, int output_stride) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int parts = weights.blocks * 4, part = (int)(i % parts);
    const i64 n = i / parts;
    if (n < rows) {
        const i64 row = indices ? indices[n] : first + n;
        const float scale = weights.scale(row, part / 4);
        Words4 pairs = weights.load(row, part / 4, part % 4);
        for (u32& pair : pairs.v) {
            pair = pack_bf16x2(scale * __uint_as_float(pair << 16), scale * __uint_as_float(pair & 0xffff0000u));
        }

        *(Words4*)(output + n * output_stride + part * 8) = pairs;
    }
}

KERNEL(256) void decode_rows_q8_0(
    bf16* output, const u8* weight, const int* indices, int first, int rows, int outputs, int inputs, int output_stride) {
    decode(Q8Weights(weight, outputs, inputs), output, indices, first, rows, output_stride);
}

KERNEL(256) void decode_rows_q4_0(
    bf16* output, const u8* weight, const int* indices, int first, int rows, int outputs, int inputs, int output_stride) {
    decode(Q4Weights(weight, outputs, inputs), output, indices, first, rows, output_stride);
}
