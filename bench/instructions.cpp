// What the integer instructions of quantized products cost on an x86-64 processor with AVX2, from registers and the first
// cache, beside a fused multiply-add of the same run, of which Zen 3 does two a cycle; then those of AVX-512 and AMX, if there:
//   g++ -O2 bench/instructions.cpp -o /tmp/instructions && /tmp/instructions
#include <chrono>
#include <cstdio>
#include <sys/syscall.h>
#include <unistd.h>

static const long Rounds = 100000;
alignas(64) static unsigned char memory[512];

#define REGISTERS "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", "ymm15"

// The best of 50 runs of some instructions, in nanoseconds for each of the `number` that they are.
#define TIME(name, number, instructions) \
    do { \
        double best = 1e9; \
        for (int run = 0; run < 50; run++) { \
            const auto start = std::chrono::steady_clock::now(); \
            for (long i = 0; i < Rounds; i++) { \
                asm volatile(instructions : : "r"(memory) : REGISTERS, "memory"); \
            } \
            const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); \
            best = seconds < best ? seconds : best; \
        } \
        const double each = best / Rounds / (number) * 1e9; \
        fma = fma == 0 ? each : fma; \
        printf("%-58s %.3f ns, %.2f of the time of a multiply-add\n", name, each, each / fma); \
    } while (0)

#define EIGHT_WIDE(instruction) \
    instruction "%%zmm0\n" instruction "%%zmm1\n" instruction "%%zmm2\n" instruction "%%zmm3\n" \
    instruction "%%zmm4\n" instruction "%%zmm5\n" instruction "%%zmm6\n" instruction "%%zmm7\n"

#define SIX_TILES(instruction) \
    instruction "%%tmm0\n" instruction "%%tmm1\n" instruction "%%tmm2\n" instruction "%%tmm3\n" instruction "%%tmm4\n" instruction "%%tmm5\n"

#define EIGHT(instruction) \
    instruction "%%ymm0\n" instruction "%%ymm1\n" instruction "%%ymm2\n" instruction "%%ymm3\n" \
    instruction "%%ymm4\n" instruction "%%ymm5\n" instruction "%%ymm6\n" instruction "%%ymm7\n"

// 32 products of a row of inputs by weights whose magnitudes are in ymm10 and signs in ymm9; the row's sums.
#define FOUR_ROWS(product) product("0", "5") product("48", "6") product("96", "7") product("144", "8")
#define UNSIGNED(offset, sum) \
    "vpbroadcastd " offset "(%0), %%ymm11\n vpmaddubsw %%ymm11, %%ymm10, %%ymm11\n vpaddw %%ymm11, %%ymm" sum ", %%ymm" sum "\n"
#define SIGNED(offset, sum) \
    "vpbroadcastd " offset "(%0), %%ymm11\n vpsignb %%ymm9, %%ymm11, %%ymm11\n vpmaddubsw %%ymm11, %%ymm10, %%ymm11\n" \
    "vpmaddwd %%ymm4, %%ymm11, %%ymm11\n vpaddd %%ymm11, %%ymm" sum ", %%ymm" sum "\n"

// A product of int16 and the sum that waits for it.
#define SUMMED(product, sum) \
    "vpmaddwd %%ymm14, %%ymm15, %%ymm" product "\n vpaddd %%ymm" product ", %%ymm" sum ", %%ymm" sum "\n"

int main() {
    double fma = 0;
    TIME("vfmadd231ps (8 products in fp32)", 8, EIGHT("vfmadd231ps %%ymm14, %%ymm15, "));
    TIME("vpmaddubsw", 8, EIGHT("vpmaddubsw %%ymm14, %%ymm15, "));
    TIME("vpmaddwd", 8, EIGHT("vpmaddwd %%ymm14, %%ymm15, "));
    TIME("vpsignb", 8, EIGHT("vpsignb %%ymm14, %%ymm15, "));
    TIME("vpmaddubsw and vpsignb, each", 16, EIGHT("vpsignb %%ymm14, %%ymm15, %%ymm13\n vpmaddubsw %%ymm14, %%ymm15, "));
    TIME("vpmaddubsw and vpmaddwd, each", 16, EIGHT("vpmaddwd %%ymm14, %%ymm15, %%ymm13\n vpmaddubsw %%ymm14, %%ymm15, "));
    TIME("vpmaddwd whose result vpaddd adds, both", 8,
         SUMMED("8", "0") SUMMED("9", "1") SUMMED("10", "2") SUMMED("11", "3") SUMMED("8", "4") SUMMED("9", "5") SUMMED("10", "6") SUMMED("11", "7"));
    TIME("32 products of 4 bits: broadcast, multiply, add", 4, FOUR_ROWS(UNSIGNED));
    TIME("32 products of 8 bits: broadcast, sign, multiply, widen, add", 4,
         "vmovups 256(%0), %%ymm9\n vpabsb %%ymm9, %%ymm10\n" FOUR_ROWS(SIGNED));

    if (!__builtin_cpu_supports("avx512bf16")) return 0;
    TIME("vfmadd231ps of 512 bits (16 products in fp32)", 8, EIGHT_WIDE("vfmadd231ps %%zmm14, %%zmm15, "));
    TIME("vdpbf16ps (32 products)", 8, EIGHT_WIDE("vdpbf16ps %%zmm14, %%zmm15, "));
    TIME("vpdpbusd (64 products)", 8, EIGHT_WIDE("vpdpbusd %%zmm14, %%zmm15, "));

    // Linux gives tiles to a process that asks for them; palette 1, 16 rows of 64 bytes each.
    if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 0;
    memory[0] = 1;
    for (int tile = 0; tile < 8; tile++) {
        memory[16 + 2 * tile] = 64;
        memory[48 + tile] = 16;
    }

    asm volatile("ldtilecfg (%0)" : : "r"(memory) : "memory");
    TIME("tdpbf16ps (8192 products)", 6, SIX_TILES("tdpbf16ps %%tmm7, %%tmm6, "));
    TIME("tdpbssd (16384 products)", 6, SIX_TILES("tdpbssd %%tmm7, %%tmm6, "));
    asm volatile("tilerelease");
}
