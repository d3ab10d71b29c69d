using TinyLlama.Compute.Cuda;

namespace TinyLlama.Compute.Tests.Cuda;

/// <summary>The matrix products against those of the CPU's scalar path, which multiplies the same bf16 values with sums in fp32.</summary>
public sealed class MatMulTests : CudaTests
{
    // Below and above the few rows that a kernel of our own multiplies; outputs and inputs off its tiles and off 16 bytes.
    private static readonly (int Tokens, int Outputs, int Inputs)[] s_shapes =
    [
        (1, 16, 32), (1, 1, 1), (2, 300, 160), (5, 33, 64), (8, 17, 1056), (8, 40, 24), (9, 40, 32), (17, 7, 13), (33, 24, 40), (40, 96, 176), (5, 6, 400),
    ];

    // Half a unit in the last place of a bf16; the order of a sum, whose terms tensor cores also cut off at its last place.
    private const double BF16Tolerance = 1 / 255.0;
    private const double F32Tolerance = 3e-5;

    [Theory]
    [InlineData(DType.BF16)]
    [InlineData(DType.F32)]
    public void Products_equal_those_of_the_CPU(DType type)
    {
        double tolerance = type == DType.F32 ? F32Tolerance : BF16Tolerance;
        foreach ((int tokens, int outputs, int inputs) in s_shapes)
        {
            foreach (bool ranges in (bool[])[false, true])
            {
                foreach (bool accumulate in (bool[])[false, true])
                {
                    Operands o = new(this, tokens, outputs, inputs, type, ranges);
                    string where = $"{tokens} x {outputs} x {inputs} to {type}, ranges {ranges}, accumulate {accumulate}";
                    Tensor output = OnCpu(tokens, outputs, o.OutputBefore), dInput = OnCpu(tokens, inputs, o.InputValues);
                    Cpu.MatMul(output, OnCpu(tokens, inputs, o.InputValues), o.CpuWeight, accumulate);
                    Cuda.MatMul(o.Output, o.Input, o.Weight, accumulate);
                    Close(OfCpu(output), Get(o.Output), tolerance, "forward " + where);

                    Cpu.MatMulBackwardInput(dInput, OnCpu(tokens, outputs, o.OutputBefore), o.CpuWeight, accumulate);
                    Cuda.MatMulBackwardInput(o.DInput, o.DOutput, o.Weight, accumulate);
                    Close(OfCpu(dInput), Get(o.DInput), tolerance, "dInput " + where);

                    Tensor dWeight = OnCpu(outputs, inputs, o.WeightValues);
                    Cpu.MatMulBackwardWeight(dWeight, OnCpu(tokens, outputs, o.OutputBefore), OnCpu(tokens, inputs, o.InputValues));
                    Cuda.MatMulBackwardWeight(o.DWeight, o.DOutput, o.Input);
                    Close(OfCpu(dWeight), Get(o.DWeight), F32Tolerance, "dWeight " + where);
                    o.AssertNothingElseWritten(where);
                }
            }
        }
    }

    [Theory]
    [InlineData(3)]
    [InlineData(20)]
    public void Without_accumulation_what_was_in_the_result_does_not_matter(int tokens)
    {
        Operands o = new(this, tokens, 48, 64, DType.BF16, ranges: false);
        Tensor output = Put(tokens, 48, Filled(tokens * 48, float.NaN)), dInput = Put(tokens, 64, Filled(tokens * 64, float.PositiveInfinity));
        Cuda.MatMul(output, o.Input, o.Weight);
        Cuda.MatMulBackwardInput(dInput, o.DOutput, o.Weight);
        Assert.All(Get(output), value => Assert.True(float.IsFinite(value)));
        Assert.All(Get(dInput), value => Assert.True(float.IsFinite(value)));
    }

    [Fact]
    public void A_product_of_the_same_shape_with_other_strides_is_another()
    {
        Operands o = new(this, 20, 16, 32, DType.BF16, ranges: false);
        Cuda.MatMul(o.Output, o.Input, o.Weight);
        float[] output = Get(o.Output);
        Cuda.MatMul(o.Output, PutStrided(20, 32, o.InputValues), o.Weight);
        Close(output, Get(o.Output), BF16Tolerance, "forward");
    }

    [Fact]
    public void One_of_few_rows_has_the_bits_that_it_has_alone()
    {
        Operands o = new(this, 8, 50, 1184, DType.F32, ranges: false);
        Cuda.MatMul(o.Output, o.Input, o.Weight);
        float[] together = Get(o.Output);
        for (int count = 1; count < 8; count += 3)
        {
            Tensor output = Take(count, 50, DType.F32);
            Cuda.MatMul(output, o.Input.RowRange(8 - count, count), o.Weight);
            Assert.Equal(together[^(count * 50)..], Get(output));
        }
    }

    [Theory]
    [InlineData(9, 200, 40)]
    [InlineData(40, 64, 72)]
    public void A_weight_that_is_not_packed_gives_the_bits_of_one_that_is(int tokens, int outputs, int inputs)
    {
        Operands o = new(this, tokens, outputs, inputs, DType.BF16, ranges: false);
        Cuda.MatMul(o.Output, o.Input, o.Weight);
        Cuda.MatMulBackwardInput(o.DInput, o.DOutput, o.Weight);
        (float[] output, float[] dInput) = (Get(o.Output), Get(o.DInput));
        Weight unpacked = new(o.Weight.Values);
        Cuda.Pack(unpacked);
        Cuda.MatMul(o.Output, o.Input, unpacked);
        Cuda.MatMulBackwardInput(o.DInput, o.DOutput, unpacked);
        Assert.Equal(output, Get(o.Output));
        Assert.Equal(dInput, Get(o.DInput));
    }

    [Fact]
    public void A_weight_larger_than_the_scratch_is_converted_some_rows_at_a_time()
    {
        Operands o = new(this, 20, 150, 48, DType.F32, ranges: true);
        Weight unpacked = new(o.Weight.Values);
        using CudaDevice device = new(0);
        using MatMul products = new(device, Backend.PackedRows * 48);
        Cuda.MatMul(o.Output, o.Input, o.Weight);
        Cuda.MatMulBackwardInput(o.DInput, o.DOutput, o.Weight);
        (float[] output, float[] dInput) = (Get(o.Output), Get(o.DInput));
        products.Forward(o.Output, o.Input, unpacked, accumulate: false);
        products.BackwardInput(o.DInput, o.DOutput, unpacked, accumulate: false);
        Close(output, Get(o.Output), F32Tolerance, "output in three parts");
        Close(dInput, Get(o.DInput), F32Tolerance, "dInput in three parts");
    }

    [Theory]
    [InlineData(4)]
    [InlineData(12)]
    public void A_product_allocates_nothing(int tokens)
    {
        Operands o = new(this, tokens, 24, 32, DType.BF16, ranges: false);
        long before = 0;
        for (int run = 0; run < 3; run++)
        {
            // The first run makes plans and loads code.
            before = run == 1 ? GC.GetAllocatedBytesForCurrentThread() : before;
            Cuda.Pack(o.Weight);
            Cuda.MatMul(o.Output, o.Input, o.Weight);
            Cuda.MatMulBackwardInput(o.DInput, o.DOutput, o.Weight);
            Cuda.MatMulBackwardWeight(o.DWeight, o.DOutput, o.Input);
        }

        Assert.Equal(0, GC.GetAllocatedBytesForCurrentThread() - before);
    }

    [Fact]
    public void No_rows_are_no_product()
    {
        Operands o = new(this, 4, 24, 32, DType.BF16, ranges: false);
        float[] dWeight = Get(o.DWeight);
        Cuda.MatMul(o.Output.RowRange(0, 0), o.Input.RowRange(0, 0), o.Weight);
        Cuda.MatMulBackwardInput(o.DInput.RowRange(0, 0), o.DOutput.RowRange(0, 0), o.Weight);
        Cuda.MatMulBackwardWeight(o.DWeight, o.DOutput.RowRange(0, 0), o.Input.RowRange(0, 0));
        Assert.Equal(dWeight, Get(o.DWeight));
    }

    [Fact]
    public void Operands_that_do_not_fit_together_are_refused()
    {
        Operands o = new(this, 4, 16, 32, DType.BF16, ranges: false);
        Assert.Throws<ArgumentException>(() => Cuda.MatMul(o.Input, o.Output, o.Weight));
        Assert.Throws<ArgumentException>(() => Cuda.MatMul(o.Output.RowRange(0, 3), o.Input, o.Weight));
        Assert.Throws<ArgumentException>(() => Cuda.MatMul(o.Output, o.Input with { Type = DType.F32 }, o.Weight));
        Assert.Throws<ArgumentException>(() => Cuda.MatMul(o.Output, o.Input with { Address = o.Input.Address + 2 }, o.Weight));
        Assert.Throws<ArgumentException>(() => Cuda.MatMulBackwardInput(o.DOutput, o.DInput, o.Weight));
        Assert.Throws<ArgumentException>(() => Cuda.MatMulBackwardWeight(o.DWeight, o.Input, o.DOutput));
    }

    [Fact]
    public void What_cuBLASLt_refuses_is_an_error_that_names_the_function_and_its_status()
    {
        Operands o = new(this, 20, 16, 32, DType.BF16, ranges: false);
        DeviceException error = Assert.Throws<DeviceException>(() => Cuda.MatMul(o.Output, o.Input with { Stride = 31 }, o.Weight));
        Assert.Matches("^cublasLt[A-Za-z]+( of 16 x 20 x 32 to BF16)?: CUBLAS_STATUS_[A-Z_]+$", error.Message);
    }

    private static float[] Filled(int count, float value)
    {
        float[] values = new float[count];
        Array.Fill(values, value);
        return values;
    }

    /// <summary>The tensors of one linear layer; results hold the values that they have on the CPU before a product.</summary>
    private sealed class Operands
    {
        private readonly MatMulTests _tests;
        private readonly bool _ranges;

        public Operands(MatMulTests tests, int tokens, int outputs, int inputs, DType results, bool ranges)
        {
            (_tests, _ranges) = (tests, ranges);
            (InputValues, OutputBefore, WeightValues) = (tests.Normal(tokens * inputs), tests.Normal(tokens * outputs), tests.Normal(outputs * inputs));
            Input = Activation(tokens, inputs, InputValues, DType.BF16);
            DInput = Activation(tokens, inputs, InputValues, results);
            Output = Activation(tokens, outputs, OutputBefore, results);
            DOutput = Activation(tokens, outputs, OutputBefore, DType.BF16);
            DWeight = tests.Put(outputs, inputs, WeightValues, DType.F32);
            Weight = new Weight(tests.Put(outputs, inputs, WeightValues, DType.F32));
            Weight.TakePacked(tests.Room((outputs * inputs * 2) + 64), tests.Cuda, backward: false);
            tests.Cuda.Pack(Weight);
            CpuWeight = new Weight(tests.OnCpu(outputs, inputs, WeightValues));
        }

        public float[] InputValues { get; }

        public float[] OutputBefore { get; }

        public float[] WeightValues { get; }

        public Tensor Input { get; }

        public Tensor DInput { get; }

        public Tensor Output { get; }

        public Tensor DOutput { get; }

        public Tensor DWeight { get; }

        public Weight Weight { get; }

        public Weight CpuWeight { get; }

        /// <summary>Beside a column range there is NaN.</summary>
        public void AssertNothingElseWritten(string where)
        {
            if (!_ranges)
            {
                return;
            }

            foreach (Tensor range in (Tensor[])[Output, DInput])
            {
                Tensor wide = range with { Address = range.Address - (8 * range.Type.ByteCount()), Columns = range.Stride };
                float[] values = _tests.Get(wide);
                for (int i = 0; i < values.Length; i++)
                {
                    int column = (i % wide.Columns) - 8;
                    Assert.True(float.IsNaN(values[i]) != ((uint)column < (uint)range.Columns), $"{where}: row {i / wide.Columns}, column {column}");
                }
            }
        }

        private Tensor Activation(int rows, int columns, float[] values, DType type) =>
            _ranges ? _tests.PutStrided(rows, columns, values, type) : _tests.Put(rows, columns, values, type);
    }
}
