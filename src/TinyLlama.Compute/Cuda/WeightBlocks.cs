namespace TinyLlama.Compute.Cuda;

/// <summary>Weights (O, I) of Q8_0 and Q4_0, which stay as small as their files: the same bytes in another order.</summary>
/// <remarks>
/// First the quants of all rows, then the scales of all rows: a block of a file has 34 or 18 bytes, which no wide load
/// can begin at. The nibbles of Q4_0 become those of neighbours. Kernels/MatMul.cu reads this.
/// </remarks>
internal static unsafe class WeightBlocks
{
    private const int BlockElements = 32;
    private const int ScaleBytes = 2;
    private const int Threads = 256;

    /// <summary>Whether weights of a type are kept as blocks.</summary>
    public static bool Keeps(DType type) => type is DType.Q8_0 or DType.Q4_0;

    /// <summary>Fills rows with blocks as a file has them.</summary>
    /// <param name="device">The device.</param>
    /// <param name="weight">The weight, (O, I).</param>
    /// <param name="firstRow">The first of them.</param>
    /// <param name="rows">Whole rows.</param>
    public static void Write(CudaDevice device, Tensor weight, int firstRow, ReadOnlySpan<byte> rows)
    {
        int quantBytes = weight.Type.BlockBytes() - ScaleBytes;
        int blocks = rows.Length / weight.Type.BlockBytes();
        byte[] quants = new byte[blocks * quantBytes];
        byte[] scales = new byte[blocks * ScaleBytes];
        for (int block = 0; block < blocks; block++)
        {
            ReadOnlySpan<byte> source = rows.Slice(block * weight.Type.BlockBytes(), weight.Type.BlockBytes());
            source[..ScaleBytes].CopyTo(scales.AsSpan(block * ScaleBytes));
            Span<byte> destination = quants.AsSpan(block * quantBytes, quantBytes);
            if (weight.Type == DType.Q8_0)
            {
                source[ScaleBytes..].CopyTo(destination);
            }
            else
            {
                PairNeighbours(destination, source[ScaleBytes..]);
            }
        }

        long blocksOfRow = weight.Columns / BlockElements;
        nint allQuants = (nint)(weight.Rows * blocksOfRow * quantBytes);
        fixed (byte* firstQuant = quants)
        fixed (byte* firstScale = scales)
        {
            device.Write(weight.Address + (nint)(firstRow * blocksOfRow * quantBytes), firstQuant, quants.Length);
            device.Write(weight.Address + allQuants + (nint)(firstRow * blocksOfRow * ScaleBytes), firstScale, scales.Length);
        }
    }

    /// <summary>output row n = the weight's row first + n. output (N, I) of BF16.</summary>
    public static void Decode(CudaDevice device, Tensor output, Tensor weight, int first) =>
        Decode(device, output, weight, default, first);

    /// <summary>output row n = the weight's row indices[n]. output (N, I) of BF16, indices (N, 1) of I32.</summary>
    public static void Gather(CudaDevice device, Tensor output, Tensor weight, Tensor indices) =>
        Decode(device, output, weight, indices, 0);

    private static void Decode(CudaDevice device, Tensor output, Tensor weight, Tensor indices, int first)
    {
        device.Launch(
            weight.Type == DType.Q8_0 ? "decode_rows_q8_0" : "decode_rows_q4_0",
            (Operands.Blocks(output.Count, Operands.Eight * Threads), 1, 1), Threads, 0, output, weight, indices, first, output.Rows, weight.Rows, weight.Columns, output.Stride);
    }

    // Byte i of a file has the elements i and 16 + i; here it has 2 i and 2 i + 1.
    private static void PairNeighbours(Span<byte> destination, ReadOnlySpan<byte> source)
    {
        for (int i = 0; i < BlockElements / 4; i++)
        {
            (byte first, byte second) = (source[2 * i], source[(2 * i) + 1]);
            destination[i] = (byte)((first & 15) | (second << 4));
            destination[(BlockElements / 4) + i] = (byte)((first >> 4) | (second & 0xF0));
        }
    }
}
