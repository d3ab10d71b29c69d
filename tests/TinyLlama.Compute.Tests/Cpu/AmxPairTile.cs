using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>Stands for <see cref="AmxTile"/> where the processor has no AMX: the same layouts and roundings, multiplied one pair at a time.</summary>
internal readonly unsafe struct AmxPairTile : IPackingTile
{
    public static DType Type => AmxTile.Type;

    public static int LeftDwords => AmxTile.LeftDwords;

    public static int Rows => AmxTile.Rows;

    public static int Columns => AmxTile.Columns;

    public static int StepUnit => AmxTile.StepUnit;

    public static int FetchedOfStep => AmxTile.FetchedOfStep;

    public static int PackedRow => AmxTile.PackedRow;

    public static bool InAttention => true;

    public static void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate)
    {
        for (int row = 0; row < Rows; row++)
        {
            for (int column = 0; column < Columns; column++)
            {
                float sum = 0;
                for (nint first = 0; first < steps; first += StepUnit)
                {
                    // Row after row in a packed chunk, which may be the rest.
                    nint count = Math.Min(StepUnit, steps - first);
                    float* a = left + (leftStep * first) + (row * (leftStep == 1 ? leftRow : count));
                    sum += Products(a, panel + (first * Columns) + column, count);
                }

                float* result = sums + (row * sumsRow) + column;
                *result = accumulate ? *result + sum : sum;
            }
        }
    }

    public static void MultiplyRow(float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate) =>
        Avx512Bf16Tile.MultiplyRow<AmxPairTile>(sums, left, panels, nextPanel, steps, accumulate);

    public static void Pack(float* panel, float* source, nint column, nint step, int columns, nint depth) =>
        AmxTile.Pack(panel, source, column, step, columns, depth);

    public static void PackRows(float* tile, float* source, nint step, int rows, nint depth) =>
        AmxTile.PackRows(tile, source, step, rows, depth);

    public static void CopyRow(float* row, float* source, nint depth) => AmxTile.CopyRow(row, source, depth);

    /// <summary>
    /// What tdpbf16ps adds to a sum for a row of pairs and a column of them (Intel, "Instruction Set Reference", TDPBF16PS), but for subnormal numbers.
    /// </summary>
    internal static float Products(float* row, float* column, nint count)
    {
        float first = 0, second = 0;
        for (nint step = 0; step < count; step++)
        {
            uint a = BitConverter.SingleToUInt32Bits(row[step]);
            uint b = BitConverter.SingleToUInt32Bits(column[step * Columns]);
            first += Copy.FromBFloat16((ushort)a) * Copy.FromBFloat16((ushort)b);
            second += Copy.FromBFloat16((ushort)(a >> 16)) * Copy.FromBFloat16((ushort)(b >> 16));
        }

        return first + second;
    }
}
