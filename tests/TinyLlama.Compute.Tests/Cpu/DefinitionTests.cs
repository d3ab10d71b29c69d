using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>The gradients that the definitions state are those of the functions that they state.</summary>
public sealed class DefinitionTests
{
    private delegate double Objective(double[][] inputs);

    [Fact]
    public void Gradients_of_rms_norm_equal_central_differences()
    {
        const int Channels = 7;
        double[] dOutput = Values(Channels, 1);
        double[][] inputs = [Values(Channels, 2), Values(Channels, 3)];
        double[] dInput = new double[Channels], dWeight = new double[Channels], output = new double[Channels];
        double r = RmsNorm.Scalar.Forward(output, inputs[0], inputs[1], 1e-3);
        RmsNorm.Scalar.Backward(dInput, dWeight, dOutput, inputs[0], inputs[1], r);
        Check([dInput, dWeight], inputs, x =>
        {
            RmsNorm.Scalar.Forward(output, x[0], x[1], 1e-3);
            return Dot(output, dOutput);
        });
    }

    [Fact]
    public void Gradients_of_swiglu_equal_central_differences()
    {
        foreach (double gate in (double[])[-7, -0.5, 0, 1.3, 9])
        {
            (double dGate, double dUp) = SwiGlu.Scalar.Backward(0.7, gate, -1.1);
            Check([[dGate], [dUp]], [[gate], [-1.1]], x => 0.7 * SwiGlu.Scalar.Forward(x[0][0], x[1][0]));
        }
    }

    [Fact]
    public void Gradient_of_cross_entropy_equals_central_differences()
    {
        double[] logits = Values(9, 4), dLogits = new double[9];
        CrossEntropy.Scalar.Backward(dLogits, logits, 5);
        Check([dLogits], [logits], x => CrossEntropy.Scalar.Loss(x[0], 5));
        CrossEntropy.Scalar.Backward(dLogits, logits, -1);
        Check([dLogits], [logits], x => CrossEntropy.Scalar.Loss(x[0], -1));
    }

    [Fact]
    public void Gradient_of_a_rotation_is_the_rotation_back()
    {
        double[] angles = [0.3, 2, -1], opposite = [-0.3, -2, 1];
        double[] x = Values(6, 5), dOutput = Values(6, 6);
        double[] gradient = [.. dOutput];
        Rope.Scalar.Rotate(gradient, opposite);
        Check([gradient], [x], inputs =>
        {
            double[] output = [.. inputs[0]];
            Rope.Scalar.Rotate(output, angles);
            return Dot(output, dOutput);
        });
    }

    [Fact]
    public void Gradients_of_attention_equal_central_differences()
    {
        const int HeadDim = 4, Count = 5;
        double[] dOutput = Values(HeadDim, 7), output = new double[HeadDim];
        double[][] inputs = [Values(HeadDim, 8), Values(Count * HeadDim, 9), Values(Count * HeadDim, 10)];
        double[][] gradients = [new double[HeadDim], new double[Count * HeadDim], new double[Count * HeadDim]];
        Attention.Scalar.Backward(gradients[0], gradients[1], gradients[2], dOutput, inputs[0], inputs[1], inputs[2]);
        Check(gradients, inputs, x =>
        {
            Attention.Scalar.Forward(output, x[0], x[1], x[2]);
            return Dot(output, dOutput);
        });
    }

    [Theory]
    [InlineData(CpuPath.Vector512)]
    [InlineData(CpuPath.Vector256)]
    [InlineData(CpuPath.Vector128)]
    [InlineData(CpuPath.Scalar)]
    public void The_exponential_in_lanes_is_within_2_ulp(CpuPath path)
    {
        float[] x = new float[32_000];
        for (int i = 0; i < x.Length; i++)
        {
            x[i] = -87.3f + (i * (87.3f + 88.3f) / x.Length);
        }

        float[] y = Exp(path, x);
        for (int i = 0; i < x.Length; i++)
        {
            double exact = Math.Exp(x[i]);
            double ulp = MathF.BitIncrement((float)exact) - (double)(float)exact;
            Assert.True(Math.Abs(y[i] - exact) <= 2 * ulp, $"exp({x[i]:R}) = {exact:R}, not {y[i]:R}");
        }

        float inf = float.PositiveInfinity;
        float[] edges = [0, -0f, -inf, -1e30f, -104, inf, 1e30f, 89, float.NaN, 1, 2, 3, 4, 5, 6, 7];
        float[] expected = [1, 1, 0, 0, 0, inf, inf, inf, float.NaN];
        Assert.Equal(expected, Exp(path, edges)[..9]);
    }

    private static unsafe float[] Exp(CpuPath path, float[] x)
    {
        float[] y = new float[x.Length];
        fixed (float* from = x, to = y)
        {
            switch (path)
            {
                case CpuPath.Vector512: Run<Lanes512>(to, from, x.Length); break;
                case CpuPath.Vector256: Run<Lanes256>(to, from, x.Length); break;
                case CpuPath.Vector128: Run<Lanes128>(to, from, x.Length); break;
                default: Run<Lanes1>(to, from, x.Length); break;
            }
        }

        return y;

        static void Run<V>(float* y, float* x, int count)
            where V : struct, ILanes<V>
        {
            for (int i = 0; i < count; i += V.Count)
            {
                Exponential.Exp(V.Load(x + i)).Store(y + i);
            }
        }
    }

    private static double[] Values(int count, int seed)
    {
        double[] values = new double[count];
        for (int i = 0; i < count; i++)
        {
            values[i] = Math.Sin((i * 1.7) + (seed * 2.3)) * 1.5;
        }

        return values;
    }

    private static double Dot(double[] a, double[] b) => a.Zip(b, (x, y) => x * y).Sum();

    private static void Check(double[][] gradients, double[][] inputs, Objective objective)
    {
        const double Step = 1e-5;
        for (int k = 0; k < inputs.Length; k++)
        {
            for (int i = 0; i < inputs[k].Length; i++)
            {
                double at = inputs[k][i];
                inputs[k][i] = at + Step;
                double above = objective(inputs);
                inputs[k][i] = at - Step;
                double below = objective(inputs);
                inputs[k][i] = at;
                Assert.Equal((above - below) / (2 * Step), gradients[k][i], 1e-8);
            }
        }
    }
}
