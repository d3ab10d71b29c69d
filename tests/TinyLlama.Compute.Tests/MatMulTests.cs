using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Tests.Cpu;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests;

/// <summary>The matrix products on every path against their definition, and the bits that must not change.</summary>
public sealed class MatMulTests
{
    // Below, at and above the sizes of tiles, panels and blocks of each width; a row's sum over more than one block of k.
    private static readonly (int Tokens, int Outputs, int Inputs)[] s_shapes =
    [
        (1, 1, 1), (1, 16, 8), (1, 64, 33), (1, 100, 401), (1, 129, 7), (2, 3, 5), (3, 5, 1), (5, 7, 3), (6, 16, 16), (6, 15, 9),
        (7, 17, 15), (8, 32, 32), (13, 33, 31), (15, 1, 100), (16, 100, 6), (17, 6, 17), (33, 48, 100), (100, 33, 7),
        (97, 130, 64), (12, 40, 800), (40, 12, 385), (386, 5, 6),
    ];

    private static readonly CpuPath[] s_paths = [CpuPath.Vector512, CpuPath.Vector256, CpuPath.Vector128, CpuPath.Scalar];

    public static TheoryData<CpuPath> Widths => [.. s_paths];

    /// <summary>Each width in both types, and the emitted code or what stands for it.</summary>
    public static TheoryData<CpuPath, DType> Paths =>
        [.. s_paths.SelectMany(path => new[] { (path, DType.F32), (path, DType.BF16) }), (CpuPath.Vector512Bf16, DType.BF16), (CpuPath.Vector512Amx, DType.BF16)];

    [Theory]
    [MemberData(nameof(Paths))]
    public void Each_product_equals_its_definition(CpuPath path, DType products)
    {
        using CpuBackend backend = On(2, path, products);
        foreach ((int tokens, int outputs, int inputs) in s_shapes)
        {
            foreach (bool ranges in (bool[])[false, true])
            {
                foreach (bool packed in (bool[])[false, true])
                {
                    using Operands operands = new(backend, tokens, outputs, inputs, ranges, packed);
                    string where = $"{tokens} x {outputs} x {inputs}, column ranges {ranges}, packed {packed}";
                    foreach (bool accumulate in (bool[])[false, true])
                    {
                        Tensor output = operands.Copy(operands.Output);
                        MatMul.Scalar.Forward(output, operands.Rounded(operands.Input), operands.Rounded(operands.Weight.Values), accumulate);
                        backend.MatMul(operands.Output, operands.Input, operands.Weight, accumulate);
                        AssertClose(output, operands.Output, inputs, "forward " + where);

                        Tensor dInput = operands.Copy(operands.DInput);
                        MatMul.Scalar.BackwardInput(dInput, operands.Rounded(operands.DOutput), operands.Rounded(operands.Weight.Values), accumulate);
                        backend.MatMulBackwardInput(operands.DInput, operands.DOutput, operands.Weight, accumulate);
                        AssertClose(dInput, operands.DInput, outputs, "dInput " + where);
                    }

                    Tensor dWeight = operands.Copy(operands.Weight.Gradient);
                    MatMul.Scalar.BackwardWeight(dWeight, operands.Rounded(operands.DOutput), operands.Rounded(operands.Input));
                    backend.MatMulBackwardWeight(operands.Weight.Gradient, operands.DOutput, operands.Input);
                    AssertClose(dWeight, operands.Weight.Gradient, tokens, "dWeight " + where);
                    operands.AssertNothingElseWritten(where);
                }
            }
        }
    }

    [Theory]
    [MemberData(nameof(Paths))]
    public void Without_accumulation_what_was_in_the_result_does_not_matter(CpuPath path, DType products)
    {
        using CpuBackend backend = On(1, path, products);
        using Operands operands = new(backend, 7, 37, 400, ranges: false, packed: true);
        operands.Output.HostSpan<float>().Fill(float.NaN);
        operands.DInput.HostSpan<float>().Fill(float.PositiveInfinity);
        backend.MatMul(operands.Output, operands.Input, operands.Weight);
        backend.MatMulBackwardInput(operands.DInput, operands.DOutput, operands.Weight);
        Assert.All(operands.Output.HostSpan<float>().ToArray(), value => Assert.True(float.IsFinite(value)));
        Assert.All(operands.DInput.HostSpan<float>().ToArray(), value => Assert.True(float.IsFinite(value)));
    }

    [Theory]
    [MemberData(nameof(Paths))]
    public void What_an_earlier_product_left_behind_does_not_matter(CpuPath path, DType products)
    {
        using CpuBackend backend = On(1, path, products);
        using Operands before = new(backend, 8, 8, 8, ranges: false, packed: false);
        using Operands operands = new(backend, 7, 7, 7, ranges: false, packed: false);
        foreach (Tensor tensor in new[] { before.Input, before.DOutput, before.Weight.Values })
        {
            tensor.HostSpan<float>().Fill(float.NaN);
        }

        backend.MatMul(before.Output, before.Input, before.Weight);
        backend.MatMul(operands.Output, operands.Input, operands.Weight);
        backend.MatMulBackwardInput(before.DInput, before.DOutput, before.Weight);
        backend.MatMulBackwardInput(operands.DInput, operands.DOutput, operands.Weight);
        backend.MatMulBackwardWeight(before.Weight.Gradient, before.DOutput, before.Input);
        backend.MatMulBackwardWeight(operands.Weight.Gradient, operands.DOutput, operands.Input);
        foreach (Tensor tensor in new[] { operands.Output, operands.DInput, operands.Weight.Gradient })
        {
            Assert.All(tensor.HostSpan<float>().ToArray(), value => Assert.True(float.IsFinite(value)));
        }
    }

    [Theory]
    [MemberData(nameof(Paths))]
    public void The_number_of_threads_changes_no_bit(CpuPath path, DType products)
    {
        (int, int, int)[] shapes = path == CpuPath.Vector256 ? [(200, 300, 410), (1, 700, 300), (513, 96, 64)] : [(100, 70, 90), (1, 300, 64)];
        foreach ((int tokens, int outputs, int inputs) in shapes)
        {
            float[][] results = [.. Enumerable.Range(1, 3).Select(threads =>
            {
                using CpuBackend backend = On(threads, path, products);
                using Operands operands = new(backend, tokens, outputs, inputs, ranges: true, packed: threads != 2);
                backend.MatMul(operands.Output, operands.Input, operands.Weight);
                backend.MatMulBackwardInput(operands.DInput, operands.DOutput, operands.Weight, accumulate: true);
                backend.MatMulBackwardWeight(operands.Weight.Gradient, operands.DOutput, operands.Input);
                return (float[])
                [
                    .. operands.Copy(operands.Output).HostSpan<float>(), .. operands.Copy(operands.DInput).HostSpan<float>(),
                    .. operands.Copy(operands.Weight.Gradient).HostSpan<float>(),
                ];
            })];
            AssertSameBits(results[0], results[1]);
            AssertSameBits(results[0], results[2]);
        }
    }

    [Theory]
    [MemberData(nameof(Paths))]
    public void A_row_has_the_same_bits_alone_and_in_any_company(CpuPath path, DType products)
    {
        using CpuBackend backend = On(2, path, products);
        int tokens = path == CpuPath.Vector256 ? 512 : 50;
        foreach (bool packed in (bool[])[false, true])
        {
            using Operands operands = new(backend, tokens, 75, 790, ranges: false, packed);
            backend.MatMul(operands.Output, operands.Input, operands.Weight);
            backend.MatMulBackwardInput(operands.DInput, operands.DOutput, operands.Weight);
            Tensor output = operands.Copy(operands.Output);
            Tensor dInput = operands.Copy(operands.DInput);
            foreach ((int first, int count) in new[] { (0, 1), (tokens - 1, 1), (5, 2), (11, 5), (7, 7), (2, 33) })
            {
                operands.Output.HostSpan<float>().Fill(float.NaN);
                operands.DInput.HostSpan<float>().Fill(float.NaN);
                backend.MatMul(operands.Output.RowRange(first, count), operands.Input.RowRange(first, count), operands.Weight);
                backend.MatMulBackwardInput(operands.DInput.RowRange(first, count), operands.DOutput.RowRange(first, count), operands.Weight);
                AssertSameBits(output.RowRange(first, count).HostSpan<float>(), operands.Output.RowRange(first, count).HostSpan<float>());
                AssertSameBits(dInput.RowRange(first, count).HostSpan<float>(), operands.DInput.RowRange(first, count).HostSpan<float>());
            }
        }
    }

    [Theory]
    [InlineData(DType.F32, 3, 20_000, 300)]
    [InlineData(DType.BF16, 3, 20_000, 300)]
    [InlineData(DType.F32, 1, 20_000, 300)]
    [InlineData(DType.BF16, 1, 20_000, 300)]
    [InlineData(DType.F32, 2, 3, 600_000)]
    [InlineData(DType.BF16, 2, 3, 600_000)]
    public void A_weight_too_large_to_pack_at_once_gives_the_bits_of_one_packed_before(DType products, int tokens, int outputs, int inputs)
    {
        using CpuBackend backend = CpuBackend.Create(2, CpuPath.Vector256, products);
        using Operands operands = new(backend, tokens, outputs, inputs, ranges: false, packed: true);
        backend.MatMul(operands.Output, operands.Input, operands.Weight);
        Tensor output = operands.Copy(operands.Output);
        operands.Output.HostSpan<float>().Fill(float.NaN);
        backend.MatMul(operands.Output, operands.Input, new Weight(operands.Weight.Values));
        AssertSameBits(output.HostSpan<float>(), operands.Output.HostSpan<float>());
        MatMul.Scalar.Forward(output, operands.Rounded(operands.Input), operands.Rounded(operands.Weight.Values), accumulate: false);
        AssertClose(output, operands.Output, inputs, "forward");
    }

    [Theory]
    [InlineData(DType.F32, 400, 12_000, 3)]
    [InlineData(DType.BF16, 400, 12_000, 3)]
    [InlineData(DType.F32, 400, 3, 12_000)]
    [InlineData(DType.BF16, 400, 3, 12_000)]
    [InlineData(DType.F32, 3000, 2900, 3)]
    [InlineData(DType.BF16, 3000, 2900, 3)]
    public void A_gradient_whose_operands_are_too_large_to_pack_at_once_equals_its_definition(DType products, int tokens, int outputs, int inputs)
    {
        using CpuBackend backend = CpuBackend.Create(2, CpuPath.Vector256, products);
        using Operands operands = new(backend, tokens, outputs, inputs, ranges: false, packed: false);
        Tensor dWeight = operands.Copy(operands.Weight.Gradient);
        MatMul.Scalar.BackwardWeight(dWeight, operands.Rounded(operands.DOutput), operands.Rounded(operands.Input));
        backend.MatMulBackwardWeight(operands.Weight.Gradient, operands.DOutput, operands.Input);
        AssertClose(dWeight, operands.Weight.Gradient, tokens, "dWeight");
    }

    [Theory]
    [MemberData(nameof(Widths))]
    public void The_products_equal_the_golden_ones(CpuPath path)
    {
        GoldenFile golden = GoldenFile.Open(SharedFiles.Require("goldens/llama-tiny/ops.safetensors"));
        using CpuBackend backend = CpuBackend.Create(2, path);
        using Arena arena = backend.Allocate("test", 1 << 20);
        Tensor Load(string name)
        {
            (double[] values, int[] shape) = golden.Read("linear." + name);
            Tensor tensor = arena.Take(values.Length / shape[^1], shape[^1]);
            backend.Write<float>(tensor, [.. values.Select(value => (float)value)]);
            return tensor;
        }

        Tensor x = Load("x"), dy = Load("dy"), w = Load("w");
        Tensor y = arena.Take(dy.Rows, dy.Columns), dx = arena.Take(x.Rows, x.Columns), dw = arena.Take(w.Rows, w.Columns);
        Weight weight = new(w, dw);
        backend.MatMul(y, x, weight);
        backend.MatMulBackwardInput(dx, dy, weight);
        backend.MatMulBackwardWeight(dw, dy, x);
        foreach ((string name, Tensor tensor) in new[] { ("y", y), ("dx", dx), ("dw", dw) })
        {
            double[] expected = golden.Read("linear." + name).Values;
            float[] actual = tensor.HostSpan<float>().ToArray();
            double error = expected.Zip(actual, (e, a) => (e - a) * (e - a)).Sum() / expected.Sum(e => e * e);
            Assert.InRange(Math.Sqrt(error), 0, 3e-7);
        }
    }

    [Theory]
    [InlineData(DType.F32)]
    [InlineData(DType.BF16)]
    public void A_product_allocates_nothing(DType products)
    {
        using CpuBackend backend = CpuBackend.Create(2, products: products);
        foreach (bool packed in (bool[])[false, true])
        {
            foreach (int tokens in (int[])[1, 130])
            {
                using Operands operands = new(backend, tokens, 96, 64, ranges: false, packed);
                long before = 0;
                for (int run = 0; run < 3; run++)
                {
                    // The first run may load code.
                    before = run == 1 ? GC.GetAllocatedBytesForCurrentThread() : before;
                    backend.Pack(operands.Weight);
                    backend.MatMul(operands.Output, operands.Input, operands.Weight);
                    backend.MatMulBackwardInput(operands.DInput, operands.DOutput, operands.Weight);
                    backend.MatMulBackwardWeight(operands.Weight.Gradient, operands.DOutput, operands.Input);
                }

                Assert.Equal(0, GC.GetAllocatedBytesForCurrentThread() - before);
            }
        }
    }

    [Theory]
    [InlineData(DType.F32)]
    [InlineData(DType.BF16)]
    public void Few_sums_of_many_products_have_the_bits_of_many_sums(DType products)
    {
        // Few sums are added to in several sweeps over the depth, so many in one.
        using CpuBackend backend = CpuBackend.Create(2, products: products);
        using Operands operands = new(backend, tokens: 260, outputs: 2300, inputs: 2048, ranges: false, packed: true);
        backend.MatMulBackwardInput(operands.DInput, operands.DOutput, operands.Weight);
        float[] many = operands.DInput.RowRange(100, 3).HostSpan<float>().ToArray();
        backend.MatMulBackwardInput(operands.DInput.RowRange(0, 3), operands.DOutput.RowRange(100, 3), operands.Weight);
        AssertSameBits(many, operands.DInput.RowRange(0, 3).HostSpan<float>());
        backend.MatMulBackwardInput(operands.DInput.RowRange(100, 3), operands.DOutput.RowRange(100, 3), operands.Weight, accumulate: true);
        for (int i = 0; i < many.Length; i++)
        {
            Assert.Equal(2 * many[i], operands.DInput.RowRange(100, 3).HostSpan<float>()[i], 1e-4f);
        }
    }

    [Fact]
    public void Tiles_fetch_the_panel_that_comes_next()
    {
        // Blocks of 352 steps and of 48, in two tasks: behind the last panel of a block comes the first of another.
        using var backend = new CpuBackend<Lanes128, RecordingTile>(CpuPath.Vector128, 1);
        using Operands operands = new(backend, tokens: 66, outputs: 64, inputs: 400, ranges: false, packed: true);
        RecordingTile.Calls.Clear();
        backend.MatMul(operands.Output, operands.Input, operands.Weight);
        (nint Panel, nint Bytes, HashSet<nint> Fetched)[] panels =
            [.. RecordingTile.Calls.GroupBy(static call => (call.Panel, call.PanelBytes)).Select(static calls =>
                (calls.Key.Panel, calls.Key.PanelBytes, calls.SelectMany(static call => Lines(call.Ahead, call.AheadBytes)).ToHashSet()))];
        Assert.Equal(2 * 8, panels.Length);
        Assert.All(
            panels.Zip(panels.Skip(1)),
            static pair => Assert.Subset(pair.First.Fetched, Lines(pair.Second.Panel, Math.Min(pair.First.Bytes, pair.Second.Bytes)).ToHashSet()));

        static IEnumerable<nint> Lines(nint address, nint bytes) => Enumerable.Range(0, (int)(bytes / 64)).Select(line => address + (line * 64));
    }

    [Fact]
    public void Operands_that_do_not_fit_together_are_refused()
    {
        using CpuBackend backend = CpuBackend.Create(1);
        using Operands operands = new(backend, 4, 5, 6, ranges: false, packed: false);
        Assert.Throws<ArgumentException>(() => backend.MatMul(operands.Input, operands.Output, operands.Weight));
        Assert.Throws<ArgumentException>(() => backend.MatMul(operands.Output.RowRange(0, 3), operands.Input, operands.Weight));
        Assert.Throws<ArgumentException>(() => backend.MatMulBackwardInput(operands.DOutput, operands.DInput, operands.Weight));
        Assert.Throws<ArgumentException>(() => backend.MatMulBackwardWeight(operands.Weight.Gradient, operands.Input, operands.DOutput));
        Assert.Throws<ArgumentException>(() => backend.MatMul(operands.Output with { Type = DType.I32 }, operands.Input, operands.Weight));
    }

    [Fact]
    public void The_ceiling_is_measured()
    {
        using CpuBackend backend = CpuBackend.Create(2);
        CpuCeiling ceiling = CpuCeiling.Measure(backend);
        Assert.Equal((backend.Path, 2), (ceiling.Path, ceiling.Threads));
        Assert.All(
            [ceiling.OneThread, ceiling.AllThreads, ceiling.OneThreadRead, ceiling.AllThreadsRead], rate => Assert.InRange(rate, 0.01, 1e6));
    }

    private static CpuBackend On(int threads, CpuPath path, DType products) =>
        (path, CpuPaths.Bf16FaultOf(path)) switch
        {
            (CpuPath.Vector512Amx, not null) => new CpuBackend<Lanes512, AmxPairTile>(path, threads),
            (CpuPath.Vector512Bf16, not null) => new CpuBackend<Lanes512, PairTile>(path, threads),
            _ => CpuBackend.Create(threads, path, products),
        };

    private static void AssertClose(Tensor expected, Tensor actual, int depth, string where)
    {
        // Of products up to 1: each addition rounds by half a unit in the last place of a sum that grows with its root.
        double tolerance = 1.2e-7 * (4 + depth);
        for (int row = 0; row < expected.Rows; row++)
        {
            ReadOnlySpan<float> e = expected.RowRange(row, 1).HostSpan<float>();
            ReadOnlySpan<float> a = actual.RowRange(row, 1).HostSpan<float>();
            for (int column = 0; column < e.Length; column++)
            {
                Assert.True(Math.Abs(e[column] - a[column]) <= tolerance, $"{where}: ({row}, {column}) is {a[column]}, not {e[column]}");
            }
        }
    }

    private static void AssertSameBits(ReadOnlySpan<float> expected, ReadOnlySpan<float> actual) =>
        Assert.True(expected.SequenceEqual(actual), "bits differ");

    /// <summary>Random operands; with column ranges each lies inside a wider tensor of sentinels.</summary>
    private sealed class Operands : IDisposable
    {
        private const float Sentinel = -12345;

        private readonly CpuBackend _backend;
        private readonly Arena _arena;
        private readonly Random _random;
        private readonly List<(Tensor Whole, int First, int Columns)> _ranges = [];
        private readonly bool _inRanges;

        public Operands(CpuBackend backend, int tokens, int outputs, int inputs, bool ranges, bool packed)
        {
            _backend = backend;
            _inRanges = ranges;
            _random = new Random((tokens * 31) + (outputs * 7) + inputs);
            long floats = (16L * tokens * (outputs + inputs + 64)) + (8L * (outputs + 64) * (inputs + 64)) + (8L * outputs * inputs) + 4096;
            _arena = backend.Allocate("test", floats * sizeof(float));
            Input = Filled(tokens, inputs);
            Output = Filled(tokens, outputs);
            DOutput = Filled(tokens, outputs);
            DInput = Filled(tokens, inputs);
            Weight = new Weight(Filled(outputs, inputs), Filled(outputs, inputs));
            if (packed)
            {
                Weight.TakePacked(_arena, backend, backward: true);
                backend.Pack(Weight);
            }
        }

        public Tensor Input { get; }

        public Tensor Output { get; }

        public Tensor DOutput { get; }

        public Tensor DInput { get; }

        public Weight Weight { get; }

        public Tensor Copy(Tensor tensor)
        {
            Tensor copy = _arena.Take(tensor.Rows, tensor.Columns);
            for (int row = 0; row < tensor.Rows; row++)
            {
                _backend.Write<float>(copy.RowRange(row, 1), tensor.RowRange(row, 1).HostSpan<float>());
            }

            return copy;
        }

        /// <summary>The tensor as the backend multiplies it.</summary>
        public Tensor Rounded(Tensor tensor)
        {
            Tensor copy = Copy(tensor);
            foreach (ref float value in _backend.Products == DType.BF16 ? copy.HostSpan<float>() : [])
            {
                value = Compute.Cpu.Copy.FromBFloat16(Compute.Cpu.Copy.ToBFloat16(value));
            }

            return copy;
        }

        public void AssertNothingElseWritten(string where)
        {
            foreach ((Tensor whole, int first, int columns) in _ranges)
            {
                for (int row = 0; row < whole.Rows; row++)
                {
                    Span<float> values = whole.RowRange(row, 1).HostSpan<float>();
                    Assert.True(values[..first].IndexOfAnyExcept(Sentinel) < 0, "written before the range: " + where);
                    Assert.True(values[(first + columns)..].IndexOfAnyExcept(Sentinel) < 0, "written after the range: " + where);
                }
            }
        }

        public void Dispose() => _arena.Dispose();

        private Tensor Filled(int rows, int columns)
        {
            int first = _inRanges ? 3 : 0;
            Tensor whole = _arena.Take(rows, columns + (_inRanges ? 13 : 0));
            whole.HostSpan<float>().Fill(Sentinel);
            _ranges.Add((whole, first, columns));
            Tensor range = whole.ColumnRange(first, columns);
            for (int row = 0; row < rows; row++)
            {
                foreach (ref float value in range.RowRange(row, 1).HostSpan<float>())
                {
                    value = (_random.NextSingle() * 2) - 1;
                }
            }

            return range;
        }
    }
}
