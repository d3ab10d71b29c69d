#include "Device.cuh"

// The sum over a block of 256 threads, in one fixed tree; once a kernel.
__device__ __forceinline__ double block_sum(double value) {
    SHARED(double, sums, 256);
    sums[threadIdx.x] = value;
    for (int distance = 128; distance > 0; distance /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < distance) {
            sums[threadIdx.x] += sums[threadIdx.x + distance];
        }
    }

    __syncthreads();
    return sums[0];
}

// total += Σ values; one block, each thread every 256th value.
KERNEL(256) void sum(double* total, const float* values, i64 stride, int rows, int columns) {
    double part = 0.0;
    for (i64 i = threadIdx.x; i < (i64)rows * columns; i += 256) {
        part += values[i / columns * stride + i % columns];
    }

    const double all = block_sum(part);
    if (threadIdx.x == 0) {
        *total += all;
    }
}

// partials[block] = Σ values² of the block's chunk; a thread adds the squares of eight values in fp32, those sums in fp64.
KERNEL(256) void sum_of_squares(double* partials, const float* values, i64 count, int chunk) {
    const i64 first = (i64)blockIdx.x * chunk, end = first + chunk < count ? first + chunk : count;
    double part = 0.0;
    for (i64 i = first + threadIdx.x; i < end; i += 8 * 256) {
        float squares = 0.0f;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const float x = i + k * 256 < end ? values[i + k * 256] : 0.0f;
            squares = fmaf(x, x, squares);
        }

        part += squares;
    }

    const double all = block_sum(part);
    if (threadIdx.x == 0) {
        partials[blockIdx.x] = all;
    }
}

// total = Σ partials; one block.
KERNEL(256) void sum_of_partials(double* total, const double* partials, int count) {
    double part = 0.0;
    for (int i = threadIdx.x; i < count; i += 256) {
        part += partials[i];
    }

    const double all = block_sum(part);
    if (threadIdx.x == 0) {
        *total = all;
    }
}
