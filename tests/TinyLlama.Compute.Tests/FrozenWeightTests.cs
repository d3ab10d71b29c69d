using System.Runtime.InteropServices;
using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Native;

namespace TinyLlama.Compute.Tests;

/// <summary>Products with weights that are kept only as kernels read them, against what their files decode to.</summary>
public sealed class FrozenWeightTests
{
    private static readonly DType[] s_quantized =
        [DType.Q8_0, DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1, DType.Q4_K, DType.Q5_K, DType.Q6_K];

    private static readonly CpuPath[] s_paths = [CpuPath.Vector512, CpuPath.Vector256, CpuPath.Vector128, CpuPath.Scalar];

    public static TheoryData<CpuPath, DType> Quantized =>
        [.. s_paths.SelectMany(path => s_quantized.Select(type => (path, type)))];

    public static TheoryData<CpuPath, DType> All =>
        [.. s_paths.SelectMany(path => s_quantized.Concat([DType.F32, DType.BF16, DType.F16]).Select(type => (path, type)))];

    public static TheoryData<CpuPath, DType> ReadInPlace =>
        [.. s_paths.SelectMany(path => new[] { DType.Q8_0, DType.Q4_0, DType.BF16, DType.F16 }.Select(type => (path, type)))];

    [Theory]
    [MemberData(nameof(All))]
    public void A_product_equals_that_of_the_decoded_weight(CpuPath path, DType type)
    {
        using CpuBackend backend = CpuBackend.Create(2, path);
        foreach ((int rows, int outputs, int blocks) in (ReadOnlySpan<(int, int, int)>)[(1, 1, 1), (1, 40, 3), (2, 16, 1), (4, 70, 2), (5, 33, 2), (12, 33, 1), (16, 8, 1), (19, 70, 2), (1, 150, 2), (7, 150, 1)])
        {
            int inputs = blocks * Math.Max(32, type.BlockElements());
            using Operands operands = new(backend, type, rows, outputs, inputs);
            foreach (bool accumulate in (bool[])[false, true])
            {
                float[] before = operands.Output.HostSpan<float>().ToArray();
                backend.MatMul(operands.Output, operands.Input, operands.Weight, accumulate);
                for (int n = 0; n < rows; n++)
                {
                    float[] input = operands.Rounded(n);
                    for (int o = 0; o < outputs; o++)
                    {
                        (double sum, double size) = (accumulate ? before[(n * outputs) + o] : 0, 1);
                        for (int i = 0; i < inputs; i++)
                        {
                            double product = (double)input[i] * operands.Values[(o * inputs) + i];
                            sum += product;
                            size += Math.Abs(product);
                        }

                        // Offsets of 4 and 5 bits cancel values of up to their own size.
                        float actual = operands.Output.HostSpan<float>()[(n * outputs) + o];
                        Assert.True(Math.Abs(sum - actual) <= 4e-6 * size, $"{type} {rows} x {outputs} x {inputs}: row {n}, output {o} is {actual}, not {sum}");
                    }
                }
            }
        }
    }

    [Theory]
    [InlineData(CpuPath.Vector512)]
    [InlineData(CpuPath.Vector256)]
    [InlineData(CpuPath.Vector128)]
    [InlineData(CpuPath.Scalar)]
    public void Weights_of_16_bits_are_kept_in_16_and_multiplied_as_they_are(CpuPath path)
    {
        using CpuBackend backend = CpuBackend.Create(1, path);
        using Arena arena = backend.Allocate("test", 1 << 20);
        Tensor output = arena.Take(3, 65);
        foreach (DType type in (DType[])[DType.BF16, DType.F16])
        {
            foreach (int inputs in (int[])[34, 35])
            {
                var weight = Weight.Frozen(arena, backend, 65, inputs, type);
                long bytes = weight.PackedForward.Count * weight.PackedForward.Type.ByteCount();
                if (inputs == 34)
                {
                    Assert.InRange(bytes, 65 * inputs * 2, 96 * inputs * 2);
                }

                // Each row is zero but for one place; they become small, in half precision subnormal.
                byte[] rows = new byte[65 * inputs * 2];
                for (int o = 0; o < 65; o++)
                {
                    float value = MathF.ScaleB(1 + (o % 2 / 2f), -Math.Min(o, type == DType.F16 ? 23 : 64));
                    Span<byte> place = rows.AsSpan(((o * inputs) + (o % inputs)) * 2);
                    MemoryMarshal.Write(place, type == DType.F16 ? BitConverter.HalfToUInt16Bits((Half)value) : (ushort)(BitConverter.SingleToUInt32Bits(value) >> 16));
                }

                backend.WriteRows(weight, 0, rows.AsSpan(0, 64 * inputs * 2));
                backend.WriteRows(weight, 64, rows.AsSpan(64 * inputs * 2));
                Tensor input = arena.Take(3, inputs);
                input.HostSpan<float>().Fill(1 + MathF.ScaleB(1, -20));
                backend.MatMul(output, input, weight);
                for (int o = 0; o < 65; o++)
                {
                    float value = MathF.ScaleB(1 + (o % 2 / 2f), -Math.Min(o, type == DType.F16 ? 23 : 64));
                    Assert.Equal(value * (1 + MathF.ScaleB(1, -20)), output.HostSpan<float>()[65 + o]);
                }
            }
        }
    }

    [Theory]
    [MemberData(nameof(All))]
    public void A_row_gets_the_same_bits_alone_and_among_others(CpuPath path, DType type)
    {
        using CpuBackend one = CpuBackend.Create(1, path);
        using CpuBackend three = CpuBackend.Create(3, path);
        const int Rows = 37;
        const int Outputs = 52;

        // More than the kernels turn at once.
        int inputs = type == DType.Q8_0 ? 9_504 : 512;
        using Operands together = new(three, type, Rows, Outputs, inputs);
        using Operands alone = new(one, type, Rows, Outputs, inputs);
        three.MatMul(together.Output, together.Input, together.Weight);
        for (int n = 0; n < Rows; n++)
        {
            one.MatMul(alone.Output.RowRange(n, 1), alone.Input.RowRange(n, 1), alone.Weight);
        }

        Assert.Equal(alone.Output.HostSpan<float>(), together.Output.HostSpan<float>());
    }

    // One row goes through four panels together, in several tasks; the last panels are fewer, and the last of them is not full.
    [Theory]
    [MemberData(nameof(All))]
    public void One_row_has_all_its_outputs_whoever_computes_them(CpuPath path, DType type)
    {
        const int Outputs = 1_130;
        using CpuBackend backend = CpuBackend.Create(3, path);
        using Operands operands = new(backend, type, 9, Outputs, inputs: 256);
        backend.MatMul(operands.Output, operands.Input, operands.Weight);
        float[] together = operands.Output.HostSpan<float>().ToArray();
        for (int n = 0; n < 9; n++)
        {
            Tensor alone = operands.Output.RowRange(n, 1);
            alone.HostSpan<float>().Fill(float.NaN);
            backend.MatMul(alone, operands.Input.RowRange(n, 1), operands.Weight);
            Assert.Equal(together.AsSpan(n * Outputs, Outputs), alone.HostSpan<float>());
        }
    }

    // Rows around whole tiles and pairs of them, and more than are multiplied at once.
    [Theory]
    [InlineData(DType.Q8_0, 96)]
    [InlineData(DType.Q8_0, 1_600)]
    [InlineData(DType.Q4_0, 96)]
    [InlineData(DType.Q4_0, 1_600)]
    [InlineData(DType.Q4_1, 96)]
    [InlineData(DType.Q5_0, 416)]
    [InlineData(DType.Q5_1, 96)]
    [InlineData(DType.Q4_K, 768)]
    [InlineData(DType.Q5_K, 256)]
    [InlineData(DType.Q6_K, 512)]
    public unsafe void Tiles_give_the_bits_of_rows(DType type, int inputs)
    {
        Assert.SkipWhen(AmxBytes.Fault is not null, $"{AmxBytes.Fault}");
        foreach ((int rows, int outputs) in (ReadOnlySpan<(int, int)>)[(6, 52), (9, 52), (16, 16), (17, 144), (32, 64), (33, 48), (300, 70)])
        {
            using CpuBackend tiles = CpuBackend.Create(2, CpuPath.Vector512Amx);
            using CpuBackend lanes = CpuBackend.Create(1, CpuPath.Vector512);
            using Operands actual = new(tiles, type, rows, outputs, inputs);
            using Operands expected = new(lanes, type, rows, outputs, inputs);
            actual.Output.HostSpan<float>().Fill(0.5f);
            expected.Output.HostSpan<float>().Fill(0.5f);
            foreach (bool accumulate in (bool[])[true, false])
            {
                tiles.MatMul(actual.Output, actual.Input, actual.Weight, accumulate);
                lanes.MatMul(expected.Output, expected.Input, expected.Weight, accumulate);
                Assert.Equal(expected.Output.HostSpan<float>(), actual.Output.HostSpan<float>());
            }

            fixed (byte* stored = actual.Bytes)
            {
                StoredRows range = new((nint)stored, outputs);
                if (!tiles.ReadsInPlace(type, inputs, range))
                {
                    continue;
                }

                using Arena arena = tiles.Allocate("test", 1 << 20);
                var packed = Weight.InPlace([range], inputs, type);
                actual.Output.HostSpan<float>().Clear();
                tiles.MatMul(actual.Output, actual.Input, packed);
                Assert.Equal(expected.Output.HostSpan<float>(), actual.Output.HostSpan<float>());
                packed.AwaitPacking(arena, tiles);
                tiles.Pack(packed);
                actual.Output.HostSpan<float>().Clear();
                tiles.MatMul(actual.Output, actual.Input, packed);
                Assert.Equal(expected.Output.HostSpan<float>(), actual.Output.HostSpan<float>());
            }
        }
    }

    [Theory]
    [InlineData(DType.Q8_0)]
    [InlineData(DType.Q4_0)]
    [InlineData(DType.Q5_0)]
    [InlineData(DType.Q4_K)]
    [InlineData(DType.Q5_K)]
    [InlineData(DType.Q6_K)]
    public void Emitted_code_gives_the_bits_of_rows(DType type)
    {
        Assert.SkipUnless(VnniBytes.IsSupported, "no AVX512-VNNI here");
        using CpuBackend emitted = CpuBackend.Create(2, CpuPath.Vector512Vnni);
        using CpuBackend lanes = CpuBackend.Create(1, CpuPath.Vector512);
        foreach ((int rows, int outputs) in (ReadOnlySpan<(int, int)>)[(1, 52), (1, 150), (2, 16), (5, 144), (33, 70)])
        {
            using Operands actual = new(emitted, type, rows, outputs, inputs: 512);
            using Operands expected = new(lanes, type, rows, outputs, inputs: 512);
            using Arena arena = emitted.Allocate("test", 1 << 20);
            Weight weight = actual.Weight;
            if (type == DType.Q8_0 && emitted.ReadsInPlace(type, weight.Inputs, weight.Rows.FirstOrDefault()))
            {
                weight = Weight.InPlace(weight.Rows, weight.Inputs, type);
                weight.AwaitPacking(arena, emitted);
                emitted.Pack(weight);
            }

            foreach (bool accumulate in (bool[])[false, true])
            {
                emitted.MatMul(actual.Output, actual.Input, weight, accumulate);
                lanes.MatMul(expected.Output, expected.Input, expected.Weight, accumulate);
                Assert.Equal(expected.Output.HostSpan<float>(), actual.Output.HostSpan<float>());
            }
        }
    }

    // Rows of three tensors, of which the first two have the halves of a head next to each other.
    [Theory]
    [MemberData(nameof(ReadInPlace))]
    public void Rows_that_are_read_in_place_give_the_bits_of_a_copy(CpuPath path, DType type)
    {
        using CpuBackend backend = CpuBackend.Create(2, path);
        const int Inputs = 8000;
        const int Outputs = 192;
        using Operands copied = new(backend, type, 35, Outputs, Inputs);
        int rowBytes = (int)type.RowBytes(Inputs);
        (int First, int Count, int HeadDim)[] parts = [(0, 64, 64), (64, 64, 64), (128, 64, 0)];
        byte[] stored = new byte[copied.Bytes.Length];
        foreach ((int first, int count, int headDim) in parts)
        {
            for (int row = 0; row < count; row++)
            {
                int half = headDim / 2;
                int place = headDim == 0 ? row : row < half ? 2 * row : (2 * (row - half)) + 1;
                copied.Bytes.AsSpan((first + row) * rowBytes, rowBytes).CopyTo(stored.AsSpan((first + place) * rowBytes));
            }
        }

        string name = Path.GetTempFileName();
        File.WriteAllBytes(name, stored);
        using (MappedFile file = MappedFile.Open(name))
        {
            using Arena arena = backend.Allocate("test", 1 << 23);
            StoredRows[] rows = [.. parts.Select(part => new StoredRows(file.Address(part.First * rowBytes, part.Count * rowBytes), part.Count, part.HeadDim))];
            Assert.All(rows, range => Assert.True(backend.ReadsInPlace(type, Inputs, range)));
            var weight = Weight.InPlace(rows, Inputs, type);
            Tensor output = arena.Take(35, Outputs);
            Compare();
            weight.AwaitPacking(arena, backend);
            Compare();
            backend.Pack(weight);
            Assert.False(weight.IsInPlace);
            Compare();

            void Compare()
            {
                foreach (int n in (ReadOnlySpan<int>)[1, 5, 9, 13, 35])
                {
                    backend.MatMul(copied.Output.RowRange(0, n), copied.Input.RowRange(0, n), copied.Weight);
                    backend.MatMul(output.RowRange(0, n), copied.Input.RowRange(0, n), weight);
                    Assert.Equal(copied.Output.RowRange(0, n).HostSpan<float>(), output.RowRange(0, n).HostSpan<float>());
                }
            }
        }

        File.Delete(name);
    }

    [Fact]
    public void Only_rows_that_fill_registers_evenly_are_read_in_place()
    {
        using CpuBackend backend = CpuBackend.Create(1, CpuPath.Vector256);
        Assert.True(backend.ReadsInPlace(DType.Q8_0, 96, new StoredRows(64, 40)));
        Assert.False(backend.ReadsInPlace(DType.Q8_0, 96, new StoredRows(64, 44)));
        Assert.True(backend.ReadsInPlace(DType.Q8_0, 96, new StoredRows(64, 64, 16)));
        Assert.False(backend.ReadsInPlace(DType.Q8_0, 96, new StoredRows(64, 64, 8)));
        Assert.True(backend.ReadsInPlace(DType.Q4_0, 96, new StoredRows(64, 40)));
        Assert.False(backend.ReadsInPlace(DType.Q4_0, 96, new StoredRows(64, 44)));
        Assert.False(backend.ReadsInPlace(DType.Q4_0, 1 << 20, new StoredRows(64, 40)));
        Assert.False(backend.ReadsInPlace(DType.Q4_K, 256, new StoredRows(64, 40)));
        Assert.True(backend.ReadsInPlace(DType.BF16, 96, new StoredRows(64, 48)));
        Assert.False(backend.ReadsInPlace(DType.BF16, 96, new StoredRows(64, 40)));
        Assert.False(backend.ReadsInPlace(DType.BF16, 95, new StoredRows(64, 48)));
        Assert.False(backend.ReadsInPlace(DType.F32, 96, new StoredRows(64, 48)));
    }

    [Theory]
    [MemberData(nameof(Quantized))]
    public void An_input_that_is_not_finite_reaches_every_output_of_its_row_only(CpuPath path, DType type)
    {
        using CpuBackend backend = CpuBackend.Create(1, path);
        foreach (float bad in (float[])[float.NaN, float.PositiveInfinity, float.NegativeInfinity])
        {
            using Operands operands = new(backend, type, 3, 20, 512);
            operands.Input.HostSpan<float>()[512 + 300] = bad;
            backend.MatMul(operands.Output, operands.Input, operands.Weight);
            float[] output = operands.Output.HostSpan<float>().ToArray();
            Assert.All(output[..20].Concat(output[40..]), value => Assert.True(float.IsFinite(value)));
            Assert.All(output[20..40], value => Assert.False(float.IsFinite(value)));
        }
    }

    [Theory]
    [MemberData(nameof(Quantized))]
    public void Inputs_of_zero_give_zero_and_the_smallest_ones_no_more_than_they_may(CpuPath path, DType type)
    {
        using CpuBackend backend = CpuBackend.Create(1, path);
        using Operands operands = new(backend, type, 2, 20, 256);
        foreach (float input in (float[])[0, float.Epsilon, 1e-42f, 1e-38f, 1e-36f, 1e-35f])
        {
            Span<float> inputs = operands.Input.HostSpan<float>();
            for (int i = 0; i < inputs.Length; i++)
            {
                inputs[i] = i % 3 == 0 ? input : 0;
            }

            backend.MatMul(operands.Output, operands.Input, operands.Weight);
            float most = 256 * input * operands.Values.Max(MathF.Abs);
            Assert.All(operands.Output.HostSpan<float>().ToArray(), value => Assert.InRange(value, -most, most));
        }
    }

    [Fact]
    public void Rows_are_written_in_whole_panels()
    {
        using CpuBackend backend = CpuBackend.Create(1);
        using Operands operands = new(backend, DType.Q8_0, 1, 128, 32);
        Assert.Throws<ArgumentException>(() => backend.WriteRows(operands.Weight, 8, new byte[34]));
        Assert.Throws<ArgumentException>(() => backend.WriteRows(operands.Weight, 64, new byte[34 * 65]));
        Assert.Throws<ArgumentException>(() => backend.WriteRows(operands.Weight, 0, new byte[33]));
    }

    [Theory]
    [InlineData(DType.F32)]
    [InlineData(DType.BF16)]
    [InlineData(DType.F16)]
    [InlineData(DType.Q8_0)]
    [InlineData(DType.Q4_0)]
    [InlineData(DType.Q6_K)]
    public void An_embedding_is_the_decoded_row(DType type)
    {
        using CpuBackend backend = CpuBackend.Create(1);
        using Operands operands = new(backend, type, 3, 9, 256);
        using Arena arena = backend.Allocate("test", 1 << 16);
        Tensor table = operands.Weight.PackedForward;
        if (!type.IsQuantized())
        {
            table = arena.Take(9, 256, type);
            Marshal.Copy(operands.Bytes, 0, table.Address, operands.Bytes.Length);
        }

        Tensor tokens = arena.Take(3, 1, DType.I32);
        backend.Write<int>(tokens, [8, 0, 5]);
        Tensor output = arena.Take(3, 256);
        backend.Embedding(output, table, tokens);
        Assert.Equal(operands.Values.AsSpan(8 * 256, 256), output.RowRange(0, 1).HostSpan<float>());
        Assert.Equal(operands.Values.AsSpan(0, 256), output.RowRange(1, 1).HostSpan<float>());
        Assert.Equal(operands.Values.AsSpan(5 * 256, 256), output.RowRange(2, 1).HostSpan<float>());
    }

    private sealed class Operands : IDisposable
    {
        private readonly Arena _arena;
        private readonly bool _rounds;

        public Operands(CpuBackend backend, DType type, int rows, int outputs, int inputs)
        {
            var random = new Random((rows * 31) + (outputs * 7) + inputs);
            _rounds = type.IsQuantized();
            _arena = backend.Allocate("test", 1 << 23);
            Weight = Weight.Frozen(_arena, backend, outputs, inputs, type);
            Input = _arena.Take(rows, inputs);
            Output = _arena.Take(rows, outputs);
            foreach (ref float value in Input.HostSpan<float>())
            {
                value = (random.NextSingle() - 0.5f) * (random.Next(20) == 0 ? 30 : 1);
            }

            (Bytes, Values) = Stored(random, type, outputs * inputs);
            int rowBytes = (int)type.RowBytes(inputs);
            for (int row = 0; row < outputs; row += Backend.PackedRows)
            {
                int count = Math.Min(Backend.PackedRows, outputs - row);
                backend.WriteRows(Weight, row, Bytes.AsSpan(row * rowBytes, count * rowBytes));
            }
        }

        public Weight Weight { get; }

        public Tensor Input { get; }

        public Tensor Output { get; }

        public byte[] Bytes { get; }

        public float[] Values { get; }

        /// <summary>The input row as the product rounds it: 32 at a time, to whole multiples of the largest / 127.</summary>
        public float[] Rounded(int row)
        {
            float[] values = Input.RowRange(row, 1).HostSpan<float>().ToArray();
            for (int first = 0; _rounds && first < values.Length; first += 32)
            {
                Span<float> group = values.AsSpan(first, 32);
                float scale = group.ToArray().Max(MathF.Abs) / 127;
                foreach (ref float value in group)
                {
                    value = MathF.Round(value * (1 / scale), MidpointRounding.ToEven) * scale;
                }
            }

            return values;
        }

        public void Dispose() => _arena.Dispose();

        // Any bytes are a block; only its scales must be sensible halves.
        private static (byte[] Bytes, float[] Values) Stored(Random random, DType type, int count)
        {
            byte[] bytes = new byte[type.RowBytes(count)];
            float[] values = new float[count];
            random.NextBytes(bytes);
            for (int block = 0; block * type.BlockElements() < count; block++)
            {
                Span<byte> place = bytes.AsSpan(block * type.BlockBytes(), type.BlockBytes());
                switch (type)
                {
                    case DType.F32:
                        MemoryMarshal.Write(place, random.NextSingle() - 0.5f);
                        values[block] = MemoryMarshal.Read<float>(place);
                        continue;
                    case DType.BF16:
                        place[1] = (byte)(0x3E | (place[1] & 0x80));
                        values[block] = BitConverter.UInt32BitsToSingle((uint)MemoryMarshal.Read<ushort>(place) << 16);
                        continue;
                    case DType.F16:
                        // One in five is subnormal.
                        MemoryMarshal.Write(place, (Half)((random.NextSingle() - 0.5f) * (random.Next(5) == 0 ? 1e-4f : 1)));
                        values[block] = (float)MemoryMarshal.Read<Half>(place);
                        continue;
                    case DType.Q6_K:
                        MemoryMarshal.Write(place[208..], (Half)(random.NextSingle() * 0.001f));
                        break;
                    default:
                        MemoryMarshal.Write(place, (Half)((random.NextSingle() - 0.3f) * 0.01f));
                        if (type is DType.Q4_1 or DType.Q5_1 or DType.Q4_K or DType.Q5_K)
                        {
                            // One in five is subnormal as a half.
                            MemoryMarshal.Write(place[2..], (Half)(random.NextSingle() * (random.Next(5) == 0 ? 1e-6f : 0.01f)));
                        }

                        break;
                }

                QuantizedBlocks.Decode(type, place, values.AsSpan(block * type.BlockElements(), type.BlockElements()));
            }

            return (bytes, values);
        }
    }
}
