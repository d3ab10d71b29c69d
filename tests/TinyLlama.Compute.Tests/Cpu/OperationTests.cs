using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>What the tests of an operation share: a backend of one path, tensors of it, comparisons.</summary>
public abstract class OperationTests : IDisposable
{
    private readonly List<IDisposable> _owned = [];
    private uint _seed = 1;

    private readonly Lazy<Device> _device;

    protected OperationTests(CpuPath path)
    {
        Path = path;
        _device = new Lazy<Device>(() => On(1));
    }

    protected CpuPath Path { get; }

    /// <summary>One thread. Tests that ask about threads make their own with <see cref="On"/>.</summary>
    protected Device Device => _device.Value;

    public void Dispose()
    {
        foreach (IDisposable owned in _owned)
        {
            owned.Dispose();
        }

        GC.SuppressFinalize(this);
    }

    protected Device On(int threads)
    {
        Device device = new(Open(threads));
        _owned.Add(device);
        return device;
    }

    private protected virtual CpuBackend Open(int threads) => CpuBackend.Create(threads, Path);

    /// <summary>Numbers like those of a normal distribution; the same in each run.</summary>
    protected float[] Normal(int count, double deviation = 1, double mean = 0)
    {
        float[] values = new float[count];
        for (int i = 0; i < count; i++)
        {
            double sum = -6;
            for (int k = 0; k < 12; k++)
            {
                sum += Next() / (double)uint.MaxValue;
            }

            values[i] = (float)(mean + (deviation * sum));
        }

        return values;
    }

    protected int[] Whole(int count, int bound)
    {
        int[] values = new int[count];
        for (int i = 0; i < count; i++)
        {
            values[i] = (int)(Next() % (uint)bound);
        }

        return values;
    }

    /// <summary>Each element within the tolerance, relative to itself and to the root mean square of all.</summary>
    protected static void Close(ReadOnlySpan<double> expected, ReadOnlySpan<float> actual, double tolerance, string what)
    {
        Assert.Equal(expected.Length, actual.Length);
        double squares = 0;
        foreach (double e in expected)
        {
            squares += e * e;
        }

        double typical = Math.Sqrt(squares / Math.Max(1, expected.Length));
        for (int i = 0; i < expected.Length; i++)
        {
            double error = Math.Abs(expected[i] - actual[i]);
            double allowed = tolerance * (Math.Abs(expected[i]) + typical);
            Assert.True(error <= allowed, $"{what}[{i}]: expected {expected[i]:R}, got {actual[i]:R}, error {error:E2} of {allowed:E2} allowed");
        }
    }

    protected static void SameBits(ReadOnlySpan<float> expected, ReadOnlySpan<float> actual, string what)
    {
        Assert.Equal(expected.Length, actual.Length);
        for (int i = 0; i < expected.Length; i++)
        {
            Assert.True(
                BitConverter.SingleToInt32Bits(expected[i]) == BitConverter.SingleToInt32Bits(actual[i])
                    || (float.IsNaN(expected[i]) && float.IsNaN(actual[i])),
                $"{what}[{i}]: {expected[i]:R} and {actual[i]:R} differ in their bits");
        }
    }

    protected static double[] Doubles(float[] values) => Array.ConvertAll(values, v => (double)v);

    /// <summary>Runs it twice and asserts that the second run allocates nothing managed.</summary>
    protected static void AllocatesNothing(Action operation)
    {
        operation();
        long before = GC.GetAllocatedBytesForCurrentThread();
        operation();
        Assert.Equal(0, GC.GetAllocatedBytesForCurrentThread() - before);
    }

    private uint Next()
    {
        // xorshift; the state is never 0.
        _seed ^= _seed << 13;
        _seed ^= _seed >> 17;
        _seed ^= _seed << 5;
        return _seed;
    }
}

/// <summary>A backend and an arena of it.</summary>
public sealed class Device(CpuBackend backend) : IDisposable
{
    private readonly Arena _arena = backend.Allocate("test", 8 << 20);

    public CpuBackend Backend { get; } = backend;

    public Arena Arena => _arena;

    public Tensor Take(int rows, int columns, DType type = DType.F32) => _arena.Take(rows, columns, type);

    public Tensor Put(int rows, int columns, ReadOnlySpan<float> values)
    {
        Tensor tensor = _arena.Take(rows, columns);
        Backend.Write(tensor, values);
        return tensor;
    }

    public Tensor Put(int rows, int columns, ReadOnlySpan<double> values)
    {
        float[] singles = new float[values.Length];
        for (int i = 0; i < singles.Length; i++)
        {
            singles[i] = (float)values[i];
        }

        return Put(rows, columns, singles);
    }

    /// <summary>The middle columns of a wider tensor, as for a part of fused q | k | v; NaN around it.</summary>
    public Tensor PutStrided(int rows, int columns, ReadOnlySpan<float> values)
    {
        Tensor wide = _arena.Take(rows, columns + 8);
        wide.HostSpan<float>().Fill(float.NaN);
        Tensor tensor = wide.ColumnRange(3, columns);
        for (int row = 0; row < rows; row++)
        {
            Backend.Write(tensor.RowRange(row, 1), values.Slice(row * columns, columns));
        }

        return tensor;
    }

    public Tensor Put(ReadOnlySpan<int> values)
    {
        Tensor tensor = _arena.Take(values.Length, 1, DType.I32);
        Backend.Write(tensor, values);
        return tensor;
    }

    public float[] Get(Tensor tensor)
    {
        float[] values = new float[tensor.Count];
        for (int row = 0; row < tensor.Rows; row++)
        {
            Backend.Read(values.AsSpan(row * tensor.Columns, tensor.Columns), tensor.RowRange(row, 1));
        }

        return values;
    }

    public double GetDouble(Tensor tensor)
    {
        Span<double> value = stackalloc double[1];
        Backend.Read(value, tensor);
        return value[0];
    }

    public void Dispose()
    {
        _arena.Dispose();
        Backend.Dispose();
    }
}
