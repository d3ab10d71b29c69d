#pragma once
#include "Device.cuh"

// Causal grouped-query attention by tiles of 64 keys with a running softmax (FlashAttention-2, Dao 2023) on tensor cores:
// products in bf16, sums in fp32. D is the head dim, or more: what tiles have beyond it is zero.
//
// The query heads that share a key head are more rows of the same matrix: row r of a segment is its token r / group and
// head r % group of the group. A block of 4 warps takes one tile of such rows (output, dQuery) or one tile of keys (dKeys,
// dValues) of one segment and one key head: block x stands for segment and tile, y for the key head.
//
// Probabilities and their gradients stay in registers: what one product accumulates is, rounded to bf16, the left operand of
// the next. All sums have one order, and no bit depends on the other rows of a batch; but for attention_gradients, which adds
// dQuery up by atomics.
//
// Kernels of 128 threads. Of each, for D = 16, 32, 64 and 128: shared memory in bytes, and the 32-bit values that live at once in
// clang's PTX, 20 to 40 of them arguments and addresses made of these, which a GPU keeps elsewhere, and in attention_gradients 30 more
// sums of addresses, which it forms as it loads; 255 registers are the most. What NVRTC makes of it is unproved.
//   attention_forward      12,288  24,576  49,152  81,920    151  184  232  176
//   attention_cached       10,240  20,480  40,960  81,920    130  156  198  263
//   attention_cached_q8_0  12,288  24,576  49,152  98,304    143  170  218  286
//   attention_d_query      16,384  32,768  65,536  98,304    155  194  244  212
//   attention_d_key_value  13,312  25,600  50,176  66,048    150  182  230  251
//   attention_gradients    21,504  33,792  58,368  70,144    186  224  264  298

struct alignas(8) Floats2 {
    float v[2];
};

constexpr int Keys = 64;  // of a tile
constexpr int Threads = 128;
constexpr int WarpRows = 16;
constexpr int Warps = Threads / 32;
constexpr float Log2E = 1.4426950408889634f;
constexpr float Ln2 = 0.6931471805599453f;

// Positions whose keys are summed before they are added to those before them, where keys lie in a cache.
constexpr int Span = 256;
constexpr int SpanTiles = Span / Keys;

// TinyLlama.Compute.Segment.
struct Segment {
    int first_row, row_count, first_position, first_key;
};

// Which tile of which segment a block works on.
struct Work {
    Segment segment;
    int rows;      // the segment's, of all heads of a group
    int first;     // first row of the tile
    int head_dim;  // at most D, a multiple of 16
};

// The last of `count` indices for which a condition holds that holds up to some index, and for the first.
template<class Condition>
__device__ __forceinline__ int last_where(int count, Condition holds) {
    int low = 0;
    for (int high = count; high - low > 1;) {
        const int middle = (low + high) / 2;
        const bool is_later = holds(middle);
        low = is_later ? middle : low;
        high = is_later ? high : middle;
    }

    return low;
}

// Segment s has the slots from first_row · group / Rows + s on: at least as many as it has tiles, whatever the lengths, so
// that the grid, N · group / Rows + S slots, follows from the number of tokens and of segments. False for a slot left over.
template<int Rows>
__device__ __forceinline__ bool find_work(Work& work, const int* segments, int segment_count, int group, int head_dim) {
    const auto first_slot = [&](int s) { return (int)((i64)segments[4 * s] * group / Rows) + s; };
    const int slot = blockIdx.x;
    const int s = last_where(segment_count, [&](int i) { return first_slot(i) <= slot; });
    const int* fields = segments + 4 * s;
    work.segment = {fields[0], fields[1], fields[2], fields[3]};
    work.rows = work.segment.row_count * group;
    work.first = (slot - first_slot(s)) * Rows;
    work.head_dim = head_dim;
    return work.first < work.rows;
}

// Where a tile in shared memory keeps chunk c (8 elements) of row r, in elements. The chunks of a row are permuted so that
// those of any 8 rows lie in different banks: ldmatrix reads the tile, or its transpose, without conflicts.
template<int D>
__device__ __forceinline__ int place(int row, int chunk) {
    constexpr int Chunks = D / 8;
    constexpr int RowsPerLine = Chunks < 8 ? 8 / Chunks : 1;
    constexpr int Mask = Chunks < 8 ? Chunks - 1 : 7;
    return row * D + (chunk ^ (row / RowsPerLine & Mask)) * 8;
}

template<int D>
__device__ __forceinline__ SharedAddress address(SharedAddress tile, int row, int chunk) {
    return tile + place<D>(row, chunk) * (int)sizeof(bf16);
}

// What lies so many rows (a multiple of 8) below and chunks to the right of an address of an upper row: of the first chunk, or of the
// first two where the chunks are even. Cheaper than an address of its own: tiles begin at multiples of 1024 bytes.
template<int D>
__device__ __forceinline__ SharedAddress moved(SharedAddress from, int rows, int chunks) {
    return (from ^ chunks * 16) + rows * D * (int)sizeof(bf16);
}

// Where head row r of a segment lies in a matrix of all heads of so many columns.
__device__ __forceinline__ i64 head_row(int row, int first_token, int key_head, int group, i64 stride, int columns) {
    const int token = (u32)row / (u32)group;
    return (first_token + token) * stride + (key_head * group + row - token * group) * columns;
}

// Begins to load rows of one head; zeros from `count` on, and beyond the head.
template<int D, int Rows>
__device__ __forceinline__ void load_rows(SharedAddress tile, const bf16* source, i64 stride, int count, int head_dim) {
    constexpr int Chunks = D / 8, RowsAtOnce = Threads / Chunks;
    static_assert(Rows % RowsAtOnce == 0 && RowsAtOnce % 8 == 0);
    const int row = threadIdx.x / Chunks, chunk = threadIdx.x % Chunks;
    const SharedAddress to = address<D>(tile, row, chunk);
    source += row * stride + chunk * 8;
    count = chunk * 8 < head_dim ? count : 0;
#pragma unroll
    for (int first = 0; first < Rows; first += RowsAtOnce, source += RowsAtOnce * stride) {
        cp_async_16(to + first * D * (int)sizeof(bf16), source, first + row < count ? 16 : 0);
    }
}

// Begins to load the head rows of a tile; zeros beyond the segment and the heads.
template<int D, int Rows>
__device__ __forceinline__ void load_heads(
    SharedAddress tile, const bf16* source, i64 stride, const Work& work, int first, int key_head, int group) {
    constexpr int Chunks = D / 8, RowsAtOnce = Threads / Chunks;
    const int chunk = threadIdx.x % Chunks, rows = chunk * 8 < work.head_dim ? work.rows : 0;
    const SharedAddress to = address<D>(tile, threadIdx.x / Chunks, chunk);
#pragma unroll
    for (int i = 0; i < Rows / RowsAtOnce; i++) {
        const int row = first + i * RowsAtOnce + threadIdx.x / Chunks;
        const i64 from = head_row(row, work.segment.first_row, key_head, group, stride, work.head_dim) + chunk * 8;
        cp_async_16(to + i * RowsAtOnce * D * (int)sizeof(bf16), source + from, row < rows ? 16 : 0);
    }
}

// 16 rows of a tile = what a warp accumulated, rounded, that of each half times a factor.
template<int D>
__device__ __forceinline__ void store_rows(SharedAddress rows, const float (&c)[D / 8][4], const float (&factors)[2]) {
    const int lane = threadIdx.x % 32;
    const SharedAddress to = address<D>(rows, lane / 4, 0) + lane % 4 * (int)sizeof(u32);
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            store_shared_4(moved<D>(to, half * 8, j), pack_bf16x2(c[j][half * 2] * factors[half], c[j][half * 2 + 1] * factors[half]));
        }
    }
}

// Writes the 16 head rows that a warp accumulated, those of each half times a factor, in pieces of 16 bytes by way of
// `room`: 16 rows of a tile that only this warp still uses.
template<int D>
__device__ __forceinline__ void store_heads(
    bf16* target, i64 stride, const Work& work, int first, int key_head, int group, bf16* room, const float (&c)[D / 8][4],
    const float (&factors)[2]) {
    constexpr int Chunks = D / 8;
    const int lane = threadIdx.x % 32;
    __syncwarp();
    store_rows<D>(shared_address(room), c, factors);
    __syncwarp();
#pragma unroll
    for (int at = lane; at < WarpRows * Chunks; at += 32) {
        const int row = at / Chunks, chunk = at % Chunks;
        if (first + row < work.rows && chunk * 8 < work.head_dim) {
            const i64 to = head_row(first + row, work.segment.first_row, key_head, group, stride, work.head_dim) + chunk * 8;
            *(Bf16x8*)(target + to) = *(const Bf16x8*)(room + place<D>(row, chunk));
        }
    }
}

// 16 rows of a tile as left operands of products over D: in registers or, where the accumulators need these, read anew for
// each product.
template<int D, bool Keeps>
struct LeftRows {
    __device__ __forceinline__ void set(SharedAddress rows) {
        from = address<D>(rows, threadIdx.x % 16, threadIdx.x / 16 % 2);
        if (Keeps) {
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                read(kept[step], step);
            }
        }
    }

    __device__ __forceinline__ void get(u32 (&operand)[4], int step) const {
        if (Keeps) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                operand[i] = kept[step][i];
            }
        } else {
            read(operand, step);
        }
    }

private:
    u32 kept[Keeps ? D / 16 : 1][4];
    SharedAddress from;

    __device__ __forceinline__ void read(u32 (&operand)[4], int step) const {
        ldmatrix_x4(operand, moved<D>(from, 0, step * 2));
    }
};

template<int N>
__device__ __forceinline__ void clear(float (&c)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            c[j][i] = 0;
        }
    }
}

// c = a · tileᵀ, R times (16, D) by (N, D).
template<int D, int R, int N, bool Keeps>
__device__ __forceinline__ void multiply_transposed(float (&c)[R][N / 8][4], const LeftRows<D, Keeps> (&a)[R], SharedAddress tile) {
    const int lane = threadIdx.x % 32;
    const SharedAddress from = address<D>(tile, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int r = 0; r < R; r++) {
        clear(c[r]);
    }

#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        u32 left[R][4];
#pragma unroll
        for (int r = 0; r < R; r++) {
            a[r].get(left[r], step);
        }

#pragma unroll
        for (int j = 0; j < N / 8; j += 2) {
            u32 right[4];
            ldmatrix_x4(right, moved<D>(from, j * 8, step * 2));
#pragma unroll
            for (int r = 0; r < R; r++) {
                mma_m16n8k16(c[r][j], left[r], right[0], right[1]);
                mma_m16n8k16(c[r][j + 1], left[r], right[2], right[3]);
            }
        }
    }
}

// c += left · 16 rows of a tile from `row` on, R times (16, 16) by (16, C); `from` is the lane's address for the first of C columns.
template<int D, int R, int C>
__device__ __forceinline__ void multiply_add_rows(float (&c)[R][C][4], const u32 (&left)[R][4], SharedAddress from, int row) {
#pragma unroll
    for (int j = 0; j < C; j += 2) {
        u32 right[4];
        ldmatrix_x4_trans(right, moved<D>(from, row, j));
#pragma unroll
        for (int r = 0; r < R; r++) {
            mma_m16n8k16(c[r][j], left[r], right[0], right[1]);
            mma_m16n8k16(c[r][j + 1], left[r], right[2], right[3]);
        }
    }
}

// c += p · tile, R times (16, N) by (N, D), p rounded to bf16.
template<int D, int R, int N>
__device__ __forceinline__ void multiply_add(float (&c)[R][D / 8][4], const float (&p)[R][N / 8][4], SharedAddress tile) {
    const int lane = threadIdx.x % 32;
    const SharedAddress from = address<D>(tile, lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < N / 16; step++) {
        u32 left[R][4];
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float (&x)[4] = p[r][2 * step + i / 2];
                left[r][i] = pack_bf16x2(x[i % 2 * 2], x[i % 2 * 2 + 1]);
            }
        }

        multiply_add_rows<D>(c, left, from, step * 16);
    }
}

__device__ __forceinline__ float low_half(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Over the 4 lanes that share rows of an accumulator.
__device__ __forceinline__ float row_sum(float value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

__device__ __forceinline__ float row_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
    return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

// Scores of keys that a row does not see become -∞: those after last_key[r][half], counted from the tile's first key.
template<int R, int J>
__device__ __forceinline__ void mask(float (&scores)[R][J][4], const int (&last_key)[R][2], int first_key) {
    const int lane_key = first_key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int last = last_key[r][half] - lane_key;
#pragma unroll
            for (int j = 0; j < J; j++) {
                scores[r][j][half * 2] = j * 8 > last ? -infinity() : scores[r][j][half * 2];
                scores[r][j][half * 2 + 1] = j * 8 + 1 > last ? -infinity() : scores[r][j][half * 2 + 1];
            }
        }
    }
}

// Keys and values that are rows of the batch.
template<int D>
struct BatchKeys {
    const bf16 *keys, *values;
    i64 key_stride, value_stride;
    int head_dim;

    __device__ __forceinline__ void begin(SharedAddress key_tile, SharedAddress value_tile, int tile, int count) {
        load_rows<D, Keys>(key_tile, keys + tile * Keys * key_stride, key_stride, count, head_dim);
        load_rows<D, Keys>(value_tile, values + tile * Keys * value_stride, value_stride, count, head_dim);
    }

    __device__ __forceinline__ void end(SharedAddress, SharedAddress) {}
};
