using TinyLlama.Compute.Cpu;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Cpu;

public abstract class SwiGluTests(CpuPath path) : OperationTests(path)
{
    [Fact]
    public void Equals_the_golden_values()
    {
        GoldenFile golden = GoldenFile.Open(SharedFiles.Require("goldens/llama-tiny/ops.safetensors"));
        (float[] gate, float[] up) = (golden.ReadSingles("swiglu.gate"), golden.ReadSingles("swiglu.up"));
        const int Tokens = 6;
        int hidden = gate.Length / Tokens;
        Tensor gateUp = Join(Tokens, hidden, gate, up);
        Tensor output = Device.Take(Tokens, hidden), dGateUp = Device.Take(Tokens, 2 * hidden);

        Device.Backend.SwiGlu(output, gateUp);
        Device.Backend.SwiGluBackward(dGateUp, Device.Put(Tokens, hidden, golden.Read("swiglu.dy").Values), gateUp);

        Close(golden.Read("swiglu.y").Values, Device.Get(output), 1e-6, "y");
        Close(golden.Read("swiglu.dgate").Values, Device.Get(dGateUp.ColumnRange(0, hidden)), 1e-6, "dgate");
        Close(golden.Read("swiglu.dup").Values, Device.Get(dGateUp.ColumnRange(hidden, hidden)), 1e-6, "dup");
    }

    [Theory]
    [InlineData(1, 1)]
    [InlineData(3, 17)]
    [InlineData(65, 40)]
    public void Equals_the_definition(int tokens, int hidden)
    {
        float[] gate = Normal(tokens * hidden, 5), up = Normal(tokens * hidden), dy = Normal(tokens * hidden);
        Tensor gateUp = Join(tokens, hidden, gate, up);
        Tensor output = Device.Take(tokens, hidden), dGateUp = Device.Take(tokens, 2 * hidden);

        Device.Backend.SwiGlu(output, gateUp);
        Device.Backend.SwiGluBackward(dGateUp, Device.PutStrided(tokens, hidden, dy), gateUp);

        double[] y = new double[gate.Length], dGate = new double[gate.Length], dUp = new double[gate.Length];
        for (int i = 0; i < y.Length; i++)
        {
            y[i] = SwiGlu.Scalar.Forward(gate[i], up[i]);
            (dGate[i], dUp[i]) = SwiGlu.Scalar.Backward(dy[i], gate[i], up[i]);
        }

        Close(y, Device.Get(output), 1e-6, "y");
        Close(dGate, Device.Get(dGateUp.ColumnRange(0, hidden)), 1e-6, "dgate");
        Close(dUp, Device.Get(dGateUp.ColumnRange(hidden, hidden)), 1e-6, "dup");
    }

    [Fact]
    public void Large_gates_neither_overflow_nor_vanish()
    {
        float[] gate = [-1000, -120, -89, -88, 0, 88, 89, 1000];
        float[] up = [1, 1, 1, 1, 1, 1, 1, 1];
        Tensor gateUp = Join(1, gate.Length, gate, up);
        Tensor output = Device.Take(1, gate.Length), dGateUp = Device.Take(1, 2 * gate.Length);

        Device.Backend.SwiGlu(output, gateUp);
        Device.Backend.SwiGluBackward(dGateUp, Device.Put(1, gate.Length, up), gateUp);

        Close([0, 0, 0, 0, 0, 88, 89, 1000], Device.Get(output), 1e-6, "y");
        Close([0, 0, 0, 0, 0.5, 1, 1, 1], Device.Get(dGateUp.ColumnRange(0, gate.Length)), 1e-6, "dgate");
    }

    [Fact]
    public void Has_the_same_bits_for_any_number_of_threads()
    {
        const int Tokens = 60, Hidden = 700;
        float[] x = Normal(Tokens * Hidden * 2), dy = Normal(Tokens * Hidden);
        float[][] results = new float[3][];
        for (int threads = 1; threads <= 3; threads++)
        {
            Device device = On(threads);
            Tensor dGateUp = device.Take(Tokens, 2 * Hidden);
            device.Backend.SwiGluBackward(dGateUp, device.Put(Tokens, Hidden, dy), device.Put(Tokens, 2 * Hidden, x));
            results[threads - 1] = device.Get(dGateUp);
            SameBits(results[0], results[threads - 1], $"{threads} threads");
        }
    }

    [Fact]
    public void Allocates_nothing()
    {
        Tensor gateUp = Device.Take(2, 6), output = Device.Take(2, 3), dGateUp = Device.Take(2, 6);
        AllocatesNothing(() =>
        {
            Device.Backend.SwiGlu(output, gateUp);
            Device.Backend.SwiGluBackward(dGateUp, output, gateUp);
        });
    }

    private Tensor Join(int tokens, int hidden, float[] gate, float[] up)
    {
        Tensor gateUp = Device.Take(tokens, 2 * hidden);
        for (int n = 0; n < tokens; n++)
        {
            Device.Backend.Write<float>(gateUp.RowRange(n, 1).ColumnRange(0, hidden), gate.AsSpan(n * hidden, hidden));
            Device.Backend.Write<float>(gateUp.RowRange(n, 1).ColumnRange(hidden, hidden), up.AsSpan(n * hidden, hidden));
        }

        return gateUp;
    }
}

public sealed class SwiGluOn512() : SwiGluTests(CpuPath.Vector512);

public sealed class SwiGluOn256() : SwiGluTests(CpuPath.Vector256);

public sealed class SwiGluOn128() : SwiGluTests(CpuPath.Vector128);

public sealed class SwiGluOnScalar() : SwiGluTests(CpuPath.Scalar);
