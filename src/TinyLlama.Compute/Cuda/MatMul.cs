using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Cuda;

/// <summary>
/// The matrix products of a linear layer, and the forms of weights that they read. Operands are BF16, sums fp32, results
/// BF16 or F32.
/// </summary>
/// <remarks>
/// The packed form of a weight is its rows in BF16; forward and backward read the same. Blocks of Q8_0 and Q4_0 stay
/// blocks (see <see cref="WeightBlocks"/>). A few rows, which is decoding, are multiplied by kernels of our own that read each
/// byte of the weight once and give a row the same bits in any company; more rows by cuBLASLt, for which rows of a
/// weight that are not kept in BF16 are converted to it in a scratch.
/// </remarks>
internal sealed unsafe class MatMul : IDisposable
{
    // Rows that the kernels for few of them take: reading them once for 16 outputs costs half of reading the weights. Of
    // blocks, which cuBLASLt does not read, so many that it costs no more than converting the blocks.
    private const int FewRows = 8;
    private const int FewRowsOfBlocks = 32;

    // What a block of threads of those kernels owns.
    private const int OutputsPerBlock = 16;
    private const int Threads = 256;

    // 128 MiB: the largest matrix of a model of a billion parameters.
    private const int ScratchElements = 64 << 20;

    private readonly CudaDevice _device;
    private readonly MatrixProducts _products;
    private readonly int _scratchElements;
    private Tensor _scratch;

    /// <summary>Opens cuBLASLt.</summary>
    /// <param name="device">The device; dispose of this before it.</param>
    /// <param name="scratchElements">Elements of the scratch: as many as <see cref="Backend.PackedRows"/> rows of any weight at least.</param>
    /// <exception cref="DeviceException">The memory that cuBLASLt needs is not there.</exception>
    public MatMul(CudaDevice device, int scratchElements = ScratchElements)
    {
        (_device, _products, _scratchElements) = (device, new MatrixProducts(device), scratchElements);
    }

    /// <summary>Room for a weight (outputs, inputs).</summary>
    public static Tensor TakePacked(Arena arena, int outputs, int inputs, DType type) =>
        arena.Take(outputs, inputs, WeightBlocks.Keeps(type) ? type : DType.BF16);

    /// <summary>Fills rows of a frozen weight with what a file stores; what is not kept as it is there is rounded to BF16.</summary>
    public void WriteRows(Weight weight, int firstRow, ReadOnlySpan<byte> rows)
    {
        int rowBytes = checked((int)weight.Type.RowBytes(weight.Inputs));
        int count = rows.Length / rowBytes;
        bool wholeRows = rows.Length == count * rowBytes && firstRow % Backend.PackedRows == 0;
        bool inside = firstRow + count == weight.Outputs || (firstRow + count < weight.Outputs && count % Backend.PackedRows == 0);
        Shape.Require(wholeRows && inside, "whole rows, as many as are packed together, from a multiple of them on");
        if (WeightBlocks.Keeps(weight.Type))
        {
            TakeScratch();
            WeightBlocks.Write(_device, weight.PackedForward, firstRow, rows);
            return;
        }

        ReadOnlySpan<byte> rounded = ToBF16(weight.Type, rows);
        fixed (byte* source = rounded)
        {
            _device.Write(weight.PackedForward.RowRange(firstRow, count).Address, source, rounded.Length);
        }
    }

    /// <summary>Fills the packed form from the values: 4 bytes read and 2 written for each.</summary>
    public void Pack(Weight weight)
    {
        if (weight.PackedForward.IsEmpty)
        {
            TakeScratch();
        }
        else
        {
            Copy.Convert(_device, weight.PackedForward, weight.Values);
        }
    }

    /// <summary>output (N, O) = or += input (N, I) · weightᵀ.</summary>
    public void Forward(Tensor output, Tensor input, Weight weight, bool accumulate)
    {
        Shape.Require(
            output.Rows == input.Rows && output.Columns == weight.Outputs && input.Columns == weight.Inputs,
            "output (N, O), input (N, I) and weight (O, I)");
        RequireActivations(output, input);
        if (output.IsEmpty)
        {
            return;
        }

        if (IsFew(input, weight.PackedForward))
        {
            MultiplyFew(output, input, weight.PackedForward, accumulate);
            return;
        }

        int step = RowsAtOnce(weight);
        for (int first = 0; first < weight.Outputs; first += step)
        {
            int count = Math.Min(step, weight.Outputs - first);
            _products.Forward(output.ColumnRange(first, count), input, Rows(weight, first, count), accumulate);
        }
    }

    /// <summary>dInput (N, I) = or += dOutput (N, O) · weight.</summary>
    public void BackwardInput(Tensor dInput, Tensor dOutput, Weight weight, bool accumulate)
    {
        Shape.Require(
            dInput.Rows == dOutput.Rows && dInput.Columns == weight.Inputs && dOutput.Columns == weight.Outputs && !weight.Values.IsEmpty,
            "dInput (N, I), dOutput (N, O) and a weight (O, I) that is not frozen");
        RequireActivations(dInput, dOutput);
        if (dInput.IsEmpty)
        {
            return;
        }

        int step = RowsAtOnce(weight);
        for (int first = 0; first < weight.Outputs; first += step)
        {
            int count = Math.Min(step, weight.Outputs - first);
            _products.BackwardInput(dInput, dOutput.ColumnRange(first, count), Rows(weight, first, count), accumulate || first > 0);
        }
    }

    /// <summary>dWeight (O, I) += dOutputᵀ · input. dOutput (N, O), input (N, I).</summary>
    public void BackwardWeight(Tensor dWeight, Tensor dOutput, Tensor input)
    {
        Shape.Require(
            dWeight.Rows == dOutput.Columns && dWeight.Columns == input.Columns && dOutput.Rows == input.Rows,
            "dWeight (O, I), dOutput (N, O) and input (N, I)");
        RequireActivations(dWeight, dOutput);
        RequireActivations(dWeight, input);
        if (!input.IsEmpty)
        {
            _products.BackwardWeight(dWeight, dOutput, input);
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _products.Dispose();
        if (!_scratch.IsEmpty)
        {
            _device.Free(_scratch.Address);
        }
    }

    private static ReadOnlySpan<byte> ToBF16(DType type, ReadOnlySpan<byte> elements)
    {
        if (type == DType.BF16)
        {
            return elements;
        }

        ushort[] rounded = new ushort[elements.Length / type.BlockBytes() * type.BlockElements()];
        float* values = stackalloc float[QuantizedBlocks.MaximumElements];
        fixed (byte* source = elements)
        {
            for (int first = 0; first < rounded.Length; first += type.BlockElements())
            {
                Cpu.Copy.Widen(values, source + type.RowBytes(first), type, type.BlockElements());
                for (int i = 0; i < type.BlockElements(); i++)
                {
                    rounded[first + i] = Cpu.Copy.ToBFloat16(values[i]);
                }
            }
        }

        return MemoryMarshal.AsBytes<ushort>(rounded);
    }

    // What the kernels read 16 bytes at a time, and cuBLASLt is told to.
    private static void RequireActivations(Tensor result, Tensor operand) =>
        Shape.Require(
            result.Type is DType.BF16 or DType.F32 && operand.Type == DType.BF16 && (result.Address | operand.Address) % MatrixProducts.AddressAlignment == 0,
            "operands in BF16 and a result in BF16 or F32, at addresses that are multiples of 16 bytes");

    private static bool IsFew(Tensor input, Tensor packed) =>
        !packed.IsEmpty && input.Rows <= (packed.Type.IsQuantized() ? FewRowsOfBlocks : FewRows)
        && input.Columns % 32 == 0 && input.HasEights();

    private static bool IsInBF16(Weight weight) => weight.PackedForward is { IsEmpty: false, Type: DType.BF16 };

    private void MultiplyFew(Tensor output, Tensor input, Tensor packed, bool accumulate)
    {
        string kernel = (packed.Type, input.Rows <= FewRows) switch
        {
            (DType.BF16, _) => "mat_mul_bf16_8_rows",
            (DType.Q8_0, true) => "mat_mul_q8_0_8_rows",
            (DType.Q8_0, false) => "mat_mul_q8_0_32_rows",
            (_, true) => "mat_mul_q4_0_8_rows",
            (_, false) => "mat_mul_q4_0_32_rows",
        };
        _device.Launch(
            kernel, (Operands.Blocks(packed.Rows, OutputsPerBlock), 1, 1), Threads, 0,
            output, input, packed, input.Rows, packed.Rows, packed.Columns, output.Stride, input.Stride,
            output.Type == DType.BF16 ? 1 : 0, accumulate ? 1 : 0);
    }

    // Rows that fit the scratch, so many that the columns of results begin at addresses that cuBLASLt takes.
    private int RowsAtOnce(Weight weight)
    {
        if (IsInBF16(weight))
        {
            return weight.Outputs;
        }

        int rows = _scratchElements / weight.Inputs / Backend.PackedRows * Backend.PackedRows;
        Shape.Require(rows > 0, "a scratch for some rows of the weight");
        return rows;
    }

    // At the latest by the first product; loading and packing take it before that, so that no step allocates.
    private void TakeScratch()
    {
        if (_scratch.IsEmpty)
        {
            nint address = _device.Allocate("scratch of matrix products", DType.BF16.RowBytes(_scratchElements));
            _scratch = new Tensor(address, 1, _scratchElements, _scratchElements, DType.BF16);
        }
    }

    // Rows of a weight in BF16; where they are kept as something else, in the scratch until the next call.
    private Tensor Rows(Weight weight, int first, int count)
    {
        Tensor packed = weight.PackedForward;
        if (IsInBF16(weight))
        {
            return packed.RowRange(first, count);
        }

        TakeScratch();
        Tensor rows = _scratch with { Rows = count, Columns = weight.Inputs, Stride = weight.Inputs };
        if (packed.IsEmpty)
        {
            Copy.Convert(_device, rows, weight.Values.RowRange(first, count));
        }
        else
        {
            WeightBlocks.Decode(_device, rows, packed, first);
        }

        return rows;
    }
}
