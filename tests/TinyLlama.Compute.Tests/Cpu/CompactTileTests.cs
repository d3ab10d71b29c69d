using System.Runtime.InteropServices;
using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Native;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>Compact panels: nothing is lost, and products have the bits of those with the panels that they were made from.</summary>
public sealed unsafe class CompactTileTests
{
    private const int Panels = 4;
    private const int Columns = 32;

    public static TheoryData<int> Steps => [1, 13, 15, 16, 17, 31, 48, 344];

    [Theory]
    [MemberData(nameof(Steps))]
    public void Panels_come_back_as_they_were(int steps)
    {
        uint[] panels = Random(steps), expected = [.. panels];
        Assert.True(TryCompact(panels, steps));

        // 13 of 16 steps; the rest of the room keeps what it held, if there is one.
        int used = ((steps / 16 * 13) + (steps % 16)) * Panels * Columns;
        Assert.Equal(expected.AsSpan(used), panels.AsSpan(used));
        Assert.Equal(expected, Expanded(panels, steps));
    }

    [Fact]
    public void Every_number_that_fits_does()
    {
        // Zero and 31 exponents of 128 mantissas, of both signs.
        uint[] numbers = [.. Enumerable.Range(98 << 7, 31 << 7).Prepend(0).SelectMany(static n => (uint[])[(uint)n, (uint)n | 0x8000])];
        int steps = (numbers.Length / 2 / Panels / Columns) + 1;
        uint[] panels = new uint[steps * Panels * Columns];
        for (int i = 0; i < panels.Length; i++)
        {
            panels[i] = numbers[2 * i % numbers.Length] | numbers[((2 * i) + 1) % numbers.Length] << 16;
        }

        uint[] expected = [.. panels];
        Assert.True(TryCompact(panels, steps));
        Assert.Equal(expected, Expanded(panels, steps));
    }

    [Theory]
    [InlineData(-1e-40f)]
    [InlineData(4f)]
    [InlineData(-4f)]
    [InlineData(1.8554e-9f)] // the largest below 2⁻²⁹
    [InlineData(1e-40f)]
    [InlineData(1e30f)]
    [InlineData(float.PositiveInfinity)]
    [InlineData(float.NaN)]
    public void Panels_with_any_other_number_stay_as_they_are(float number)
    {
        const int Length = 40;
        uint bits = BitConverter.SingleToUInt32Bits(number) >> 16;
        foreach (int at in (int[])[0, 33, 15 * Columns, (Length * Columns) + 5, (Length * Columns * 3) + (37 * Columns), (Length * Columns * Panels) - 1])
        {
            foreach (bool second in (bool[])[false, true])
            {
                uint[] panels = Random(Length);
                panels[at] = second ? (panels[at] & 0xFFFF) | bits << 16 : (panels[at] & 0xFFFF_0000) | bits;
                uint[] expected = [.. panels];
                Assert.False(TryCompact(panels, Length));
                Assert.Equal(expected, panels);
            }
        }
    }

    [Theory]
    [MemberData(nameof(Steps))]
    public void Products_have_the_bits_of_those_with_pairs(int steps)
    {
        var random = new Random(steps);
        uint[] pairs = Random(steps), compact = [.. pairs];
        Assert.True(TryCompact(compact, steps));
        float[] left = new float[2 * steps];
        foreach (ref float value in left.AsSpan())
        {
            value = (random.NextSingle() - 0.5f) * MathF.ScaleB(1, random.Next(-40, 30));
        }

        float[] scaled = new float[left.Length];
        foreach (bool accumulate in (bool[])[false, true])
        {
            float[] expected = [.. Enumerable.Range(0, Panels * Columns).Select(static i => 1f / (i + 1))], actual = [.. expected];
            fixed (uint* p = pairs, c = compact)
            fixed (float* x = left, s = scaled, e = expected, a = actual)
            {
                Assert.True(CompactTile.TryScaleRow(s, x, 2 * steps));
                CompactTile.MultiplyRow(e, x, (float*)p, steps * Columns, steps, accumulate);
                CompactTile.MultiplyCompactRow(a, s, (float*)c, steps, (float*)p, accumulate);
            }

            Assert.Equal(expected, actual);
        }
    }

    [Theory]
    [MemberData(nameof(Steps))]
    public void Tiles_have_the_bits_of_those_with_pairs(int steps)
    {
        const int SumsRow = Columns + 3;
        var random = new Random(steps);
        uint[] pairs = Random(steps), compact = [.. pairs];
        Assert.True(TryCompact(compact, steps));
        int leftRow = (2 * steps) + 5;
        float[] left = new float[CompactTile.Rows * leftRow], scaled = new float[left.Length];
        foreach (ref float value in left.AsSpan())
        {
            value = random.NextSingle() - 0.5f;
        }

        for (int rows = 1; rows <= CompactTile.Rows; rows++)
        {
            foreach (bool accumulate in (bool[])[false, true])
            {
                int panel = (rows + (accumulate ? 1 : 0)) % Panels;
                float[] expected = [.. Enumerable.Range(0, CompactTile.Rows * SumsRow).Select(static i => 1f / (i + 1))], actual = [.. expected];
                fixed (uint* p = pairs, c = compact)
                fixed (float* x = left, s = scaled, e = expected, a = actual)
                {
                    Assert.True(CompactTile.TryScaleRow(s, x, left.Length));
                    float* right = (float*)p + (panel * steps * Columns);
                    CompactTile.Multiply(e, SumsRow, x, leftRow, 1, right, steps, right, accumulate);
                    CompactTile.MultiplyCompact(a, SumsRow, rows, s, leftRow, (float*)c + (panel * Columns), steps, (float*)c, accumulate);
                }

                for (int row = 0; row < rows; row++)
                {
                    Assert.Equal(expected.AsSpan(row * SumsRow, SumsRow), actual.AsSpan(row * SumsRow, SumsRow));
                }
            }
        }
    }

    [Fact]
    public void Tiles_fetch_the_panels_that_come_next()
    {
        // Blocks of 344 steps and of 56 by two tasks of two groups each.
        const int Outputs = 512;
        const int Inputs = 800;
        using CpuBackend backend = CpuBackend.Create(1, CpuPath.Vector512);
        using ThreadTeam team = new(1);
        using Scratch scratch = new(1);
        using Arena arena = backend.Allocate("test", 1 << 22);
        var weight = Weight.Frozen(arena, backend, Outputs, Inputs, DType.BF16);
        ushort[] values = [.. Enumerable.Repeat((ushort)0x3F80, Outputs * Inputs)];
        MatMul.PackPairs<Lanes512, RecordingCompactTile>(team, scratch, weight, 0, MemoryMarshal.AsBytes(values.AsSpan()));
        foreach (int rows in (int[])[3, 21])
        {
            RecordingCompactTile.Calls.Clear();
            MatMul.ForwardPairs<Lanes512, RecordingCompactTile>(team, scratch, arena.Take(rows, Outputs), arena.Take(rows, Inputs), weight, accumulate: false);
            (nint Group, nint Bytes, HashSet<nint> Fetched)[] groups =
                [.. RecordingCompactTile.Calls.Chunk(Panels * ((rows + 7) / 8)).Select(static calls => (
                    calls[0].Compact, calls[0].Bytes * Panels, calls.SelectMany(static call => Lines(call.Ahead, call.Bytes)).ToHashSet()))];
            Assert.Equal(2 * Outputs / Panels / Columns, groups.Length);
            Assert.All(
                groups.Zip(groups.Skip(1)),
                static pair => Assert.Subset(pair.First.Fetched, Lines(pair.Second.Group, Math.Min(pair.First.Bytes, pair.Second.Bytes)).ToHashSet()));
        }

        // One row is given what comes next, and asks for its beginning.
        RecordingCompactTile.Calls.Clear();
        MatMul.ForwardPairs<Lanes512, RecordingCompactTile>(team, scratch, arena.Take(1, Outputs), arena.Take(1, Inputs), weight, accumulate: false);
        Assert.Equal(2 * Outputs / Panels / Columns, RecordingCompactTile.Calls.Count);
        Assert.Equal(RecordingCompactTile.Calls.Skip(1).Select(static call => call.Compact), RecordingCompactTile.Calls.SkipLast(1).Select(static call => call.Ahead));

        static IEnumerable<nint> Lines(nint address, nint bytes) => Enumerable.Range(0, (int)(bytes / 64)).Select(line => address + (line * 64));
    }

    [Theory]
    [InlineData(1e9f, true)]
    [InlineData(2e9f, true)]
    [InlineData(2.2e9f, false)]
    [InlineData(float.NegativeInfinity, false)]
    [InlineData(float.NaN, true)]
    public void A_row_that_becomes_infinite_is_refused(float value, bool expected)
    {
        foreach (int at in (int[])[0, 20, 37])
        {
            float[] row = new float[38];
            row[at] = value;
            fixed (float* first = row)
            {
                Assert.Equal(expected, CompactTile.TryScaleRow(first, first, row.Length));
            }
        }
    }

    // Groups of panels that are compact and such that are not, outputs beside them, rows whose inputs cannot be scaled.
    [Theory]
    [InlineData(1)]
    [InlineData(3)]
    [InlineData(12)]
    [InlineData(21)]
    public void A_weight_of_both_kinds_has_the_products_of_its_rows_in_place(int rows)
    {
        const int Outputs = 704;
        const int Inputs = 1_632;
        var random = new Random(rows);
        ushort[] values = new ushort[Outputs * Inputs];
        foreach (ref ushort value in values.AsSpan())
        {
            value = (ushort)(BitConverter.SingleToUInt32Bits((random.NextSingle() - 0.5f) * 0.1f + 1e-7f) >> 16);
        }

        // The second group of 128 outputs in the first block of inputs, the fourth in the last.
        values[(200 * Inputs) + 3] = 0x4080;
        values[(500 * Inputs) + 1_600] = 0xC080;
        using CpuBackend backend = CpuBackend.Create(3, CpuPath.Vector512);
        using Arena arena = backend.Allocate("test", 1 << 23);
        Tensor input = arena.Take(rows, Inputs), expected = arena.Take(rows, Outputs), actual = arena.Take(rows, Outputs);
        foreach (ref float value in input.HostSpan<float>())
        {
            value = random.NextSingle() - 0.5f;
        }

        string name = Path.GetTempFileName();
        File.WriteAllBytes(name, MemoryMarshal.AsBytes(values.AsSpan()));
        using (MappedFile file = MappedFile.Open(name))
        {
            StoredRows[] stored = [new StoredRows(file.Address(0, (long)values.Length * sizeof(ushort)), Outputs)];
            var inPlace = Weight.InPlace(stored, Inputs, DType.BF16);
            var written = Weight.Frozen(arena, backend, Outputs, Inputs, DType.BF16);
            for (int row = 0; row < Outputs; row += 192)
            {
                int count = Math.Min(192, Outputs - row);
                backend.WriteRows(written, row, MemoryMarshal.AsBytes(values.AsSpan(row * Inputs, count * Inputs)));
            }

            Assert.Throws<ArgumentException>(() => backend.WriteRows(written, 192, MemoryMarshal.AsBytes(values.AsSpan(0, 192 * Inputs))));
            var packed = Weight.InPlace(stored, Inputs, DType.BF16);
            packed.AwaitPacking(arena, backend);
            backend.Pack(packed);
            Assert.Equal([true, false, true, true, true, true, true, true, true, true, true, true, true, false, true], [.. packed.CompactPanels!]);
            Assert.Equal(packed.CompactPanels, written.CompactPanels);
            Assert.Equal(packed.UnreadBytes, written.UnreadBytes);

            // Three blocks of 272 steps: of 17 · 16 steps of 13 groups of panels three of 16 are not read.
            Assert.Equal(13 * 17 * 3 * Panels * Columns * sizeof(float), packed.UnreadBytes);
            foreach (float large in (float[])[1, 1e12f])
            {
                input.HostSpan<float>()[^1] *= large;
                foreach (bool accumulate in (bool[])[false, true])
                {
                    backend.MatMul(expected, input, inPlace, accumulate);
                    backend.MatMul(actual, input, packed, accumulate);
                    Assert.Equal(expected.HostSpan<float>(), actual.HostSpan<float>());
                    actual.HostSpan<float>().Clear();
                    backend.MatMul(actual, input, written);
                    backend.MatMul(expected, input, inPlace);
                    Assert.Equal(expected.HostSpan<float>(), actual.HostSpan<float>());
                }
            }
        }

        File.Delete(name);
    }

    // Numbers of every exponent that fits, and zeros.
    private static uint[] Random(int steps)
    {
        var random = new Random(steps);
        uint[] panels = new uint[steps * Panels * Columns];
        foreach (ref uint pair in panels.AsSpan())
        {
            pair = Number() | Number() << 16;
        }

        return panels;

        uint Number() => (uint)(random.Next(2) << 15 | (random.Next(16) == 0 ? 0 : random.Next(98 << 7, 129 << 7)));
    }

    private static bool TryCompact(uint[] panels, int steps)
    {
        uint[] scratch = new uint[panels.Length];
        fixed (uint* p = panels, s = scratch)
        {
            return CompactTile.TryCompact((float*)p, steps, (float*)s);
        }
    }

    private static uint[] Expanded(uint[] compact, int steps)
    {
        uint[] panels = new uint[compact.Length];
        fixed (uint* p = panels, c = compact)
        {
            for (int panel = 0; panel < Panels; panel++)
            {
                CompactTile.Expand((float*)p + (panel * steps * Columns), (float*)c + (panel * Columns), steps);
            }
        }

        return panels;
    }
}
