using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Tests.Cuda;

/// <summary>Frozen weights in the types of their files: what is multiplied are the values that blocks decode to.</summary>
public sealed class QuantizedMatMulTests : CudaTests
{
    [Theory]
    [InlineData(DType.Q8_0)]
    [InlineData(DType.Q4_0)]
    public void Products_equal_those_of_the_decoded_weights(DType type)
    {
        foreach ((int rows, int outputs, int inputs) in (ReadOnlySpan<(int, int, int)>)[(1, 1, 32), (3, 130, 64), (8, 16, 1056), (9, 40, 96), (32, 65, 160), (33, 65, 160), (70, 24, 64)])
        {
            foreach (bool accumulate in (bool[])[false, true])
            {
                (Weight weight, float[] values) = Frozen(type, outputs, inputs);
                if (rows > 32)
                {
                    // Many rows are multiplied by the weight in bf16.
                    values = Array.ConvertAll(values, Rounded);
                }

                (float[] x, float[] y) = (Normal(rows * inputs), Normal(rows * outputs));
                Tensor expected = OnCpu(rows, outputs, y), output = PutStrided(rows, outputs, y, DType.F32);
                Cpu.MatMul(expected, OnCpu(rows, inputs, x), new Weight(OnCpu(outputs, inputs, values)), accumulate);
                Cuda.MatMul(output, PutStrided(rows, inputs, x), weight, accumulate);
                Close(OfCpu(expected), Get(output), 3e-5, $"{type} {rows} x {outputs} x {inputs}, accumulate {accumulate}");
            }
        }
    }

    [Theory]
    [InlineData(DType.Q8_0)]
    [InlineData(DType.Q4_0)]
    public void One_of_few_rows_has_the_bits_that_it_has_alone(DType type)
    {
        (Weight weight, _) = Frozen(type, 50, 1184);
        Tensor input = Put(32, 1184, Normal(32 * 1184)), output = Take(32, 50);
        Cuda.MatMul(output, input, weight);
        float[] together = Get(output);
        foreach (int count in (int[])[1, 5, 8, 13])
        {
            Tensor few = Take(count, 50);
            Cuda.MatMul(few, input.RowRange(32 - count, count), weight);
            Assert.Equal(together[^(count * 50)..], Get(few));
        }
    }

    [Theory]
    [InlineData(DType.F32)]
    [InlineData(DType.F16)]
    [InlineData(DType.BF16)]
    [InlineData(DType.Q5_0)]
    [InlineData(DType.Q6_K)]
    public void Other_types_are_kept_in_bf16(DType type)
    {
        (Weight weight, float[] values) = Frozen(type, 130, 256);
        Assert.Equal((DType.BF16, 130, 256), (weight.PackedForward.Type, weight.PackedForward.Rows, weight.PackedForward.Columns));
        Assert.Equal(Array.ConvertAll(values, Rounded), Get(weight.PackedForward));
    }

    [Theory]
    [InlineData(DType.Q8_0)]
    [InlineData(DType.Q4_0)]
    [InlineData(DType.Q6_K)]
    public void An_embedding_is_the_decoded_row_in_bf16(DType type)
    {
        (Weight weight, float[] values) = Frozen(type, 70, 256);
        Tensor output = Take(3, 256);
        Cuda.Embedding(output, weight.PackedForward, Put([69, 0, 5]));
        Assert.Equal(Array.ConvertAll((float[])[.. values[(69 * 256)..], .. values[..256], .. values[(5 * 256)..(6 * 256)]], Rounded), Get(output));
    }

    [Fact]
    public void Rows_are_written_from_where_others_are_packed_too()
    {
        (Weight weight, _) = Frozen(DType.Q8_0, 128, 32);
        Assert.Throws<ArgumentException>(() => Cuda.WriteRows(weight, 8, new byte[34]));
        Assert.Throws<ArgumentException>(() => Cuda.WriteRows(weight, 64, new byte[34 * 65]));
        Assert.Throws<ArgumentException>(() => Cuda.WriteRows(weight, 0, new byte[33]));
    }

    // A weight, and the values that its bytes decode to.
    private (Weight Weight, float[] Values) Frozen(DType type, int outputs, int inputs)
    {
        long count = (long)outputs * inputs;
        var weight = Weight.Frozen(Room((count * 2) + 64), Cuda, outputs, inputs, type);
        float[] values = Normal((int)count);
        byte[] bytes = new byte[type.RowBytes(count)];
        switch (type)
        {
            case DType.F32:
                values = Array.ConvertAll(values, value => value * 1.003f);
                MemoryMarshal.AsBytes<float>(values).CopyTo(bytes);
                break;
            case DType.F16:
                Half[] halves = Array.ConvertAll(values, value => (Half)(value * 1.003f));
                MemoryMarshal.AsBytes<Half>(halves).CopyTo(bytes);
                values = Array.ConvertAll(halves, half => (float)half);
                break;
            case DType.BF16:
                ushort[] upper = Array.ConvertAll(values, value => (ushort)(BitConverter.SingleToUInt32Bits(value) >> 16));
                MemoryMarshal.AsBytes<ushort>(upper).CopyTo(bytes);
                break;
            default:
                for (int block = 0; block * type.BlockElements() < count; block++)
                {
                    Span<byte> to = bytes.AsSpan(block * type.BlockBytes(), type.BlockBytes());
                    Span<float> of = values.AsSpan(block * type.BlockElements(), type.BlockElements());
                    BlockQuantizer.Encode(type, of, to);
                    QuantizedBlocks.Decode(type, to, of);
                }

                break;
        }

        int rowBytes = (int)type.RowBytes(inputs);
        for (int row = 0; row < outputs; row += Backend.PackedRows)
        {
            int rows = Math.Min(Backend.PackedRows, outputs - row);
            Cuda.WriteRows(weight, row, bytes.AsSpan(row * rowBytes, rows * rowBytes));
        }

        return (weight, values);
    }
}
