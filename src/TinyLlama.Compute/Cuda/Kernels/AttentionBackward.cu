#include "Attention.cuh"

// The sums over D of a row of one times a row of the other, of the row in each half.
template<int D, bool Keeps>
__device__ __forceinline__ void row_products(float (&sums)[2], const LeftRows<D, Keeps>& a, const LeftRows<D, Keeps>& b) {
    sums[0] = sums[1] = 0;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        u32 x[4], y[4];
        a.get(x, step);
        b.get(y, step);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sums[i % 2] = fmaf(low_half(x[i]), low_half(y[i]), sums[i % 2]);
            sums[i % 2] = fmaf(high_half(x[i]), high_half(y[i]), sums[i % 2]);
        }
    }

    sums[0] = row_sum(sums[0]);
    sums[1] = row_sum(sums[1]);
}

// dQuery, and delta = the row sums of dOutput · output. R · 16 head rows a warp; N keys at a time, a tile or half of it.
template<int D, int R, int N>
__device__ __forceinline__ void query_gradient(
    bf16* d_query, float* delta, const bf16* d_output, const bf16* output, const float* log_sums, const bf16* query, BatchKeys<D> source,
    Work work, int key_heads, int group, i64 d_query_stride, i64 d_output_stride, i64 output_stride, i64 query_stride, float scale) {
    constexpr int Rows = Warps * WarpRows * R, RowBytes = D * sizeof(bf16), TileBytes = Keys * RowBytes;
    DYNAMIC_SHARED(shared);
    const SharedAddress query_tile = shared_address(shared), d_output_tile = query_tile + Rows * RowBytes;
    const SharedAddress stages = d_output_tile + Rows * RowBytes, output_tile = stages + 2 * TileBytes;  // until the second stage is used

    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WarpRows * R;
    const int key_head = blockIdx.y, first_token = work.segment.first_row;
    work.first = (work.rows - 1) / Rows * Rows - work.first;  // the rows with most keys first
    const int warp_first = work.first + warp_row;
    const int warp_end = min(warp_first + WarpRows * R, work.rows);
    const int key_count = (min(work.first + Rows, work.rows) - 1) / group + 1;
    const int seen_by_all = warp_first / group + 1;
    const int seen_by_any = warp_first < warp_end ? (warp_end - 1) / group + 1 : 0;

    load_heads<D, Rows>(query_tile, query, query_stride, work, work.first, key_head, group);
    load_heads<D, Rows>(d_output_tile, d_output, d_output_stride, work, work.first, key_head, group);
    load_heads<D, Rows>(output_tile, output, output_stride, work, work.first, key_head, group);
    source.begin(stages, stages + TileBytes, 0, key_count);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    LeftRows<D, D <= 64> q[R];
    LeftRows<D, D <= 32> dy[R];
    float row_delta[R][2], row_log_sum[R][2], dq[R][D / 8][4];
    int last_key[R][2];
#pragma unroll
    for (int r = 0; r < R; r++) {
        const int first_byte = (warp_row + r * WarpRows) * RowBytes;
        LeftRows<D, D <= 32> y;
        q[r].set(query_tile + first_byte);
        dy[r].set(d_output_tile + first_byte);
        y.set(output_tile + first_byte);
        row_products(row_delta[r], dy[r], y);
        clear(dq[r]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = warp_first + r * WarpRows + half * 8 + lane / 4;
            last_key[r][half] = row / group;
            row_log_sum[r][half] = infinity();  // beyond the segment: no weight on any key
            if (row < work.rows) {
                const i64 at = head_row(row, first_token, key_head, group, key_heads * group, 1);
                row_log_sum[r][half] = log_sums[at] * Log2E;
                if (lane % 4 == 0) {
                    delta[at] = row_delta[r][half];
                }
            }
        }
    }

    for (int tile = 0; tile * Keys < key_count; tile++) {
        const SharedAddress stage = stages + tile % 2 * (2 * TileBytes);
        cp_async_wait<0>();
        __syncthreads();
        if ((tile + 1) * Keys < key_count) {
            const SharedAddress other = stages + (tile + 1) % 2 * (2 * TileBytes);
            source.begin(other, other + TileBytes, tile + 1, key_count - (tile + 1) * Keys);
            cp_async_commit();
        }

#pragma unroll
        for (int part = 0; part < Keys; part += N) {
            const int first_key = tile * Keys + part;
            if (first_key >= seen_by_any) {
                continue;
            }

            const SharedAddress key_tile = stage + part * RowBytes, value_tile = key_tile + TileBytes;
            float p[R][N / 8][4], ds[R][N / 8][4];
            multiply_transposed<D, R, N>(p, q, key_tile);
            if (first_key + N > seen_by_all) {
                mask(p, last_key, first_key);
            }

            multiply_transposed<D, R, N>(ds, dy, value_tile);
#pragma unroll
            for (int r = 0; r < R; r++) {
#pragma unroll
                for (int j = 0; j < N / 8; j++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float weight = exp2_approx(fmaf(p[r][j][i], scale * Log2E, -row_log_sum[r][i / 2]));
                        ds[r][j][i] = weight * (ds[r][j][i] - row_delta[r][i / 2]);
                    }
                }
            }

            multiply_add<D, R, N>(dq, ds, key_tile);
        }
    }

#pragma unroll
    for (int r = 0; r < R; r++) {
        store_heads<D>(
            d_query, d_query_stride, work, warp_first + r * WarpRows, key_head, group, (bf16*)shared + (warp_row + r * WarpRows) * D, dq[r],
            {scale, scale});
    }
}

// dQuery += scale · dScores · keys of a tile of head rows: dScores, (64, Rows) with keys as rows, and keys lie in shared memory. A warp
// takes 16 rows; where two warps share them, half of the channels.
template<int D, int Rows>
__device__ __forceinline__ void add_query_gradient(
    float* d_query, SharedAddress d_scores, SharedAddress key_tile, const Work& work, int first, int key_head, int key_heads, int group, float scale) {
    constexpr int RowGroups = Rows / WarpRows, Columns = D * RowGroups / Warps;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp % RowGroups * WarpRows, column = warp / RowGroups * Columns;
    const SharedAddress rows = address<Rows>(d_scores, lane % 8 + lane / 16 * 8, warp_row / 8 + lane / 8 % 2);
    const SharedAddress keys = address<D>(key_tile, lane % 16, column / 8 + lane / 16);
    float dq[1][Columns / 8][4];
    clear(dq[0]);
#pragma unroll
    for (int step = 0; step < Keys / 16; step++) {
        u32 left[1][4];
        ldmatrix_x4_trans(left[0], moved<Rows>(rows, step * 16, 0));
        multiply_add_rows<D>(dq, left, keys, step * 16);
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first + warp_row + half * 8 + lane / 4;
        if (row < work.rows) {
            const i64 stride = (i64)key_heads * group * work.head_dim;
            float* to = d_query + head_row(row, work.segment.first_row, key_head, group, stride, work.head_dim) + column + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < Columns / 8; j++) {
                if (column + j * 8 < work.head_dim) {
                    atomic_add(to + j * 8, dq[0][j][half * 2] * scale, dq[0][j][half * 2 + 1] * scale);
                }
            }
        }
    }
}

// dKeys and dValues of 64 keys, 16 a warp, over the rows of all query heads that read them. The products are those of
// query_gradient transposed, with keys as rows. With AddsQuery the gradients of scores also give what these keys add to dQuery,
// which is zero before all blocks: to whose sum a block adds when, nobody knows.
template<int D, bool AddsQuery>
__device__ __forceinline__ void key_value_gradient(
    bf16* d_keys, bf16* d_values, float* d_query, const float* delta, const bf16* d_output, const float* log_sums, const bf16* query,
    const bf16* keys, const bf16* values, Work work, int key_heads, int group, i64 d_key_stride, i64 d_value_stride, i64 d_output_stride,
    i64 query_stride, i64 key_stride, i64 value_stride, float scale) {
    constexpr int Rows = D <= 64 ? 64 : 32;  // head rows of a tile
    DYNAMIC_SHARED(shared);
    constexpr int KeyBytes = Keys * D * sizeof(bf16), RowBytes = Rows * D * sizeof(bf16), TileBytes = 2 * KeyBytes + 4 * RowBytes;
    constexpr int ScoreBytes = AddsQuery ? Keys * Rows * sizeof(bf16) : 0;
    const SharedAddress key_tile = shared_address(shared), value_tile = key_tile + KeyBytes, stages = value_tile + KeyBytes;
    const SharedAddress d_scores = stages + 4 * RowBytes;  // (64, Rows), with AddsQuery
    float* statistics = (float*)(shared + TileBytes + ScoreBytes);  // of each stage: log sums, then delta

    const int lane = threadIdx.x % 32, warp_key = threadIdx.x / 32 * WarpRows;
    const int key_head = blockIdx.y, heads = key_heads * group, first_token = work.segment.first_row;
    const int first_key = work.first;
    const int rows = work.rows * group;
    const Work row_work = {work.segment, rows, 0, work.head_dim};

    const auto begin = [&](int tile, float& statistic) {
        const SharedAddress stage = stages + tile % 2 * (2 * RowBytes);
        load_heads<D, Rows>(stage, query, query_stride, row_work, tile * Rows, key_head, group);
        load_heads<D, Rows>(stage + RowBytes, d_output, d_output_stride, row_work, tile * Rows, key_head, group);
        cp_async_commit();
        const int row = tile * Rows + threadIdx.x % Rows;
        const bool is_log_sum = threadIdx.x < Rows;
        statistic = is_log_sum ? infinity() : 0.0f;  // beyond the segment: no weight on any key
        if (row < rows && threadIdx.x < 2 * Rows) {
            const i64 at = head_row(row, first_token, key_head, group, heads, 1);
            statistic = is_log_sum ? log_sums[at] * Log2E : delta[at];
        }
    };

    int tile = first_key * group / Rows;
    float statistic;
    load_rows<D, Keys>(key_tile, keys + (first_token + first_key) * key_stride + key_head * work.head_dim, key_stride, work.rows - first_key,
        work.head_dim);
    load_rows<D, Keys>(value_tile, values + (first_token + first_key) * value_stride + key_head * work.head_dim, value_stride, work.rows - first_key,
        work.head_dim);
    begin(tile, statistic);
    cp_async_wait<0>();
    __syncthreads();
    LeftRows<D, D <= (AddsQuery ? 32 : 64)> k[1], v[1];
    k[0].set(key_tile + warp_key * D * (int)sizeof(bf16));
    v[0].set(value_tile + warp_key * D * (int)sizeof(bf16));
    float dk[1][D / 8][4], dv[1][D / 8][4];
    clear(dk[0]);
    clear(dv[0]);
    const int warp_first = first_key + warp_key, first_seeing = warp_first * group, first_seeing_all = (warp_first + WarpRows - 1) * group;
    for (; tile * Rows < rows; tile++) {
        const SharedAddress query_tile = stages + tile % 2 * (2 * RowBytes), d_output_tile = query_tile + RowBytes;
        const float* tile_statistics = statistics + tile % 2 * (2 * Rows);
        cp_async_wait<0>();
        if (threadIdx.x < 2 * Rows) {
            statistics[tile % 2 * (2 * Rows) + threadIdx.x] = statistic;
        }

        __syncthreads();
        if ((tile + 1) * Rows < rows) {
            begin(tile + 1, statistic);
        }

        float ds[1][Rows / 8][4];
        if (warp_first < work.rows && (tile + 1) * Rows > first_seeing) {
            float p[1][Rows / 8][4];
            multiply_transposed<D, 1, Rows>(p, k, query_tile);
#pragma unroll
            for (int j = 0; j < Rows / 8; j++) {
                const Floats2 log_sum = *(const Floats2*)(tile_statistics + j * 8 + lane % 4 * 2);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    p[0][j][i] = exp2_approx(fmaf(p[0][j][i], scale * Log2E, -log_sum.v[i % 2]));
                }
            }

            if (tile * Rows < first_seeing_all) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int first_row = (warp_first + lane / 4 + i / 2 * 8) * group - tile * Rows - lane % 4 * 2 - i % 2;
#pragma unroll
                    for (int j = 0; j < Rows / 8; j++) {
                        p[0][j][i] = j * 8 < first_row ? 0.0f : p[0][j][i];
                    }
                }
            }

            multiply_add<D, 1, Rows>(dv, p, d_output_tile);
            multiply_transposed<D, 1, Rows>(ds, v, d_output_tile);
#pragma unroll
            for (int j = 0; j < Rows / 8; j++) {
                const Floats2 mean = *(const Floats2*)(tile_statistics + Rows + j * 8 + lane % 4 * 2);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    ds[0][j][i] = p[0][j][i] * (ds[0][j][i] - mean.v[i % 2]);
                }
            }

            multiply_add<D, 1, Rows>(dk, ds, query_tile);
        } else {
            clear(ds[0]);
        }

        if constexpr (AddsQuery) {
            store_rows<Rows>(d_scores + warp_key * Rows * (int)sizeof(bf16), ds[0], {1.0f, 1.0f});
            __syncthreads();
            add_query_gradient<D, Rows>(d_query, d_scores, key_tile, row_work, tile * Rows, key_head, key_heads, group, scale);
        }
    }

    if constexpr (AddsQuery) {
        __syncthreads();  // all have read the keys
    }

    store_heads<D>(d_keys, d_key_stride, work, warp_first, key_head, 1, (bf16*)shared + warp_key * D, dk[0], {scale, scale});
    store_heads<D>(d_values, d_value_stride, work, warp_first, key_head, 1, (bf16*)shared + (Keys + warp_key) * D, dv[0], {1.0f, 1.0f});
}

// ---- kernels: one for each head dim -------------------------------------------------------------------------------
// Shapes as in TinyLlama.Compute.Backend; strides in elements, multiples of 8; `scale` is 1 / √D. Log sums and delta, (N, Hq),
// lie without gaps.

#define D_QUERY_PARAMETERS \
    bf16 *dq, float *delta, const bf16 *d_output, const bf16 *output, const float *log_sums, const bf16 *query, const bf16 *keys, \
        const bf16 *values, const int *segments, int segment_count, int key_heads, int group, int head_dim, i64 dq_stride, i64 d_output_stride, \
        i64 output_stride, i64 query_stride, i64 key_stride, i64 value_stride, float scale
#define D_QUERY_ARGUMENTS \
    dq, delta, d_output, output, log_sums, query, keys, values, segments, segment_count, key_heads, group, head_dim, dq_stride, d_output_stride, \
        output_stride, query_stride, key_stride, value_stride, scale

template<int D>
__device__ __forceinline__ void attention_d_query(D_QUERY_PARAMETERS) {
    constexpr int R = D <= 64 ? 2 : 1, N = D <= 64 ? 32 : 64;
    Work work;
    if (find_work<Warps * WarpRows * R>(work, segments, segment_count, group, head_dim)) {
        const int key_head = blockIdx.y;
        const BatchKeys<D> source = {
            keys + work.segment.first_row * key_stride + key_head * head_dim, values + work.segment.first_row * value_stride + key_head * head_dim,
            key_stride, value_stride, head_dim};
        query_gradient<D, R, N>(
            dq, delta, d_output, output, log_sums, query, source, work, key_heads, group, dq_stride, d_output_stride, output_stride,
            query_stride, scale);
    }
}

KERNEL(128) void attention_d_query_16(D_QUERY_PARAMETERS) { attention_d_query<16>(D_QUERY_ARGUMENTS); }
KERNEL(128) void attention_d_query_32(D_QUERY_PARAMETERS) { attention_d_query<32>(D_QUERY_ARGUMENTS); }
KERNEL(128) void attention_d_query_64(D_QUERY_PARAMETERS) { attention_d_query<64>(D_QUERY_ARGUMENTS); }
KERNEL(128) void attention_d_query_128(D_QUERY_PARAMETERS) { attention_d_query<128>(D_QUERY_ARGUMENTS); }

#define D_KEY_VALUE_PARAMETERS \
    bf16 *dk, bf16 *dv, float *dq, const float *delta, const bf16 *d_output, const float *log_sums, const bf16 *query, const bf16 *keys, \
        const bf16 *values, const int *segments, int segment_count, int key_heads, int group, int head_dim, i64 dk_stride, i64 dv_stride, \
        i64 d_output_stride, i64 query_stride, i64 key_stride, i64 value_stride, float scale
#define D_KEY_VALUE_ARGUMENTS \
    dk, dv, dq, delta, d_output, log_sums, query, keys, values, segments, segment_count, key_heads, group, head_dim, dk_stride, dv_stride, \
        d_output_stride, query_stride, key_stride, value_stride, scale

template<int D, bool AddsQuery>
__device__ __forceinline__ void attention_d_key_value(D_KEY_VALUE_PARAMETERS) {
    Work work;
    if (find_work<Keys>(work, segments, segment_count, 1, head_dim)) {
        key_value_gradient<D, AddsQuery>(
            dk, dv, dq, delta, d_output, log_sums, query, keys, values, work, key_heads, group, dk_stride, dv_stride, d_output_stride,
            query_stride, key_stride, value_stride, scale);
    }
}

KERNEL(128) void attention_d_key_value_16(D_KEY_VALUE_PARAMETERS) { attention_d_key_value<16, false>(D_KEY_VALUE_ARGUMENTS); }
KERNEL(128) void attention_d_key_value_32(D_KEY_VALUE_PARAMETERS) { attention_d_key_value<32, false>(D_KEY_VALUE_ARGUMENTS); }
KERNEL(128) void attention_d_key_value_64(D_KEY_VALUE_PARAMETERS) { attention_d_key_value<64, false>(D_KEY_VALUE_ARGUMENTS); }
KERNEL(128) void attention_d_key_value_128(D_KEY_VALUE_PARAMETERS) { attention_d_key_value<128, false>(D_KEY_VALUE_ARGUMENTS); }

// The same, and dq (N, Hq · D) of fp32 without gaps += these keys' part.
KERNEL(128) void attention_gradients_16(D_KEY_VALUE_PARAMETERS) { attention_d_key_value<16, true>(D_KEY_VALUE_ARGUMENTS); }
KERNEL(128) void attention_gradients_32(D_KEY_VALUE_PARAMETERS) { attention_d_key_value<32, true>(D_KEY_VALUE_ARGUMENTS); }
KERNEL(128) void attention_gradients_64(D_KEY_VALUE_PARAMETERS) { attention_d_key_value<64, true>(D_KEY_VALUE_ARGUMENTS); }
KERNEL(128) void attention_gradients_128(D_KEY_VALUE_PARAMETERS) { attention_d_key_value<128, true>(D_KEY_VALUE_ARGUMENTS); }

// What attention_gradients begins with: delta = the row sums of dOutput · output, dq = 0. Eight lanes have a head of a token, of which
// there are `rows`.
KERNEL(128) void attention_delta(
    float* delta, float* dq, const bf16* d_output, const bf16* output, int rows, int heads, int head_dim, i64 d_output_stride, i64 output_stride) {
    const i64 row = (i64)blockIdx.x * (Threads / 8) + threadIdx.x / 8;
    const float zero[8] = {};
    float sum = 0.0f;
    if (row < rows) {
        const i64 token = row / heads, column = row % heads * head_dim;
        for (int c = threadIdx.x % 8 * 8; c < head_dim; c += 64) {
            float dy[8], y[8];
            load(dy, d_output + token * d_output_stride + column + c);
            load(y, output + token * output_stride + column + c);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                sum = fmaf(dy[k], y[k], sum);
            }

            store(dq + row * head_dim + c, zero);
        }
    }

    sum = row_sum(sum);
    sum += __shfl_xor_sync(~0u, sum, 4);
    if (row < rows && threadIdx.x % 8 == 0) {
        delta[row] = sum;
    }
}
