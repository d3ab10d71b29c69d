using System.Diagnostics;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;

namespace TinyLlama.Cli.Bench;

/// <summary>What a device can do at best, measured in the run that it is compared with.</summary>
/// <param name="Flops">10⁹ additions and multiplications a second: of a CPU those of instructions without memory, of a GPU those of a large product.</param>
/// <param name="Bytes">10⁹ bytes a second from memory: read by a CPU; read and written by a GPU's copy.</param>
/// <param name="OneThread">As <paramref name="Flops"/>, of one thread of a CPU; 0 of a GPU.</param>
internal sealed record Ceiling(double Flops, double Bytes, double OneThread)
{
    // What takes longer than this is not hidden by the launch of it; what is larger than these need not be tried.
    private const double LongEnough = 1e-3;
    private const int LargestProduct = 8192;
    private const int LargestCopyRows = 65536;
    private const int CopyColumns = 4096;
    private const int Runs = 8;

    /// <summary>Measures: some tenths of a second.</summary>
    /// <param name="device">The device; no operation may be running.</param>
    public static Ceiling Measure(Backend device)
    {
        if (device is CpuBackend cpu)
        {
            var ceiling = CpuCeiling.Measure(cpu);
            return new Ceiling(ceiling.AllThreads, ceiling.AllThreadsRead, ceiling.OneThread);
        }

        return new Ceiling(ProductRate(device), CopyRate(device), 0);
    }

    /// <summary>The better of two: other programs only ever lower one.</summary>
    public Ceiling Better(Ceiling other) =>
        new(Math.Max(Flops, other.Flops), Math.Max(Bytes, other.Bytes), Math.Max(OneThread, other.OneThread));

    private static double ProductRate(Backend device)
    {
        for (int size = 256; ; size *= 2)
        {
            using Arena arena = device.Allocate("ceiling", 12L * size * size);
            Tensor values = arena.TakeRandom(device, size, size);
            Tensor input = arena.Take(size, size, device.ActivationType), output = arena.Take(size, size, device.ActivationType);
            Weight weight = new(values);
            weight.TakePacked(arena, device, backward: false);
            device.Pack(weight);
            device.Copy(input, values);
            double seconds = Best(device, values.Elements(0, 1), () => device.MatMul(output, input, weight));
            if (seconds >= LongEnough || size == LargestProduct)
            {
                return 2e-9 * size * size * size / seconds;
            }
        }
    }

    private static double CopyRate(Backend device)
    {
        for (int rows = 256; ; rows *= 4)
        {
            using Arena arena = device.Allocate("ceiling", (4L * rows * CopyColumns) + Arena.Alignment);
            Tensor single = arena.Take(1, 1);
            Tensor source = arena.Take(rows, CopyColumns, DType.BF16), destination = arena.Take(rows, CopyColumns, DType.BF16);
            double seconds = Best(device, single, () => device.Copy(destination, source));
            if (seconds >= LongEnough || rows == LargestCopyRows)
            {
                return 4e-9 * rows * CopyColumns / seconds;
            }
        }
    }

    private static double Best(Backend device, Tensor single, Action action)
    {
        double best = double.PositiveInfinity;
        for (int run = 0; run < Runs; run++)
        {
            long start = Stopwatch.GetTimestamp();
            action();
            TimedBackend.Wait(device, single);
            best = Math.Min(best, Stopwatch.GetElapsedTime(start).TotalSeconds);
        }

        return best;
    }
}
