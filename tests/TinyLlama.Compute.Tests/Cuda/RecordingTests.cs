using TinyLlama.Compute.Cuda;

namespace TinyLlama.Compute.Tests.Cuda;

/// <summary>Operations that are recorded once and replayed.</summary>
public sealed class RecordingTests : CudaTests
{
    private const int Rows = 9;
    private const int Columns = 24;

    [Fact]
    public void Repeated_operations_are_called_twice_and_give_the_same_bits_each_time()
    {
        var weight = new Weight(Put(48, Columns, Normal(48 * Columns), DType.F32));
        weight.TakePacked(Room(1 << 16), Cuda, backward: false);
        Cuda.Pack(weight);
        Tensor input = Take(Rows, Columns);
        Tensor output = Take(Rows, 48);
        Tensor gated = Take(Rows, 24);
        Tensor sum = Take(1, 1, DType.F64);
        Tensor squares = Take(1, 1, DType.F64);
        Tensor copy = Take(Rows, 24, DType.F32);
        int calls = 0;
        void Operations()
        {
            calls++;
            Cuda.MatMul(output, input, weight);
            Cuda.SwiGlu(gated, output);
            Cuda.Zero(copy);
            Cuda.Copy(copy, gated);
            Cuda.Zero(sum);
            Cuda.Sum(sum, copy);
            Cuda.SumOfSquares(squares, squares, [copy]);
        }

        using var recording = new Recording();
        for (int time = 0; time < 4; time++)
        {
            Cuda.Copy(input, Put(Rows, Columns, Normal(Rows * Columns), DType.F32));
            Cuda.Repeat(recording, Operations);
            (float[] Copy, double Sum, double Squares) repeated = (Get(copy), GetDouble(sum), GetDouble(squares));
            int before = calls;
            Operations();
            calls = before;
            SameBits(Get(copy), repeated.Copy, "replayed");
            Assert.Equal((GetDouble(sum), GetDouble(squares)), (repeated.Sum, repeated.Squares));
        }

        Assert.Equal(2, calls);
    }

    [Fact]
    public void What_must_not_be_recorded_is_refused()
    {
        Tensor values = Put(1, 8, Normal(8), DType.F32);
        using var recording = new Recording();
        void Reads() => Get(values);
        Cuda.Repeat(recording, Reads);
        Assert.Contains("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", Assert.Throws<DeviceException>(() => Cuda.Repeat(recording, Reads)).Message, StringComparison.Ordinal);

        // The stream is whole again.
        Assert.Equal(8, Get(values).Length);
    }

    [Fact]
    public void Other_threads_use_the_device_while_one_records()
    {
        Tensor values = Put(1, 8, Normal(8), DType.F32);
        using var recording = new Recording();
        Exception? failure = null;
        void Operations()
        {
            Cuda.Zero(values);
            var other = new Thread(() => failure ??= Record.Exception(() =>
            {
                using var backend = CudaBackend.Create(0);
                using Arena arena = backend.Allocate("another's", 64);
            }));
            other.Start();
            other.Join();
        }

        Cuda.Repeat(recording, Operations);
        Cuda.Repeat(recording, Operations);
        Assert.Null(failure);
        Assert.All(Get(values), static value => Assert.Equal(0, value));
    }
}
