// How fast one row of inputs goes through quantized weights in memory, by where and how far ahead they are fetched: the loads and
// products of the kernel of vpdpbusd, without its sums' way to memory. Each variant is run once a round; medians and bests of 40 rounds.
//   g++ -std=c++20 -O3 -march=icelake-server -pthread bench/fetching.cpp -o /tmp/fetching && /tmp/fetching THREADS
#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#include <sys/mman.h>
#include <thread>
#include <vector>

static const long Bytes = 400L << 20;
static const int Rounds = 40, PanelsOfTask = 4, Group = 32, GroupBytes = 48;
static char *weights, rounded[1 << 16];

// A row by `Panels` panels in turns, block after block; fetched to the first cache or to the second, or not at all (ahead 0).
template <int BlockBytes, int Panels, bool First>
static void multiply(float* sums, const char* panel, long panelBytes, int blocks, int ahead, long next) {
    const __m512i nibbles = _mm512_set1_epi32(0x0F0F0F0F);
    const char* x = rounded;
    for (int block = 0; block < blocks; block++, panel += BlockBytes, x += GroupBytes) {
        const char* fetched = panel + ahead * BlockBytes + (blocks - block <= ahead ? next : 0);
        for (int p = 0; p < Panels; p++) {
            const int piece = BlockBytes / Panels;
            for (int at = p * piece; ahead > 0 && at < (p + 1) * piece; at += 64)
                for (int q = 0; q < Panels; q++)
                    _mm_prefetch(fetched + q * panelBytes + at, First ? _MM_HINT_T0 : _MM_HINT_T1);

            const char* bytes = panel + p * panelBytes;
            const __m512 scale = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)bytes)), _mm512_set1_ps(*(const float*)(x + Group)));
            __m512i low = _mm512_setzero_si512(), high = low;
            for (int i = 0; i < 4; i++) {
                const __m512i v = _mm512_loadu_si512(bytes + 32 + 64 * i);
                const __m512i w = BlockBytes == 288 ? _mm512_srli_epi32(v, 4) : _mm512_loadu_si512(bytes + 288 + 64 * i);
                low = _mm512_dpbusd_epi32(low, _mm512_and_si512(v, nibbles), _mm512_set1_epi32(*(const int*)(x + 4 * i)));
                high = _mm512_dpbusd_epi32(high, _mm512_and_si512(w, nibbles), _mm512_set1_epi32(*(const int*)(x + 16 + 4 * i)));
            }

            const __m512 products = _mm512_cvtepi32_ps(_mm512_add_epi32(low, high));
            _mm512_storeu_ps(sums + 16 * p, _mm512_fmadd_ps(products, scale, _mm512_loadu_ps(sums + 16 * p)));
        }
    }
}

struct Variant {
    const char* name;
    void (*run)(float*, const char*, long, int, int, long);
    int panels, ahead;
    bool next;
};

template <int BlockBytes>
static void measure(const char* type, int inputs, int threads) {
    const int near = (2048 + BlockBytes - 1) / BlockBytes;
    const Variant variants[] = {
        {"to the first cache", multiply<BlockBytes, 4, true>, 4, near, false},
        {"and what is read next", multiply<BlockBytes, 4, true>, 4, near, true},
        {"to the second cache", multiply<BlockBytes, 4, false>, 4, near, false},
        {"and what is read next", multiply<BlockBytes, 4, false>, 4, near, true},
        {"twice as far", multiply<BlockBytes, 4, false>, 4, 2 * near, true},
        {"nothing, panel after panel", multiply<BlockBytes, 1, false>, 1, 0, false},
        {"four times as far, panel after panel", multiply<BlockBytes, 1, false>, 1, 4 * near, true},
    };
    const int blocks = inputs / Group, count = std::size(variants);
    const long panelBytes = blocks * (long)BlockBytes, tasks = Bytes / panelBytes / PanelsOfTask;
    std::vector<std::vector<double>> seconds(count);
    std::atomic<long> claimed;
    std::barrier together(threads);
    auto run = [&](int thread) {
        alignas(64) float sums[16 * PanelsOfTask];
        for (int i = 0; i < Rounds * count; i++) {
            const Variant& variant = variants[i % count];
            if (thread == 0)
                claimed = 0;
            together.arrive_and_wait();
            const auto start = std::chrono::steady_clock::now();
            for (long task; (task = claimed++) < tasks;) {
                for (int p = 0; p < PanelsOfTask; p += variant.panels) {
                    memset(sums, 0, sizeof sums);
                    const long panel = task * PanelsOfTask + p;
                    const long next = p + variant.panels < PanelsOfTask ? panel + variant.panels : (task + threads) * PanelsOfTask;
                    variant.run(sums, weights + panel * panelBytes, panelBytes, blocks, variant.ahead, variant.next ? (next - panel - 1) * panelBytes : 0);
                }
            }

            together.arrive_and_wait();
            if (thread == 0)
                seconds[i % count].push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; thread++)
        others.emplace_back(run, thread);
    run(0);
    for (std::thread& other : others)
        other.join();
    for (int i = 0; i < count; i++) {
        std::sort(seconds[i].begin(), seconds[i].end());
        const double gigabytes = tasks * PanelsOfTask * panelBytes * 1e-9;
        printf("%s, %d inputs, %-36s %5.1f GB/s median %5.1f best\n", type, inputs, variants[i].name, gigabytes / seconds[i][Rounds / 2], gigabytes / seconds[i][0]);
    }
}

int main(int count, char** arguments) {
    const int threads = count > 1 ? atoi(arguments[1]) : 1;
    const long huge = 2 << 20;
    char* memory = (char*)mmap(nullptr, Bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    weights = (char*)(((unsigned long)memory + huge - 1) & -huge);
    madvise(weights, Bytes, MADV_HUGEPAGE);
    memset(weights, 1, Bytes);
    memset(rounded, 1, sizeof rounded);
    for (int inputs : {2048, 5632}) {
        measure<288>("Q4_0", inputs, threads);
        measure<544>("Q8_0", inputs, threads);
    }
}
