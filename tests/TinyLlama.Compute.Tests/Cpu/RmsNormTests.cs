using TinyLlama.Compute.Cpu;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Cpu;

public abstract class RmsNormTests(CpuPath path) : OperationTests(path)
{
    private const float Epsilon = 1e-5f;

    public static TheoryData<int, int> Shapes => new()
    {
        { 1, 1 }, { 2, 3 }, { 3, 16 }, { 5, 37 }, { 33, 64 }, { 70, 100 }, { 7, 2048 },
    };

    [Theory]
    [InlineData("rmsnorm")]
    [InlineData("rmsnorm_small")]
    public void Equals_the_golden_values(string name)
    {
        GoldenFile golden = GoldenFile.Open(SharedFiles.Require("goldens/llama-tiny/ops.safetensors"));
        double[] x = golden.Read($"{name}.x").Values;
        double[] w = golden.Read($"{name}.w").Values;
        int channels = w.Length;
        int tokens = x.Length / channels;
        Backend backend = Device.Backend;
        Tensor input = Device.Put(tokens, channels, x);
        Tensor weight = Device.Put(1, channels, w);
        Tensor output = Device.Take(tokens, channels);
        Tensor r = Device.Take(tokens, 1);
        Tensor dInput = Device.Take(tokens, channels);
        Tensor dWeight = Device.Take(1, channels);

        backend.RmsNorm(output, r, input, weight, Epsilon);
        backend.RmsNormBackward(dInput, dWeight, Device.Put(tokens, channels, golden.Read($"{name}.dy").Values), input, weight, r);

        Close(golden.Read($"{name}.y").Values, Device.Get(output), 1e-6, "y");
        Close(golden.Read($"{name}.dx").Values, Device.Get(dInput), 2e-6, "dx");
        Close(golden.Read($"{name}.dw").Values, Device.Get(dWeight), 2e-6, "dw");
    }

    [Fact]
    public void Backward_does_not_see_what_an_operation_before_it_left_in_the_scratch()
    {
        const int Tokens = 6, Channels = 40;
        Tensor input = Device.Put(Tokens, Channels, Normal(Tokens * Channels)), dOutput = Device.Put(Tokens, Channels, Normal(Tokens * Channels));
        Tensor weight = Device.Put(1, Channels, Normal(Channels)), r = Device.Put(Tokens, 1, Normal(Tokens));
        float[] Gradient()
        {
            Tensor dWeight = Device.Take(1, Channels);
            Device.Backend.RmsNormBackward(Device.Take(Tokens, Channels), dWeight, dOutput, input, weight, r);
            return Device.Get(dWeight);
        }

        SameBits(Gradient(), Gradient(), "dWeight");
    }

    [Theory]
    [MemberData(nameof(Shapes))]
    public void Equals_the_definition(int tokens, int channels)
    {
        float[] x = Normal(tokens * channels), w = Normal(channels, 0.2, 1), dy = Normal(tokens * channels);
        float[] dx = Normal(tokens * channels), dw = Normal(channels);
        Tensor input = Device.PutStrided(tokens, channels, x);
        Tensor weight = Device.Put(1, channels, w);
        Tensor output = Device.Take(tokens, channels);
        Tensor r = Device.Take(tokens, 1);
        Tensor dInput = Device.PutStrided(tokens, channels, dx);
        Tensor dWeight = Device.Put(1, channels, dw);

        Device.Backend.RmsNorm(output, r, input, weight, Epsilon);
        Device.Backend.RmsNormBackward(dInput, dWeight, Device.PutStrided(tokens, channels, dy), input, weight, r);

        double[] y = new double[x.Length], gx = Doubles(dx), gw = Doubles(dw), rows = new double[tokens];
        for (int n = 0; n < tokens; n++)
        {
            Range row = (n * channels)..((n + 1) * channels);
            double[] xn = Doubles(x[row]);
            rows[n] = RmsNorm.Scalar.Forward(y.AsSpan(row), xn, Doubles(w), Epsilon);
            RmsNorm.Scalar.Backward(gx.AsSpan(row), gw, Doubles(dy[row]), xn, Doubles(w), rows[n]);
        }

        Close(rows, Device.Get(r), 1e-6, "r");
        Close(y, Device.Get(output), 1e-6, "y");
        Close(gx, Device.Get(dInput), 2e-6, "dx");
        Close(gw, Device.Get(dWeight), 2e-6, "dw");
    }

    [Theory]
    [MemberData(nameof(Shapes))]
    public void Fused_addition_has_the_bits_of_an_addition_and_a_norm(int tokens, int channels)
    {
        float[] x = Normal(tokens * channels), b = Normal(tokens * channels);
        float[] total = new float[x.Length];
        for (int i = 0; i < total.Length; i++)
        {
            total[i] = x[i] + b[i];
        }

        Tensor input = Device.Put(tokens, channels, x);
        Tensor branch = Device.Put(tokens, channels, b);
        Tensor weight = Device.Put(1, channels, Normal(channels));
        Tensor expected = Device.Take(tokens, channels), expectedR = Device.Take(tokens, 1);
        Tensor output = Device.Take(tokens, channels), r = Device.Take(tokens, 1);

        Device.Backend.RmsNorm(expected, expectedR, Device.Put(tokens, channels, total), weight, Epsilon);
        Device.Backend.AddRmsNorm(input, output, r, input, branch, weight, Epsilon);

        SameBits(total, Device.Get(input), "sum");
        SameBits(Device.Get(expectedR), Device.Get(r), "r");
        SameBits(Device.Get(expected), Device.Get(output), "output");
    }

    [Fact]
    public void Has_the_same_bits_for_any_number_of_threads()
    {
        const int Tokens = 131, Channels = 300;
        float[] x = Normal(Tokens * Channels), w = Normal(Channels), dy = Normal(Tokens * Channels);
        float[][] Run(int threads)
        {
            Device device = On(threads);
            Tensor input = device.Put(Tokens, Channels, x), weight = device.Put(1, Channels, w);
            Tensor output = device.Take(Tokens, Channels), r = device.Take(Tokens, 1);
            Tensor dInput = device.Take(Tokens, Channels), dWeight = device.Take(1, Channels);
            device.Backend.RmsNorm(output, r, input, weight, Epsilon);
            device.Backend.RmsNormBackward(dInput, dWeight, device.Put(Tokens, Channels, dy), input, weight, r);
            return [device.Get(output), device.Get(dInput), device.Get(dWeight)];
        }

        float[][] one = Run(1);
        foreach (int threads in (int[])[2, 3])
        {
            float[][] many = Run(threads);
            for (int i = 0; i < one.Length; i++)
            {
                SameBits(one[i], many[i], $"result {i} of {threads} threads");
            }
        }
    }

    [Fact]
    public void A_row_has_the_same_bits_alone_and_in_a_batch()
    {
        const int Tokens = 40, Channels = 77, Row = 23;
        float[] x = Normal(Tokens * Channels), w = Normal(Channels), dy = Normal(Tokens * Channels);
        (float[] Output, float[] DInput) Run(int first, int count)
        {
            Range rows = (first * Channels)..((first + count) * Channels);
            Tensor input = Device.Put(count, Channels, x[rows]), weight = Device.Put(1, Channels, w);
            Tensor output = Device.Take(count, Channels), r = Device.Take(count, 1);
            Tensor dInput = Device.Take(count, Channels), dWeight = Device.Take(1, Channels);
            Device.Backend.RmsNorm(output, r, input, weight, Epsilon);
            Device.Backend.RmsNormBackward(dInput, dWeight, Device.Put(count, Channels, dy[rows]), input, weight, r);
            return (Device.Get(output), Device.Get(dInput));
        }

        var batch = Run(0, Tokens);
        var alone = Run(Row, 1);
        SameBits(batch.Output.AsSpan(Row * Channels, Channels), alone.Output, "output");
        SameBits(batch.DInput.AsSpan(Row * Channels, Channels), alone.DInput, "dInput");
    }

    [Fact]
    public void Allocates_nothing()
    {
        Tensor input = Device.Put(3, 5, Normal(15)), weight = Device.Put(1, 5, Normal(5));
        Tensor output = Device.Take(3, 5), r = Device.Take(3, 1), dInput = Device.Take(3, 5), dWeight = Device.Take(1, 5);
        AllocatesNothing(() =>
        {
            Device.Backend.AddRmsNorm(input, output, r, input, input, weight, Epsilon);
            Device.Backend.RmsNorm(output, r, input, weight, Epsilon);
            Device.Backend.RmsNormBackward(dInput, dWeight, output, input, weight, r);
        });
    }
}

public sealed class RmsNormOn512() : RmsNormTests(CpuPath.Vector512);

public sealed class RmsNormOn256() : RmsNormTests(CpuPath.Vector256);

public sealed class RmsNormOn128() : RmsNormTests(CpuPath.Vector128);

public sealed class RmsNormOnScalar() : RmsNormTests(CpuPath.Scalar);
