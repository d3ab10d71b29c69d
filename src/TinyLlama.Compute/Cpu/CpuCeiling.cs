using System.Diagnostics;
using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// What the machine can do at best, measured: the rate of multiply-add instructions that need no memory, and the rate at
/// which memory can be read. "Share of peak" is relative to the first, decoding is bounded by the second. The instructions
/// are those of fp32, except where a backend multiplies bf16 with instructions of its own.
/// </summary>
/// <param name="Path">The width of the instructions.</param>
/// <param name="Threads">The number of all threads.</param>
/// <param name="OneThread">GFLOP/s (10⁹ additions and multiplications a second) of one thread.</param>
/// <param name="AllThreads">GFLOP/s of all threads together.</param>
/// <param name="OneThreadRead">GB/s (10⁹ bytes a second) that one thread reads from memory.</param>
/// <param name="AllThreadsRead">GB/s that all threads together read from memory.</param>
public sealed record CpuCeiling(
    CpuPath Path, int Threads, double OneThread, double AllThreads, double OneThreadRead, double AllThreadsRead)
{
    // Several times the last cache of most machines.
    private const int ReadBytes = 96 << 20;

    /// <summary>
    /// Measures for about a quarter of a second: the best of many short bursts, because other programs and the clock's
    /// warming up only ever slow a burst down.
    /// </summary>
    /// <param name="backend">Whose path and threads to use; no operation may be running.</param>
    public static CpuCeiling Measure(CpuBackend backend)
    {
        ArgumentNullException.ThrowIfNull(backend);
        return backend.Path switch
        {
            CpuPath.Vector512Amx or CpuPath.Vector512Bf16 or CpuPath.Vector512Vnni or CpuPath.Vector512 => Measure<Lanes512>(backend),
            CpuPath.Vector256 => Measure<Lanes256>(backend),
            CpuPath.Vector128 => Measure<Lanes128>(backend),
            _ => Measure<Lanes1>(backend),
        };
    }

    private static unsafe CpuCeiling Measure<V>(CpuBackend backend)
        where V : struct, ILanes<V>
    {
        using ThreadTeam alone = new(1);
        using Arena arena = backend.Allocate("memory read test", ReadBytes);
        Tensor memory = arena.Take(ReadBytes / 4096, 1024);

        // Pages that nobody has written to are all one page of zeros.
        memory.HostSpan<float>().Fill(1);
        Read<V> read = new() { Memory = memory.F32() };
        (double one, double all) = (backend.Products, backend.Path) switch
        {
            (DType.BF16, CpuPath.Vector512Amx) => Rates(alone, backend.Team, new TileBurst<AmxTile> { Operands = memory.F32() }, TileBurst<AmxTile>.Operations),
            (DType.BF16, CpuPath.Vector512Bf16) =>
                Rates(alone, backend.Team, new TileBurst<Avx512Bf16Tile> { Operands = memory.F32() }, TileBurst<Avx512Bf16Tile>.Operations),
            _ => Rates(alone, backend.Team, default(Burst<V>), 2.0 * V.Count * Burst<V>.Sums * Burst<V>.Steps),
        };
        return new CpuCeiling(
            backend.Path,
            backend.Threads,
            one,
            all,
            ReadBytes / BestSeconds(alone, ref read, Read<V>.Tasks) * 1e-9,
            ReadBytes / BestSeconds(backend.Team, ref read, Read<V>.Tasks) * 1e-9);
    }

    private static (double One, double All) Rates<TBurst>(ThreadTeam alone, ThreadTeam team, TBurst burst, double operations)
        where TBurst : struct, IWork =>
        (operations / BestSeconds(alone, ref burst, 1) * 1e-9,
         operations * team.Threads / BestSeconds(team, ref burst, team.Threads) * 1e-9);

    private static double BestSeconds<TWork>(ThreadTeam team, ref TWork work, int tasks)
        where TWork : struct, IWork
    {
        long best = long.MaxValue;
        long start = Stopwatch.GetTimestamp();
        long end = start;
        for (int run = 0; run < 3 || (end - start) * 16 < Stopwatch.Frequency; run++)
        {
            long before = Stopwatch.GetTimestamp();
            team.Run(ref work, tasks);
            end = Stopwatch.GetTimestamp();
            best = Math.Min(best, end - before);
        }

        return (double)best / Stopwatch.Frequency;
    }

    private struct Burst<V> : IWork
        where V : struct, ILanes<V>
    {
        // More sums than a multiply-add has cycles of latency times instructions a cycle; with two operands they fit 16 registers.
        public const int Sums = 12;

        public const int Steps = 100_000;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public readonly void Run(int task, int thread)
        {
            V x = V.Create(0.5f), y = V.Create(0.25f);
            V s0 = x, s1 = x, s2 = x, s3 = x, s4 = x, s5 = x, s6 = x, s7 = x, s8 = x, s9 = x, s10 = x, s11 = x;
            for (int step = 0; step < Steps; step++)
            {
                s0 = V.Fma(x, y, s0);
                s1 = V.Fma(x, y, s1);
                s2 = V.Fma(x, y, s2);
                s3 = V.Fma(x, y, s3);
                s4 = V.Fma(x, y, s4);
                s5 = V.Fma(x, y, s5);
                s6 = V.Fma(x, y, s6);
                s7 = V.Fma(x, y, s7);
                s8 = V.Fma(x, y, s8);
                s9 = V.Fma(x, y, s9);
                s10 = V.Fma(x, y, s10);
                s11 = V.Fma(x, y, s11);
            }

            Use(s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + s10 + s11);
        }
    }

    // A tile whose operands stay in the first cache runs at the rate of its instruction.
    private unsafe struct TileBurst<T> : IWork
        where T : struct, ITile
    {
        public float* Operands;

        private const int Steps = 128;
        private const int Tiles = 1000;

        public static double Operations => 2.0 * T.Rows * T.Columns * 2 * Steps * Tiles;

        public readonly void Run(int task, int thread)
        {
            float* sums = stackalloc float[T.Rows * T.Columns];
            T.Begin();
            for (int tile = 0; tile < Tiles; tile++)
            {
                T.Multiply(sums, T.Columns, Operands, T.PackedRow, T.Rows, Operands + (T.Rows * Steps), Steps, Operands, accumulate: false);
            }

            T.End();
        }
    }

    private unsafe struct Read<V> : IWork
        where V : struct, ILanes<V>
    {
        public const int Tasks = 48;

        public float* Memory;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public readonly void Run(int task, int thread)
        {
            // In four places at once, of which the processor reads ahead at the same time.
            const int Count = ReadBytes / sizeof(float) / Tasks;
            const int Place = Count / 4;
            float* p = Memory + (task * Count);
            float* end = p + Place;
            V s0 = default, s1 = default, s2 = default, s3 = default;
            for (; p < end; p += 2 * V.Count)
            {
                s0 += V.Load(p) + V.Load(p + V.Count);
                s1 += V.Load(p + Place) + V.Load(p + (Place + V.Count));
                s2 += V.Load(p + (2 * Place)) + V.Load(p + ((2 * Place) + V.Count));
                s3 += V.Load(p + (3 * Place)) + V.Load(p + ((3 * Place) + V.Count));
            }

            Use(s0 + s1 + s2 + s3);
        }
    }

    // Called, so that what was computed is not left out as unused.
    [MethodImpl(MethodImplOptions.NoInlining)]
    private static void Use<V>(V value)
        where V : struct, ILanes<V> => _ = value;
}
