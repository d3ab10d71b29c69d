using TinyLlama.Compute.Cpu;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Cpu;

public abstract class AdamWTests(CpuPath path) : OperationTests(path)
{
    private static readonly AdamWSettings s_settings = new(0.9f, 0.95f, 1e-8f, 0.1f, MaxNorm: 0);

    [Fact]
    public void Equals_the_golden_values()
    {
        GoldenFile golden = GoldenFile.Open(SharedFiles.Require("goldens/llama-tiny/ops.safetensors"));
        double[] rates = [1e-3, 8e-4, 6e-4, 4e-4, 2e-4];
        float[] start = golden.ReadSingles("adamw.p0");
        int count = start.Length;
        Tensor values = Device.Put(1, count, start);
        Tensor first = Device.Take(1, count), second = Device.Take(1, count), norm = Device.Take(1, 1, DType.F64);
        for (int t = 1; t <= rates.Length; t++)
        {
            Tensor gradient = Device.Put(1, count, golden.ReadSingles($"adamw.g{t}"));
            Device.Backend.AdamW(values, first, second, gradient, Step(rates[t - 1], t), norm, s_settings);

            Close(golden.Read($"adamw.m{t}").Values, Device.Get(first), 5e-7, $"m{t}");
            Close(golden.Read($"adamw.v{t}").Values, Device.Get(second), 5e-7, $"v{t}");
            Assert.InRange(MeanError(golden.Read($"adamw.p{t}").Values, Device.Get(values)), 0, 5e-8);
            Assert.All(Device.Get(gradient), g => Assert.Equal(0, g));
        }
    }

    [Fact]
    public void Norm_and_clipping_equal_the_golden_values()
    {
        GoldenFile golden = GoldenFile.Open(SharedFiles.Require("goldens/llama-tiny/ops.safetensors"));
        float[] a = golden.ReadSingles("clip.g_a"), b = golden.ReadSingles("clip.g_b");
        Tensor[] gradients = [Device.Put(9, 5, a), Device.Put(1, 13, b)];
        Tensor total = Device.Take(1, 1, DType.F64);
        Device.Backend.SumOfSquares(total, Device.Take(1, Backend.SumOfSquaresPartials(gradients), DType.F64), gradients);
        double norm = golden.Read("clip.norm").Values[0];
        Assert.Equal(norm * norm, Device.GetDouble(total), 1e-7 * norm * norm);

        // With β₁ = 0 the first moment is the clipped gradient.
        AdamWSettings settings = new(0, 0.95f, 1e-8f, 0, MaxNorm: 1);
        foreach ((Tensor gradient, string name) in gradients.Zip(["clip.out_a", "clip.out_b"]))
        {
            Tensor[] others = [.. Enumerable.Range(0, 3).Select(_ => Device.Take(gradient.Rows, gradient.Columns))];
            Device.Backend.AdamW(others[0], others[1], others[2], gradient, Step(1e-3, 1), total, settings);
            Close(golden.Read(name).Values, Device.Get(others[1]), 1e-6, name);
        }
    }

    [Theory]
    [InlineData(1)]
    [InlineData(37)]
    [InlineData(40_000)]
    public void Equals_the_definition(int count)
    {
        float[] p = Normal(count), m = Normal(count, 0.1), g = Normal(count), v = Array.ConvertAll(Normal(count), x => x * x);
        Tensor values = Device.Put(1, count, p), first = Device.Put(1, count, m), second = Device.Put(1, count, v);
        Tensor gradient = Device.Put(1, count, g), norm = Device.Take(1, 1, DType.F64);
        double[] squares = [400];
        Device.Backend.Write<double>(norm, squares);

        Device.Backend.AdamW(values, first, second, gradient, Step(1e-2, 7), norm, s_settings with { MaxNorm = 5 });

        double[] ep = new double[count], em = new double[count], ev = new double[count];
        for (int i = 0; i < count; i++)
        {
            (ep[i], em[i], ev[i]) = AdamW.Scalar.Step(p[i], m[i], v[i], g[i] * 5 / (20 + 1e-6), 1e-2, 7, 0.9, 0.95, 1e-8, 0.1);
        }

        Close(em, Device.Get(first), 5e-7, "m");
        Close(ev, Device.Get(second), 5e-7, "v");
        Close(ep, Device.Get(values), 2e-7, "value");
    }

    [Theory]
    [InlineData(double.NaN)]
    [InlineData(double.PositiveInfinity)]
    public void Changes_nothing_where_the_norm_is_not_finite(double squares)
    {
        float[] x = Normal(20);
        Tensor[] tensors = [.. Enumerable.Range(0, 4).Select(_ => Device.Put(1, 20, x))];
        Tensor norm = Device.Take(1, 1, DType.F64);
        Device.Backend.Write<double>(norm, [squares]);
        Device.Backend.AdamW(tensors[0], tensors[1], tensors[2], tensors[3], Step(1e-3, 1), norm, s_settings with { MaxNorm = 1 });
        Assert.All(tensors, t => SameBits(x, Device.Get(t), "a tensor"));
    }

    [Fact]
    public void The_sum_of_squares_has_the_same_bits_for_any_number_of_threads_and_is_exact_to_single_precision()
    {
        int[] counts = [1, Backend.SumChunk, (3 * Backend.SumChunk) + 5, 77];
        float[][] values = Array.ConvertAll(counts, c => Normal(c));
        double expected = values.Sum(x => x.Sum(v => (double)v * v));
        double[] results = new double[3];
        for (int threads = 1; threads <= 3; threads++)
        {
            Device device = On(threads);
            Tensor[] tensors = Array.ConvertAll(values, x => device.Put(1, x.Length, x));
            Tensor total = device.Take(1, 1, DType.F64);
            device.Backend.SumOfSquares(total, device.Take(1, Backend.SumOfSquaresPartials(tensors), DType.F64), tensors);
            results[threads - 1] = device.GetDouble(total);
        }

        Assert.Equal(expected, results[0], 3e-8 * expected);
        Assert.All(results, r => Assert.Equal(BitConverter.DoubleToInt64Bits(results[0]), BitConverter.DoubleToInt64Bits(r)));
    }

    [Fact]
    public void A_sum_is_added_to_its_total()
    {
        float[] x = Normal(1001);
        Tensor total = Device.Take(1, 1, DType.F64);
        Device.Backend.Write<double>(total, [10.0]);
        Device.Backend.Sum(total, Device.PutStrided(7, 143, x));
        Assert.Equal(10 + x.Sum(v => (double)v), Device.GetDouble(total), 1e-9);
    }

    [Fact]
    public void Allocates_nothing()
    {
        Tensor[] t = [.. Enumerable.Range(0, 4).Select(_ => Device.Take(1, 20))];
        Tensor norm = Device.Take(1, 1, DType.F64), partials = Device.Take(1, 4, DType.F64), step = Step(1e-3, 1);
        AllocatesNothing(() =>
        {
            Device.Backend.Sum(norm, t[0]);
            Device.Backend.SumOfSquares(norm, partials, t);
            Device.Backend.AdamW(t[0], t[1], t[2], t[3], step, norm, s_settings);
        });
    }

    private static double MeanError(double[] expected, float[] actual) => expected.Zip(actual, (e, a) => Math.Abs(e - a)).Average();

    private Tensor Step(double rate, int t) =>
        Device.Put(1, 3, (ReadOnlySpan<double>)[rate, 1 - Math.Pow(0.9, t), 1 - Math.Pow(0.95, t)]);
}

public sealed class AdamWOn512() : AdamWTests(CpuPath.Vector512);

public sealed class AdamWOn256() : AdamWTests(CpuPath.Vector256);

public sealed class AdamWOn128() : AdamWTests(CpuPath.Vector128);

public sealed class AdamWOnScalar() : AdamWTests(CpuPath.Scalar);
