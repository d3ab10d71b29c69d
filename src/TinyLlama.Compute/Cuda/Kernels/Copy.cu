#include "Device.cuh"

// to (rows, columns) = from, rounded to nearest; blocks in y are rows.
template<class To, class From>
__device__ __forceinline__ void convert(To* to, i64 to_stride, const From* from, i64 from_stride, int rows, int columns) {
    const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        for (int column = first; column < columns; column += step) {
            store(to[row * to_stride + column], to_float(from[row * from_stride + column]));
        }
    }
}

KERNEL(256) void copy_f32_bf16(float* to, i64 to_stride, const bf16* from, i64 from_stride, int rows, int columns) {
    convert(to, to_stride, from, from_stride, rows, columns);
}

KERNEL(256) void copy_f32_f16(float* to, i64 to_stride, const f16* from, i64 from_stride, int rows, int columns) {
    convert(to, to_stride, from, from_stride, rows, columns);
}

KERNEL(256) void copy_bf16_f32(bf16* to, i64 to_stride, const float* from, i64 from_stride, int rows, int columns) {
    convert(to, to_stride, from, from_stride, rows, columns);
}

// The same where every row is whole eights at multiples of 16 bytes, as weights are: eight elements a thread.
KERNEL(256) void copy_bf16_f32_by_8(bf16* to, i64 to_stride, const float* from, i64 from_stride, int rows, int columns) {
    const int first = (blockIdx.x * blockDim.x + threadIdx.x) * 8, step = gridDim.x * blockDim.x * 8;
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        for (int column = first; column < columns; column += step) {
            float x[8];
            load(x, from + row * from_stride + column);
            store(to + row * to_stride + column, x);
        }
    }
}

KERNEL(256) void copy_bf16_f16(bf16* to, i64 to_stride, const f16* from, i64 from_stride, int rows, int columns) {
    convert(to, to_stride, from, from_stride, rows, columns);
}

KERNEL(256) void copy_f16_f32(f16* to, i64 to_stride, const float* from, i64 from_stride, int rows, int columns) {
    convert(to, to_stride, from, from_stride, rows, columns);
}

KERNEL(256) void copy_f16_bf16(f16* to, i64 to_stride, const bf16* from, i64 from_stride, int rows, int columns) {
    convert(to, to_stride, from, from_stride, rows, columns);
}

// to += from, rounded.
template<class T>
__device__ __forceinline__ void add(T* to, const T* from, i64 count) {
    for (i64 i = (i64)blockIdx.x * 256 + threadIdx.x; i < count; i += (i64)gridDim.x * 256) {
        store(to[i], to_float(to[i]) + to_float(from[i]));
    }
}

KERNEL(256) void add_f32(float* to, const float* from, i64 count) { add(to, from, count); }

KERNEL(256) void add_bf16(bf16* to, const bf16* from, i64 count) { add(to, from, count); }
