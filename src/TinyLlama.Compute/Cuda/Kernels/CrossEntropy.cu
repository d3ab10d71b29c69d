#include "Device.cuh"

__device__ __forceinline__ void load(float (&x)[1], const float* from) { x[0] = *from; }
__device__ __forceinline__ void load(float (&x)[1], const bf16* from) { x[0] = to_float(*from); }
__device__ __forceinline__ void store(float* to, const float (&x)[1]) { *to = x[0]; }
__device__ __forceinline__ void store(bf16* to, const float (&x)[1]) { store(*to, x[0]); }

// The loss of row n of the logits and, with a scale, their gradient in place: (softmax - target) · scale. A block is a row;
// its first pass finds the largest logit and the sum of exponentials together (Milakov and Gimelshein 2018), Width logits a
// thread at a time: 8 where rows begin at multiples of 16 bytes, else 1.
template<class T, int Width>
__device__ __forceinline__ void cross_entropy(float* losses, T* logits, i64 stride, const int* targets, const float* scale, int vocabulary) {
    const i64 n = blockIdx.x;
    const int target = targets[n], first = threadIdx.x * Width, step = blockDim.x * Width;
    T* row = logits + n * stride;
    if (target < 0) {
        if (threadIdx.x == 0) {
            losses[n] = 0.0f;
        }

        const float zero[Width] = {};
        for (int v = first; v < vocabulary && scale; v += step) {
            store(row + v, zero);
        }

        return;
    }

    float largest = -infinity(), sum = 0.0f;
    for (int v = first; v < vocabulary; v += step) {
        float x[Width];
        load(x, row + v);
        float top = largest;
#pragma unroll
        for (int k = 0; k < Width; k++) {
            top = fmaxf(top, x[k]);
        }

        if (top > largest) {
            sum *= exp_approx(largest - top);
            largest = top;
        }

#pragma unroll
        for (int k = 0; k < Width; k++) {
            sum += exp_approx(x[k] - largest);
        }
    }

    const float chosen = to_float(row[target]), all_largest = block_max(largest);
    const float all_sum = block_sum(sum > 0.0f ? sum * exp_approx(largest - all_largest) : sum);
    if (threadIdx.x == 0) {
        losses[n] = log2_approx(all_sum) * 0.6931471805599453f + (all_largest - chosen);
    }

    if (!scale) {
        return;
    }

    const float factor = *scale / all_sum;
    for (int v = first; v < vocabulary; v += step) {
        float x[Width];
        load(x, row + v);
#pragma unroll
        for (int k = 0; k < Width; k++) {
            x[k] = exp_approx(x[k] - all_largest) * factor - (v + k == target ? *scale : 0.0f);
        }

        store(row + v, x);
    }
}

KERNEL(1024) void cross_entropy_bf16_by_8(float* losses, bf16* logits, i64 stride, const int* targets, const float* scale, int vocabulary) {
    cross_entropy<bf16, 8>(losses, logits, stride, targets, scale, vocabulary);
}

KERNEL(1024) void cross_entropy_bf16(float* losses, bf16* logits, i64 stride, const int* targets, const float* scale, int vocabulary) {
    cross_entropy<bf16, 1>(losses, logits, stride, targets, scale, vocabulary);
}

KERNEL(1024) void cross_entropy_f32_by_8(float* losses, float* logits, i64 stride, const int* targets, const float* scale, int vocabulary) {
    cross_entropy<float, 8>(losses, logits, stride, targets, scale, vocabulary);
}

KERNEL(1024) void cross_entropy_f32(float* losses, float* logits, i64 stride, const int* targets, const float* scale, int vocabulary) {
    cross_entropy<float, 1>(losses, logits, stride, targets, scale, vocabulary);
}
