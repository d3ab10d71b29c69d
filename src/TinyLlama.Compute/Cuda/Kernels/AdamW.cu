#include "Device.cuh"

// One step of AdamW with the gradient clipped by the global norm, then gradient = 0; nothing where the norm is not finite.
// step: learning rate, 1 - β₁ᵗ, 1 - β₂ᵗ. rest = 1 - β.
KERNEL(256) void adamw(
    float* values, float* first, float* second, float* gradient, const float* step, const double* sum_of_squares, i64 count, float beta1,
    float rest1, float beta2, float rest2, float epsilon, float decay, float max_norm, float rate_factor) {
    SHARED(float, clip, 1);
    if (threadIdx.x == 0) {
        // In fp64, of which there is little: once a block. -1 where the norm is infinite or no number.
        const double norm = sqrt(*sum_of_squares);
        const double shrink = max_norm / (norm + 1e-6);
        clip[0] = !(norm <= 1.7976931348623157e308) ? -1.0f : max_norm > 0.0f && shrink < 1.0 ? (float)shrink : 1.0f;
    }

    __syncthreads();
    if (clip[0] < 0.0f) {
        return;
    }

    const float rate = step[0] * rate_factor, scale1 = 1.0f / step[1], scale2 = 1.0f / step[2];
    const i64 start = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    for (i64 i = start; i < count; i += (i64)gridDim.x * blockDim.x) {
        const float slope = gradient[i] * clip[0];
        const float mean = fmaf(beta1, first[i], rest1 * slope);
        const float variance = fmaf(beta2, second[i], rest2 * slope * slope);
        const float direction = mean * scale1 / (sqrtf(variance * scale2) + epsilon);
        values[i] = fmaf(-rate, fmaf(decay, values[i], direction), values[i]);
        first[i] = mean;
        second[i] = variance;
        gradient[i] = 0.0f;
    }
}
