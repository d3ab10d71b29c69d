using System.Runtime.InteropServices;
using Iced.Intel;
using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>The emitted code, run by an interpreter of its instructions, so that any machine can test it, and by the processor if it can.</summary>
public sealed unsafe class VnniBytesTests
{
    private const int Lanes = 16;

    public static TheoryData<DType, int> Fetches => [.. from type in VnniBytes.Types from rows in (int[])[1, 2] select (type, rows)];

    public static TheoryData<DType, int, int, int> Products =>
        [.. from type in VnniBytes.Types from panels in (int[])[1, 3, 4] from blocks in (int[])[1, 2, 3] from rows in (int[])[1, 2, 5] select (type, panels, blocks, rows)];

    [Theory]
    [MemberData(nameof(Products))]
    public void The_code_gives_the_bits_of_the_definition(DType type, int panels, int blocks, int rows)
    {
        Operands operands = new(type, panels, blocks, rows);
        Assert.Equal(operands.Expected(), Interpret(operands, out _));
    }

    [Theory]
    [MemberData(nameof(Products))]
    public void The_processor_gives_the_bits_of_the_definition(DType type, int panels, int blocks, int rows)
    {
        Assert.SkipUnless(VnniBytes.IsSupported, "no AVX512-VNNI here");
        Assert.Null(VnniBytes.FaultOf(type));
        Operands operands = new(type, panels, blocks, rows);
        float[] actual = [.. operands.Sums];
        fixed (float* sums = actual)
        fixed (byte* weights = operands.Weights, inputs = operands.Inputs)
        {
            VnniBytes.Multiply(VnniBytes.Of(type), sums, weights, operands.PanelBytes, panels, inputs, blocks, rows, next: 0);
        }

        Assert.Equal(operands.Expected(), actual);
    }

    [Theory]
    [MemberData(nameof(Fetches))]
    public void Each_line_of_four_panels_is_fetched_some_blocks_ahead_and_then_of_what_is_read_next(DType type, int rows)
    {
        const int Blocks = 10;
        Operands operands = new(type, QuantizedMatMul.PanelsTogether, Blocks, rows);
        int blockBytes = type.BlockBytes() * Lanes;
        int ahead = QuantizedMatMul.BlocksAhead(blockBytes);

        // As panels do, what is read next ends with a line.
        int next = (100 * operands.PanelBytes) + (ahead * blockBytes % 64);
        Interpret(operands, out (ulong Weights, IReadOnlyList<ulong> Fetched) read, next);

        // Lines of a panel's blocks from one to before another.
        IEnumerable<ulong> Lines(int panel, int begin, int end, int further) =>
            from at in Enumerable.Range(begin * blockBytes, (end - begin) * blockBytes)
            select (read.Weights + (ulong)((panel * operands.PanelBytes) + at + further)) / 64;
        IEnumerable<ulong> expected =
            from panel in Enumerable.Range(0, QuantizedMatMul.PanelsTogether)
            from line in Lines(panel, ahead, Blocks, 0).Concat(Lines(panel, Blocks, Blocks + ahead, next))
            select line;
        Assert.Equal(expected.Distinct().Order(), read.Fetched.Select(address => address / 64).Distinct().Order());
    }

    [Fact]
    public void The_code_needs_no_other_instructions_than_those_that_are_asked_for()
    {
        CpuidFeature[] features = [CpuidFeature.INTEL8086, CpuidFeature.INTEL386, CpuidFeature.X64, CpuidFeature.SSE, CpuidFeature.AVX,
            CpuidFeature.AVX512F, CpuidFeature.AVX512_VNNI];
        foreach (DType type in VnniBytes.Types)
        {
            Assert.All(MachineCode.Decode(VnniBytes.Emit(type)), instruction => Assert.Empty(instruction.CpuidFeatures.Except(features)));
        }
    }

    private static float[] Interpret(Operands operands, out (ulong Weights, IReadOnlyList<ulong> Fetched) read, int next = 0)
    {
        MachineCode code = new(VnniBytes.Emit(operands.Type));
        ulong sums = code.Memory(MemoryMarshal.Cast<float, uint>(operands.Sums).ToArray(), writable: true);
        ulong inputs = code.Memory(MemoryMarshal.Cast<byte, uint>(operands.Inputs).ToArray());
        ulong weights = code.Memory(MemoryMarshal.Cast<byte, uint>(operands.Weights).ToArray());
        read = (weights, code.Fetched);
        uint[] actual = code.Call(
            sums, weights, (ulong)operands.PanelBytes, (ulong)operands.Panels, inputs, (ulong)operands.Blocks, (ulong)operands.Rows, (ulong)next);
        return MemoryMarshal.Cast<uint, float>(actual).ToArray();
    }

    /// <summary>Random blocks with scales of which no two products are alike, and random rows, rounded as products do it.</summary>
    private sealed class Operands
    {
        private readonly float[] _rows;

        public Operands(DType type, int panels, int blocks, int rows)
        {
            (Type, Panels, Blocks, Rows) = (type, panels, blocks, rows);
            Random random = new(blocks);
            Sums = [.. Enumerable.Range(0, panels * rows * Lanes).Select(_ => random.NextSingle() - 0.5f)];
            Weights = new byte[panels * PanelBytes];
            random.NextBytes(Weights);
            int halves = type is DType.Q4_K or DType.Q5_K ? 2 * Lanes : Lanes;
            for (int start = 0; start < Weights.Length; start += type.BlockBytes() * Lanes)
            {
                foreach (ref Half scale in MemoryMarshal.Cast<byte, Half>(Weights.AsSpan(start, halves * sizeof(ushort))))
                {
                    scale = (Half)(random.NextSingle() - 0.5f);
                }
            }

            _rows = [.. Enumerable.Range(0, rows * Columns).Select(_ => random.NextSingle() - 0.5f)];
            Inputs = new byte[rows * Groups * RoundedInputs.GroupBytes];
            using ThreadTeam team = new(1);
            fixed (byte* rounded = Inputs)
            fixed (float* input = _rows)
            {
                RoundedInputs.Round<Lanes512>(team, rounded, Matrix(input, Columns), rows, inWords: false);
            }
        }

        public DType Type { get; }

        public int Panels { get; }

        public int Blocks { get; }

        public int Rows { get; }

        public float[] Sums { get; }

        public byte[] Weights { get; }

        public byte[] Inputs { get; }

        public int PanelBytes => Blocks * Type.BlockBytes() * Lanes;

        private int Columns => Blocks * Type.BlockElements();

        private int Groups => Columns / RoundedInputs.Group;

        private int Outputs => Panels * Lanes;

        /// <summary>What the kernels without emitted code give; those of Q8_0 read rows, so it is reckoned here.</summary>
        public float[] Expected()
        {
            float[] output = new float[Rows * Outputs];
            for (int i = 0; i < Sums.Length; i++)
            {
                output[OfOutput(i)] = Sums[i];
            }

            fixed (byte* weights = Weights, inputs = Inputs)
            fixed (float* input = _rows, to = output)
            {
                if (Type == DType.Q8_0)
                {
                    AddProducts(to, weights, inputs);
                }
                else
                {
                    using ThreadTeam team = new(1);
                    using Scratch scratch = new(1);
                    QuantizedMatMul.Forward<Lanes512>(
                        team, scratch, Matrix(to, Outputs), Matrix(input, Columns), new((nint)weights, Outputs, Columns, Columns, Type), accumulate: true, code: 0, rows: []);
                }
            }

            return [.. Enumerable.Range(0, Sums.Length).Select(i => output[OfOutput(i)])];
        }

        private Tensor Matrix(float* first, int columns) => new((nint)first, Rows, columns, columns, DType.F32);

        // Sums are 16 outputs a row, row after row, panel after panel.
        private int OfOutput(int sum) => (sum / Lanes % Rows * Outputs) + (sum / (Lanes * Rows) * Lanes) + (sum % Lanes);

        private void AddProducts(float* output, byte* weights, byte* inputs)
        {
            for (int i = 0; i < Rows * Outputs; i++)
            {
                (int row, int ofRow) = int.DivRem(i, Outputs);
                (int panel, int lane) = int.DivRem(ofRow, Lanes);
                for (int group = 0; group < Groups; group++)
                {
                    byte* block = weights + (panel * PanelBytes) + (group * Type.BlockBytes() * Lanes);
                    byte* x = inputs + (((group * Rows) + row) * RoundedInputs.GroupBytes);
                    sbyte* bytes = (sbyte*)(block + (sizeof(ushort) * Lanes));
                    int products = 0;
                    for (int k = 0; k < RoundedInputs.Group; k++)
                    {
                        products += (sbyte)x[k] * bytes[(k / 4 * 4 * Lanes) + (4 * lane) + (k % 4)];
                    }

                    output[i] = MathF.FusedMultiplyAdd(products, (float)((Half*)block)[lane] * *(float*)(x + RoundedInputs.Group), output[i]);
                }
            }
        }
    }
}
