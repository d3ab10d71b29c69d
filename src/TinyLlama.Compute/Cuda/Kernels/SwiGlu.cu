#include "Device.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp_approx(-x)); }

// output = silu(gate) · up; a thread takes eight neighbours of a row.
KERNEL(256) void swiglu(bf16* output, i64 output_stride, const bf16* gateUp, i64 gateUp_stride, int rows, int hidden) {
    const i64 index = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8, n = index / hidden;
    if (n >= rows) {
        return;
    }

    const int c = (int)(index % hidden);
    float gate[8], up[8];
    load(gate, gateUp + n * gateUp_stride + c);
    load(up, gateUp + n * gateUp_stride + hidden + c);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        up[k] *= gate[k] * sigmoid(gate[k]);
    }

    store(output + n * output_stride + c, up);
}

// With s = sigmoid(gate): dUp = dOutput · gate · s, dGate = dOutput · up · s · (1 + gate · (1 - s)).
KERNEL(256) void swiglu_backward(
    bf16* dGateUp, i64 dGateUp_stride, const bf16* dOutput, i64 dOutput_stride, const bf16* gateUp, i64 gateUp_stride, int rows, int hidden) {
    const i64 index = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8, n = index / hidden;
    if (n >= rows) {
        return;
    }

    const int c = (int)(index % hidden);
    float gate[8], up[8], dy[8];
    load(gate, gateUp + n * gateUp_stride + c);
    load(up, gateUp + n * gateUp_stride + hidden + c);
    load(dy, dOutput + n * dOutput_stride + c);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const float g = gate[k], s = sigmoid(g), ds = dy[k] * s;
        gate[k] = ds * up[k] * fmaf(g, 1.0f - s, 1.0f);
        up[k] = ds * g;
    }

    store(dGateUp + n * dGateUp_stride + c, gate);
    store(dGateUp + n * dGateUp_stride + hidden + c, up);
}
