using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Cuda;
using TinyLlama.Tests.Common;
using Copy = TinyLlama.Compute.Cpu.Copy;

namespace TinyLlama.Compute.Tests.Cuda;

/// <summary>
/// What the tests of CUDA operations share: the GPU (or what stands for it), the CPU's scalar path that it is compared with,
/// tensors of both with the same values.
/// </summary>
public abstract class CudaTests : IDisposable
{
    /// <summary>A unit in the last place of a bfloat16: where a sum in another order ends on the other side of a rounding.</summary>
    protected const double Bf16 = 1.0 / 256;

    /// <summary>Of sums in fp32 in another order.</summary>
    protected const double F32 = 1e-5;

    private readonly List<Arena> _arenas = [];
    private readonly Random _random = new(1);

    protected CudaTests(bool deterministic = true)
    {
        CudaEmulator.Require();
        Cuda = CudaBackend.Create(deterministic: deterministic);
        Cpu = CpuBackend.Create(1, CpuPath.Scalar);
    }

    protected CudaBackend Cuda { get; }

    protected CpuBackend Cpu { get; }

    public void Dispose()
    {
        _arenas.ForEach(arena => arena.Dispose());
        Cuda.Dispose();
        Cpu.Dispose();
        GC.SuppressFinalize(this);
    }

    /// <summary>Normal numbers, each a bfloat16.</summary>
    protected float[] Normal(int count, double deviation = 1, double mean = 0)
    {
        float[] values = new float[count];
        for (int i = 0; i < count; i++)
        {
            double normal = Math.Sqrt(-2 * Math.Log(1 - _random.NextDouble())) * Math.Cos(2 * Math.PI * _random.NextDouble());
            values[i] = Rounded((float)(mean + (deviation * normal)));
        }

        return values;
    }

    protected int[] Whole(int count, int bound)
    {
        int[] values = new int[count];
        for (int i = 0; i < count; i++)
        {
            values[i] = _random.Next(bound);
        }

        return values;
    }

    /// <summary>The nearest bfloat16.</summary>
    protected static float Rounded(float value) => Copy.FromBFloat16(Copy.ToBFloat16(value));

    /// <summary>A tensor of the GPU in memory of its own, so that the address sanitizer sees what leaves it.</summary>
    protected Tensor Take(int rows, int columns, DType type = DType.BF16) => Own(Cuda, rows, columns, type);

    /// <summary>An arena of the GPU.</summary>
    protected Arena Room(long bytes)
    {
        Arena arena = Cuda.Allocate("test", bytes);
        _arenas.Add(arena);
        return arena;
    }

    /// <summary>A tensor of the GPU with these values.</summary>
    protected Tensor Put(int rows, int columns, ReadOnlySpan<float> values, DType type = DType.BF16)
    {
        Tensor tensor = Take(rows, columns, type);
        Set(tensor, values);
        return tensor;
    }

    /// <summary>The middle columns of a wider tensor, 8 on either side.</summary>
    protected Tensor PutStrided(int rows, int columns, ReadOnlySpan<float> values, DType type = DType.BF16)
    {
        Tensor wide = Take(rows, columns + 16, type);
        float[] around = new float[wide.Count];
        Array.Fill(around, float.NaN);
        Set(wide, around);
        Tensor tensor = wide.ColumnRange(8, columns);
        for (int row = 0; row < rows; row++)
        {
            Set(tensor.RowRange(row, 1), values.Slice(row * columns, columns));
        }

        return tensor;
    }

    /// <summary>A column of whole numbers on the GPU.</summary>
    protected Tensor Put(ReadOnlySpan<int> values)
    {
        Tensor tensor = Take(values.Length, 1, DType.I32);
        Cuda.Write(tensor, values);
        return tensor;
    }

    /// <summary>What a tensor of the GPU holds, as singles.</summary>
    protected float[] Get(Tensor tensor)
    {
        float[] values = new float[tensor.Count];
        for (int row = 0; row < tensor.Rows; row++)
        {
            Span<float> to = values.AsSpan(row * tensor.Columns, tensor.Columns);
            Tensor from = tensor.RowRange(row, 1);
            switch (tensor.Type)
            {
                case DType.F32:
                    Cuda.Read(to, from);
                    break;
                case DType.BF16:
                    ushort[] bits = new ushort[to.Length];
                    Cuda.Read<ushort>(bits, from);
                    for (int i = 0; i < bits.Length; i++)
                    {
                        to[i] = Copy.FromBFloat16(bits[i]);
                    }

                    break;
                default:
                    throw new ArgumentException("F32 or BF16");
            }
        }

        return values;
    }

    /// <summary>A tensor of the CPU in F32 with these values.</summary>
    protected Tensor OnCpu(int rows, int columns, ReadOnlySpan<float> values)
    {
        Tensor tensor = Own(Cpu, rows, columns, DType.F32);
        Cpu.Write(tensor, values);
        return tensor;
    }

    protected Tensor OnCpu(ReadOnlySpan<int> values)
    {
        Tensor tensor = Own(Cpu, values.Length, 1, DType.I32);
        Cpu.Write(tensor, values);
        return tensor;
    }

    protected double GetDouble(Tensor tensor)
    {
        Span<double> value = stackalloc double[1];
        Cuda.Read(value, tensor);
        return value[0];
    }

    protected Tensor ZeroOnCpu(int rows, int columns, DType type = DType.F32) => Own(Cpu, rows, columns, type);

    protected static float[] OfCpu(Tensor tensor) => tensor.HostSpan<float>().ToArray();

    /// <summary>A layout on a device: segments, and a block table where keys lie in a cache.</summary>
    protected TokenLayout Layout(Backend backend, ReadOnlySpan<Segment> segments, params ReadOnlySpan<int> table)
    {
        int tokens = 0;
        foreach (Segment segment in segments)
        {
            tokens += segment.RowCount;
        }

        Arena plan = Arena.Plan("layout");
        _ = new TokenLayout(plan, tokens, segments.Length, table.Length);
        Arena arena = backend.AllocateAs(plan);
        _arenas.Add(arena);
        TokenLayout layout = new(arena, tokens, segments.Length, table.Length);
        layout.Set(backend, segments, table);
        return layout;
    }

    /// <summary>The same bits, whatever they mean.</summary>
    protected static void SameBits(ReadOnlySpan<float> expected, ReadOnlySpan<float> actual, string what)
    {
        Assert.Equal(expected.Length, actual.Length);
        for (int i = 0; i < expected.Length; i++)
        {
            Assert.True(
                BitConverter.SingleToInt32Bits(expected[i]) == BitConverter.SingleToInt32Bits(actual[i]),
                $"{what}[{i}]: {expected[i]:R} and {actual[i]:R} differ in their bits");
        }
    }

    /// <summary>Each element within the tolerance, relative to itself and to the root mean square of all.</summary>
    protected static void Close(ReadOnlySpan<float> expected, ReadOnlySpan<float> actual, double tolerance, string what)
    {
        Assert.Equal(expected.Length, actual.Length);
        double squares = 0;
        foreach (float e in expected)
        {
            squares += (double)e * e;
        }

        double typical = Math.Sqrt(squares / Math.Max(1, expected.Length));
        for (int i = 0; i < expected.Length; i++)
        {
            double error = Math.Abs((double)expected[i] - actual[i]);
            double allowed = tolerance * (Math.Abs(expected[i]) + typical);
            Assert.True(error <= allowed, $"{what}[{i}]: expected {expected[i]:R}, got {actual[i]:R}, error {error:E2} of {allowed:E2} allowed");
        }
    }

    /// <summary>Runs it twice and asserts that the second run allocates nothing managed.</summary>
    protected static void AllocatesNothing(Action operation)
    {
        operation();
        long before = GC.GetAllocatedBytesForCurrentThread();
        operation();
        Assert.Equal(0, GC.GetAllocatedBytesForCurrentThread() - before);
    }

    private Tensor Own(Backend backend, int rows, int columns, DType type)
    {
        // Not what the arena would take: that ends at a multiple of 64 bytes, and the allocation with the last element.
        Arena arena = backend.Allocate("test", Math.Max(1, rows * type.RowBytes(columns)));
        _arenas.Add(arena);
        return arena.Take(0, 0, type) with { Rows = rows, Columns = columns, Stride = columns };
    }

    private void Set(Tensor tensor, ReadOnlySpan<float> values)
    {
        switch (tensor.Type)
        {
            case DType.F32:
                Cuda.Write(tensor, values);
                break;
            case DType.BF16:
                ushort[] bits = new ushort[values.Length];
                for (int i = 0; i < bits.Length; i++)
                {
                    bits[i] = Copy.ToBFloat16(values[i]);
                }

                Cuda.Write<ushort>(tensor, bits);
                break;
            default:
                throw new ArgumentException("F32 or BF16");
        }
    }
}
