using TinyLlama.Compute.Cpu;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Cpu;

public abstract class RopeTests(CpuPath path) : OperationTests(path)
{
    [Theory]
    [InlineData("rope")]
    [InlineData("rope64")]
    public void Equals_the_golden_values(string name)
    {
        GoldenFile golden = GoldenFile.Open(SharedFiles.Require("goldens/llama-tiny/ops.safetensors"));
        (double[] x, int[] shape) = golden.Read($"{name}.x");
        (int batch, int heads, int context, int headDim) = (shape[0], shape[1], shape[2], shape[3]);
        double[] cos = golden.Read($"{name}.cos").Values, sin = golden.Read($"{name}.sin").Values;
        double[] table = new double[context * headDim];
        for (int t = 0; t < context; t++)
        {
            Array.Copy(cos, t * headDim, table, t * headDim, headDim / 2);
            Array.Copy(sin, t * headDim, table, (t * headDim) + (headDim / 2), headDim / 2);
        }

        int[] positions = new int[batch * context];
        for (int n = 0; n < positions.Length; n++)
        {
            positions[n] = n % context;
        }

        Tensor tableTensor = Device.Put(context, headDim, table);
        Tensor positionTensor = Device.Put(positions);
        foreach ((string from, string to, bool inverse) in (ReadOnlySpan<(string, string, bool)>)[("x", "y", false), ("dy", "dx", true)])
        {
            Tensor packed = Device.Put(batch * context, heads * headDim, Heads.Pack(golden.Read($"{name}.{from}")));
            Device.Backend.Rope(packed, positionTensor, tableTensor, inverse);
            Close(Heads.Pack(golden.Read($"{name}.{to}")), Device.Get(packed), 1e-6, to);
        }
    }

    [Theory]
    [InlineData(3, 1, 2)]
    [InlineData(5, 3, 6)]
    [InlineData(40, 2, 34)]
    [InlineData(9, 3, 128)]
    public void Equals_the_definition_and_turns_back(int tokens, int heads, int headDim)
    {
        const int Positions = 50;
        double[] table = new double[Positions * headDim];
        double Angle(int position, int pair) => position * Math.Pow(10_000, -2.0 * pair / headDim);
        for (int p = 0; p < Positions; p++)
        {
            for (int i = 0; i < headDim / 2; i++)
            {
                (table[(p * headDim) + (headDim / 2) + i], table[(p * headDim) + i]) = Math.SinCos(Angle(p, i));
            }
        }

        float[] x = Normal(tokens * heads * headDim);
        int[] positions = Whole(tokens, Positions);
        Tensor packed = Device.PutStrided(tokens, heads * headDim, x);
        Tensor tableTensor = Device.Put(Positions, headDim, table);
        Tensor positionTensor = Device.Put(positions);
        Device.Backend.Rope(packed, positionTensor, tableTensor);

        double[] expected = Doubles(x);
        double[] angles = new double[headDim / 2];
        for (int h = 0; h < tokens * heads; h++)
        {
            for (int i = 0; i < angles.Length; i++)
            {
                angles[i] = Angle(positions[h / heads], i);
            }

            Rope.Scalar.Rotate(expected.AsSpan(h * headDim, headDim), angles);
        }

        Close(expected, Device.Get(packed), 1e-6, "rotated");
        Device.Backend.Rope(packed, positionTensor, tableTensor, inverse: true);
        Close(Doubles(x), Device.Get(packed), 1e-6, "turned back");
    }

    [Fact]
    public void A_position_outside_the_table_is_refused()
    {
        Tensor heads = Device.Take(2, 4), table = Device.Take(3, 4);
        Assert.Throws<ArgumentException>(() => Device.Backend.Rope(heads, Device.Put([0, 3]), table));
        Assert.Throws<ArgumentException>(() => Device.Backend.Rope(heads, Device.Put([0, -1]), table));
    }

    [Fact]
    public void Allocates_nothing()
    {
        Tensor heads = Device.Take(2, 4), table = Device.Take(3, 4), positions = Device.Put([0, 2]);
        AllocatesNothing(() => Device.Backend.Rope(heads, positions, table));
    }
}

/// <summary>Golden files keep (batch, heads, context, head dim); packed tokens are (batch · context, heads · head dim).</summary>
internal static class Heads
{
    public static double[] Pack((double[] Values, int[] Shape) tensor)
    {
        (int batch, int heads, int context, int headDim) = (tensor.Shape[0], tensor.Shape[1], tensor.Shape[2], tensor.Shape[3]);
        double[] packed = new double[tensor.Values.Length];
        for (int b = 0; b < batch; b++)
        {
            for (int h = 0; h < heads; h++)
            {
                for (int t = 0; t < context; t++)
                {
                    int from = ((((b * heads) + h) * context) + t) * headDim;
                    int to = ((((b * context) + t) * heads) + h) * headDim;
                    Array.Copy(tensor.Values, from, packed, to, headDim);
                }
            }
        }

        return packed;
    }
}

public sealed class RopeOn512() : RopeTests(CpuPath.Vector512);

public sealed class RopeOn256() : RopeTests(CpuPath.Vector256);

public sealed class RopeOn128() : RopeTests(CpuPath.Vector128);

public sealed class RopeOnScalar() : RopeTests(CpuPath.Scalar);
