#include "Device.cuh"

// output = x · r · weight with r = 1 / √(mean(x²) + ε); a block is a row. With a branch x = sum = input + branch, rounded.
template<bool Add>
__device__ __forceinline__ void forward(
    bf16* sum, i64 sum_stride, bf16* output, i64 output_stride, float* r, const bf16* input, i64 input_stride, const bf16* branch,
    i64 branch_stride, const float* weight, int channels, float epsilon) {
    const i64 n = blockIdx.x;
    const bf16* row = Add ? sum + n * sum_stride : input + n * input_stride;
    float squares = 0.0f;
    for (int c = threadIdx.x * 8; c < channels; c += blockDim.x * 8) {
        float x[8];
        load(x, input + n * input_stride + c);
        if (Add) {
            float b[8];
            load(b, branch + n * branch_stride + c);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                x[k] += b[k];
            }

            store(sum + n * sum_stride + c, x);
            load(x, row + c);
        }

#pragma unroll
        for (int k = 0; k < 8; k++) {
            squares = fmaf(x[k], x[k], squares);
        }
    }

    const float scale = 1.0f / sqrtf(block_sum(squares) / (float)channels + epsilon);
    if (threadIdx.x == 0) {
        r[n] = scale;
    }

    // A thread reads again what it has read, or written, before.
    for (int c = threadIdx.x * 8; c < channels; c += blockDim.x * 8) {
        float x[8], w[8];
        load(x, row + c);
        load(w, weight + c);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            x[k] *= scale * w[k];
        }

        store(output + n * output_stride + c, x);
    }
}

KERNEL(256) void rms_norm(
    bf16* output, i64 output_stride, float* r, const bf16* input, i64 input_stride, const float* weight, int channels, float epsilon) {
    forward<false>(nullptr, 0, output, output_stride, r, input, input_stride, nullptr, 0, weight, channels, epsilon);
}

KERNEL(256) void add_rms_norm(
    bf16* sum, i64 sum_stride, bf16* output, i64 output_stride, float* r, const bf16* input, i64 input_stride, const bf16* branch,
    i64 branch_stride, const float* weight, int channels, float epsilon) {
    forward<true>(sum, sum_stride, output, output_stride, r, input, input_stride, branch, branch_stride, weight, channels, epsilon);
}

// dInput += r · (dOutput · weight - x · r² · mean(dOutput · weight · x)); block b takes rows b, b + blocks, …, and leaves in
// row b of the partial sums Σ dOutput · x · r of them. Shared memory: those sums, each of which one thread alone touches.
KERNEL(256) void rms_norm_backward(
    bf16* dInput, i64 dInput_stride, float* partials, const bf16* dOutput, i64 dOutput_stride, const bf16* input, i64 input_stride,
    const float* weight, const float* r, int rows, int channels) {
    DYNAMIC_SHARED(shared);
    float* sums = (float*)shared;
    const int first = threadIdx.x * 8, step = blockDim.x * 8;
    const float zero[8] = {};
    for (int c = first; c < channels; c += step) {
        store(sums + c, zero);
    }

    for (i64 n = blockIdx.x; n < rows; n += gridDim.x) {
        float dot = 0.0f;
        for (int c = first; c < channels; c += step) {
            float x[8], w[8], dy[8];
            load(x, input + n * input_stride + c);
            load(w, weight + c);
            load(dy, dOutput + n * dOutput_stride + c);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                dot = fmaf(dy[k] * w[k], x[k], dot);
            }
        }

        const float scale = r[n];
        const float shrink = -(block_sum(dot) / (float)channels) * scale * scale * scale;
        for (int c = first; c < channels; c += step) {
            float x[8], w[8], dy[8], dx[8], dw[8];
            load(x, input + n * input_stride + c);
            load(w, weight + c);
            load(dy, dOutput + n * dOutput_stride + c);
            load(dx, dInput + n * dInput_stride + c);
            load(dw, sums + c);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float g = dy[k] * scale;
                dx[k] = fmaf(x[k], shrink, fmaf(g, w[k], dx[k]));
                dw[k] = fmaf(g, x[k], dw[k]);
            }

            store(dInput + n * dInput_stride + c, dx);
            store(sums + c, dw);
        }
    }

    for (int c = first; c < channels; c += step) {
        float dw[8];
        load(dw, sums + c);
        store(partials + (i64)blockIdx.x * channels + c, dw);
    }
}

// dWeight += the partial sums: 32 channels a block, in each of its 32 warps every 32nd row, then the warps in their order.
KERNEL(1024) void rms_norm_backward_weight(float* dWeight, const float* partials, int rows, int channels) {
    SHARED(float, sums, 1024);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    for (int row = warp; row < rows && c < channels; row += 32) {
        sum += partials[(i64)row * channels + c];
    }

    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && c < channels) {
        sum = 0.0f;
        for (int other = 0; other < 32; other++) {
            sum += sums[other * 32 + lane];
        }

        dWeight[c] += sum;
    }
}
