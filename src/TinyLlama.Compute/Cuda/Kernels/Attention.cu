#include "Attention.cuh"

// Adds what later keys give a row to what those before gave: the same operations wherever spans are added.
struct Merge {
    float keep, take;

    __device__ __forceinline__ Merge(float& max, float& sum, float next_max, float next_sum, float scale) {
        const float top = fmaxf(max, next_max);
        keep = exp2_approx((max - top) * scale);
        take = exp2_approx((next_max - top) * scale);
        max = top;
        sum = fmaf(sum, keep, next_sum * take);
    }

    __device__ __forceinline__ float operator()(float o, float next) const { return fmaf(o, keep, next * take); }
};

// What some keys give R · 16 rows: o = Σ exp2(score - max) · value, and the sum of these weights. `scale` is log2(e) / √D.
template<int D, int R>
struct Softmax {
    float o[R][D / 8][4];
    float max[R][2], sum[R][2];  // of the row in each half; `sum` of a lane's own columns until `reduce`

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int r = 0; r < R; r++) {
            clear(o[r]);
            max[r][0] = max[r][1] = -infinity();
            sum[r][0] = sum[r][1] = 0;
        }
    }

    // Turns the scores of a tile of keys into weights, and shrinks what was summed under a smaller maximum. A row that sees
    // no key yet keeps -∞ and zeros.
    __device__ __forceinline__ void weigh(float (&scores)[R][Keys / 8][4], float scale) {
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float top = max[r][half];
#pragma unroll
                for (int j = 0; j < Keys / 8; j++) {
                    top = fmaxf(top, fmaxf(scores[r][j][half * 2], scores[r][j][half * 2 + 1]));
                }

                top = row_max(top);
                const float finite = top == -infinity() ? 0.0f : top;
                const float shrink = exp2_approx((max[r][half] - finite) * scale);
                const float offset = -finite * scale;
                max[r][half] = top;
                sum[r][half] *= shrink;
#pragma unroll
                for (int j = 0; j < Keys / 8; j++) {
#pragma unroll
                    for (int i = half * 2; i < half * 2 + 2; i++) {
                        scores[r][j][i] = exp2_approx(fmaf(scores[r][j][i], scale, offset));
                        sum[r][half] += scores[r][j][i];
                    }
                }

#pragma unroll
                for (int j = 0; j < D / 8; j++) {
                    o[r][j][half * 2] *= shrink;
                    o[r][j][half * 2 + 1] *= shrink;
                }
            }
        }
    }

    __device__ __forceinline__ void reduce() {
#pragma unroll
        for (int r = 0; r < R; r++) {
            sum[r][0] = row_sum(sum[r][0]);
            sum[r][1] = row_sum(sum[r][1]);
        }
    }

    // Adds what the keys of the next span give; both are reduced.
    __device__ __forceinline__ void merge(const Softmax& next, float scale) {
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const Merge merge(max[r][half], sum[r][half], next.max[r][half], next.sum[r][half], scale);
#pragma unroll
                for (int j = 0; j < D / 8; j++) {
                    o[r][j][half * 2] = merge(o[r][j][half * 2], next.o[r][j][half * 2]);
                    o[r][j][half * 2 + 1] = merge(o[r][j][half * 2 + 1], next.o[r][j][half * 2 + 1]);
                }
            }
        }
    }
};

__device__ __forceinline__ float log_sum_exp(float max, float sum, float scale) { return fmaf(max, scale, log2_approx(sum)) * Ln2; }

// Partials of a span: for each query head of each token D sums, the maximum and the sum of weights, in D + 4 floats.
template<int D>
__device__ __forceinline__ void leave(
    float* partials, const Softmax<D, 1>& span, const Work& work, int first, int key_head, int group, int heads) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first + half * 8 + lane / 4;
        if (row < work.rows) {
            float* to = partials + head_row(row, work.segment.first_row, key_head, group, heads, 1) * (D + 4);
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                *(Floats2*)(to + j * 8 + lane % 4 * 2) = {{span.o[0][j][half * 2], span.o[0][j][half * 2 + 1]}};
            }

            if (lane % 4 == 0) {
                *(Floats2*)(to + D) = {{span.max[0][half], span.sum[0][half]}};
            }
        }
    }
}

// Keys and values in a cache of bf16, (block, key head, position % 64, channel).
template<int D>
struct CachedKeys {
    const bf16 *keys, *values;
    const int* table;
    int key_heads, key_head, head_dim;

    __device__ __forceinline__ void begin(SharedAddress key_tile, SharedAddress value_tile, int tile, int count) {
        const i64 from = ((i64)table[tile] * key_heads + key_head) * (Keys * head_dim);
        load_rows<D, Keys>(key_tile, keys + from, head_dim, count, head_dim);
        load_rows<D, Keys>(value_tile, values + from, head_dim, count, head_dim);
    }

    __device__ __forceinline__ void end(SharedAddress, SharedAddress) {}
};

// The same in Q8_0: of each block and key head bytes, (position % 64, channel), then scales in f16, (position % 64,
// channel / 32). Each thread has a room in shared memory for the bytes that it loads, and widens them to bf16 when a tile is due.
template<int D>
struct QuantizedKeys {
    const u8 *keys, *values;
    const int* table;
    int key_heads, key_head, head_dim;
    u8* room;  // 2 · Keys · D bytes

    __device__ __forceinline__ void begin(SharedAddress, SharedAddress, int tile, int count) {
        const i64 from = ((i64)table[tile] * key_heads + key_head) * (Keys * 34 * groups());
        fetch(room, key_scales, keys + from, count);
        fetch(room + Keys * D, value_scales, values + from, count);
    }

    __device__ __forceinline__ void end(SharedAddress key_tile, SharedAddress value_tile) const {
        widen(key_tile, room, key_scales);
        widen(value_tile, room + Keys * D, value_scales);
    }

private:
    static constexpr int Chunks = D / 16;
    static constexpr int RowsAtOnce = Threads / Chunks;
    static constexpr int Pieces = (Keys + RowsAtOnce - 1) / RowsAtOnce;

    float key_scales[Pieces], value_scales[Pieces];

    // Of channels of a head that share a scale.
    __device__ __forceinline__ int groups() const { return (head_dim + 31) / 32; }

    __device__ __forceinline__ void fetch(u8* room, float (&scales)[Pieces], const u8* from, int count) const {
        const int row = threadIdx.x / Chunks, chunk = threadIdx.x % Chunks;
        const SharedAddress to = shared_address(room) + threadIdx.x * 16;
        const u8* bytes = from + row * head_dim + chunk * 16;
        const f16* from_scales = (const f16*)(from + Keys * 32 * groups()) + row * groups() + chunk / 2;
        count = chunk * 16 < head_dim ? min(count, Keys) : 0;
#pragma unroll
        for (int i = 0; i < Pieces; i++, bytes += RowsAtOnce * head_dim, from_scales += RowsAtOnce * groups()) {
            const bool is_there = row + i * RowsAtOnce < count;
            scales[i] = is_there ? to_float(*from_scales) : 0.0f;
            if (row + i * RowsAtOnce < Keys) {
                cp_async_16(to + i * Threads * 16, bytes, is_there ? 16 : 0);
            }
        }
    }

    __device__ __forceinline__ static void widen(SharedAddress tile, const u8* room, const float (&scales)[Pieces]) {
        const int row = threadIdx.x / Chunks;
        const SharedAddress to = address<D>(tile, row, threadIdx.x % Chunks * 2);
#pragma unroll
        for (int i = 0; i < Pieces; i++) {
            if (row + i * RowsAtOnce < Keys) {
                const Words4 bytes = *(const Words4*)(room + (i * Threads + threadIdx.x) * 16);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    u32 words[4];
#pragma unroll
                    for (int pair = 0; pair < 4; pair++) {
                        const u32 two = bytes.v[half * 2 + pair / 2] >> pair % 2 * 16;
                        words[pair] = pack_bf16x2(signed_byte(two) * scales[i], signed_byte(two >> 8) * scales[i]);
                    }

                    store_shared_16((to ^ half * 16) + i * RowsAtOnce * D * (int)sizeof(bf16), words);
                }
            }
        }
    }

    __device__ __forceinline__ static float signed_byte(u32 bits) { return (float)(signed char)(bits & 0xff); }
};

// R · 16 head rows a warp. With InSpans the sums start anew every Span positions, and spans are merged in order; in a grid
// of depth Z > 1 block z takes the spans z, z + Z, … and leaves each in `partials`, for attention_merge. So a row has the same
// bits for any Z, and beside any other rows.
template<int D, int R, bool InSpans, class Source>
__device__ __forceinline__ void forward(
    bf16* output, float* log_sums, float* partials, const bf16* query, Source source, Work work, int tokens, int key_heads, int group,
    i64 output_stride, i64 query_stride, float scale) {
    constexpr int Rows = Warps * WarpRows * R;
    DYNAMIC_SHARED(shared);
    constexpr int TileBytes = Keys * D * sizeof(bf16);
    bf16* query_rows = (bf16*)shared + threadIdx.x / 32 * WarpRows * R * D;  // this warp's
    const SharedAddress query_tile = shared_address(shared), stages = query_tile + Rows * D * sizeof(bf16);

    const Segment& segment = work.segment;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WarpRows * R;
    const int key_head = blockIdx.y, heads = key_heads * group;
    work.first = (work.rows - 1) / Rows * Rows - work.first;  // the rows with most keys first
    const int warp_first = work.first + warp_row;
    const int warp_end = min(warp_first + WarpRows * R, work.rows);
    const int key_count = segment.first_position + (min(work.first + Rows, work.rows) - 1) / group + 1;
    const int seen_by_all = segment.first_position + warp_first / group + 1;
    const int seen_by_any = warp_first < warp_end ? segment.first_position + (warp_end - 1) / group + 1 : 0;

    int tile = InSpans ? blockIdx.z * SpanTiles : 0;
    if (tile * Keys >= key_count) {
        return;
    }

    load_heads<D, Rows>(query_tile, query, query_stride, work, work.first, key_head, group);
    source.begin(stages, stages + TileBytes, tile, key_count - tile * Keys);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    LeftRows<D, D <= 64> q[R];
    int last_key[R][2];
#pragma unroll
    for (int r = 0; r < R; r++) {
        last_key[r][0] = segment.first_position + (warp_first + r * WarpRows + lane / 4) / group;
        last_key[r][1] = segment.first_position + (warp_first + r * WarpRows + lane / 4 + 8) / group;
        q[r].set(query_tile + (warp_row + r * WarpRows) * D * (int)sizeof(bf16));
    }

    Softmax<D, R> span, total;
    span.reset();
    total.reset();
    int next;
    for (int stage = 0; tile * Keys < key_count; tile = next, stage ^= 1) {
        const SharedAddress key_tile = stages + stage * (2 * TileBytes), value_tile = key_tile + TileBytes;
        cp_async_wait<0>();
        source.end(key_tile, value_tile);
        __syncthreads();  // this stage is there, and nobody reads the other one
        const bool ends_span = InSpans && (tile + 1) % SpanTiles == 0;
        next = tile + 1 + (ends_span ? (gridDim.z - 1) * SpanTiles : 0);
        if (next * Keys < key_count) {
            const SharedAddress other = stages + (stage ^ 1) * (2 * TileBytes);
            source.begin(other, other + TileBytes, next, key_count - next * Keys);
            cp_async_commit();
        }

        if (tile * Keys < seen_by_any) {
            float scores[R][Keys / 8][4];
            multiply_transposed<D, R, Keys>(scores, q, key_tile);
            if ((tile + 1) * Keys > seen_by_all) {
                mask(scores, last_key, tile * Keys);
            }

            span.weigh(scores, scale);
            multiply_add<D, R, Keys>(span.o, scores, value_tile);
        }

        if constexpr (InSpans) {
            if (!ends_span && next * Keys < key_count) {
                continue;
            }

            span.reduce();
            if (gridDim.z > 1) {
                leave(partials + (i64)(tile / SpanTiles) * tokens * heads * (D + 4), span, work, warp_first, key_head, group, heads);
            } else {
                total.merge(span, scale);
            }

            span.reset();
        }
    }

    if (InSpans && gridDim.z > 1) {
        return;
    }

    Softmax<D, R>& result = InSpans ? total : span;
    if (!InSpans) {
        result.reduce();
    }

#pragma unroll
    for (int r = 0; r < R; r++) {
        const int first = warp_first + r * WarpRows;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first + half * 8 + lane / 4;
            if (lane % 4 == 0 && row < work.rows) {
                log_sums[head_row(row, segment.first_row, key_head, group, heads, 1)] =
                    log_sum_exp(result.max[r][half], result.sum[r][half], scale);
            }
        }

        store_heads<D>(
            output, output_stride, work, first, key_head, group, query_rows + r * WarpRows * D, result.o[r],
            {1.0f / result.sum[r][0], 1.0f / result.sum[r][1]});
    }
}

// output = what the spans left in partials, merged in order: four channels of a head a thread.
template<int D>
__device__ __forceinline__ void merge_spans(
    bf16* output, float* log_sums, const float* partials, const int* positions, int tokens, int heads, int head_dim,
    i64 output_stride, float scale) {
    const int at = blockIdx.x * Threads + threadIdx.x, row = at / (D / 4), channel = at % (D / 4) * 4, token = row / heads;
    if (token >= tokens || channel >= head_dim) {
        return;
    }

    float o[4] = {}, max = -infinity(), sum = 0;
    for (int span = 0; span <= positions[token] / Span; span++) {
        const float* from = partials + ((i64)span * tokens * heads + row) * (D + 4);
        const F32x4 next = *(const F32x4*)(from + channel);
        const Floats2 statistics = *(const Floats2*)(from + D);
        const Merge merge(max, sum, statistics.v[0], statistics.v[1], scale);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            o[i] = merge(o[i], next.v[i]);
        }
    }

    const float factor = 1.0f / sum;
    bf16* to = output + token * output_stride + (row - token * heads) * head_dim + channel;
    *(Words2*)to = {{pack_bf16x2(o[0] * factor, o[1] * factor), pack_bf16x2(o[2] * factor, o[3] * factor)}};
    if (channel == 0) {
        log_sums[row] = log_sum_exp(max, sum, scale);
    }
}

// ---- kernels: one for each head dim -------------------------------------------------------------------------------
// Shapes as in TinyLlama.Compute.Backend; strides in elements, multiples of 8; `scale` is 1 / √D. Log sums and delta, (N, Hq),
// lie without gaps.

#define BATCH_PARAMETERS \
    bf16 *output, float *log_sums, const bf16 *query, const bf16 *keys, const bf16 *values, const int *segments, int segment_count, \
        int key_heads, int group, int head_dim, i64 output_stride, i64 query_stride, i64 key_stride, i64 value_stride, float scale
#define BATCH_ARGUMENTS \
    output, log_sums, query, keys, values, segments, segment_count, key_heads, group, head_dim, output_stride, query_stride, key_stride, \
        value_stride, scale

template<int D>
__device__ __forceinline__ void attention_forward(BATCH_PARAMETERS) {
    constexpr int R = D <= 64 ? 2 : 1;
    Work work;
    if (find_work<Warps * WarpRows * R>(work, segments, segment_count, group, head_dim)) {
        const int key_head = blockIdx.y;
        const BatchKeys<D> source = {
            keys + work.segment.first_key * key_stride + key_head * head_dim, values + work.segment.first_key * value_stride + key_head * head_dim,
            key_stride, value_stride, head_dim};
        forward<D, R, false>(
            output, log_sums, nullptr, query, source, work, 0, key_heads, group, output_stride, query_stride, scale * Log2E);
    }
}

KERNEL(128) void attention_forward_16(BATCH_PARAMETERS) { attention_forward<16>(BATCH_ARGUMENTS); }
KERNEL(128) void attention_forward_32(BATCH_PARAMETERS) { attention_forward<32>(BATCH_ARGUMENTS); }
KERNEL(128) void attention_forward_64(BATCH_PARAMETERS) { attention_forward<64>(BATCH_ARGUMENTS); }
KERNEL(128) void attention_forward_128(BATCH_PARAMETERS) { attention_forward<128>(BATCH_ARGUMENTS); }

#define CACHE_PARAMETERS \
    bf16 *output, float *log_sums, float *partials, const bf16 *query, const u8 *keys, const u8 *values, const int *segments, \
        const int *table, int segment_count, int tokens, int key_heads, int group, int head_dim, i64 output_stride, i64 query_stride, float scale
#define CACHE_ARGUMENTS \
    output, log_sums, partials, query, keys, values, segments, table, segment_count, tokens, key_heads, group, head_dim, \
        output_stride, query_stride, scale

template<int D>
__device__ __forceinline__ void attention_cached(CACHE_PARAMETERS) {
    Work work;
    if (find_work<Warps * WarpRows>(work, segments, segment_count, group, head_dim)) {
        const CachedKeys<D> source = {
            (const bf16*)keys, (const bf16*)values, table + work.segment.first_key, key_heads, (int)blockIdx.y, head_dim};
        forward<D, 1, true>(
            output, log_sums, partials, query, source, work, tokens, key_heads, group, output_stride, query_stride, scale * Log2E);
    }
}

template<int D>
__device__ __forceinline__ void attention_cached_q8_0(CACHE_PARAMETERS) {
    DYNAMIC_SHARED(shared);
    Work work;
    if (find_work<Warps * WarpRows>(work, segments, segment_count, group, head_dim)) {
        QuantizedKeys<D> source;
        source.keys = keys;
        source.values = values;
        source.table = table + work.segment.first_key;
        source.key_heads = key_heads;
        source.key_head = blockIdx.y;
        source.head_dim = head_dim;
        source.room = shared + (Warps * WarpRows + 4 * Keys) * D * sizeof(bf16);
        forward<D, 1, true>(
            output, log_sums, partials, query, source, work, tokens, key_heads, group, output_stride, query_stride, scale * Log2E);
    }
}

KERNEL(128) void attention_cached_16(CACHE_PARAMETERS) { attention_cached<16>(CACHE_ARGUMENTS); }
KERNEL(128) void attention_cached_32(CACHE_PARAMETERS) { attention_cached<32>(CACHE_ARGUMENTS); }
KERNEL(128) void attention_cached_64(CACHE_PARAMETERS) { attention_cached<64>(CACHE_ARGUMENTS); }
KERNEL(128) void attention_cached_128(CACHE_PARAMETERS) { attention_cached<128>(CACHE_ARGUMENTS); }
KERNEL(128) void attention_cached_q8_0_16(CACHE_PARAMETERS) { attention_cached_q8_0<16>(CACHE_ARGUMENTS); }
KERNEL(128) void attention_cached_q8_0_32(CACHE_PARAMETERS) { attention_cached_q8_0<32>(CACHE_ARGUMENTS); }
KERNEL(128) void attention_cached_q8_0_64(CACHE_PARAMETERS) { attention_cached_q8_0<64>(CACHE_ARGUMENTS); }
KERNEL(128) void attention_cached_q8_0_128(CACHE_PARAMETERS) { attention_cached_q8_0<128>(CACHE_ARGUMENTS); }

#define MERGE_PARAMETERS \
    bf16 *output, float *log_sums, const float *partials, const int *positions, int tokens, int heads, int head_dim, \
        i64 output_stride, float scale
#define MERGE_ARGUMENTS output, log_sums, partials, positions, tokens, heads, head_dim, output_stride, scale * Log2E

KERNEL(128) void attention_merge_16(MERGE_PARAMETERS) { merge_spans<16>(MERGE_ARGUMENTS); }
KERNEL(128) void attention_merge_32(MERGE_PARAMETERS) { merge_spans<32>(MERGE_ARGUMENTS); }
KERNEL(128) void attention_merge_64(MERGE_PARAMETERS) { merge_spans<64>(MERGE_ARGUMENTS); }
KERNEL(128) void attention_merge_128(MERGE_PARAMETERS) { merge_spans<128>(MERGE_ARGUMENTS); }
