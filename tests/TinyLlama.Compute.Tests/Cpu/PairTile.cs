using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>Stands for <see cref="Avx512Bf16Tile"/> where the processor lacks its instruction: the same layouts, multiplied one pair at a time.</summary>
internal readonly unsafe struct PairTile : IPackingTile
{
    public static DType Type => Avx512Bf16Tile.Type;

    public static int LeftDwords => Avx512Bf16Tile.LeftDwords;

    public static int Rows => Avx512Bf16Tile.Rows;

    public static int Columns => Avx512Bf16Tile.Columns;

    public static int FetchedOfStep => Avx512Bf16Tile.FetchedOfStep;

    public static void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate)
    {
        for (int row = 0; row < Rows; row++)
        {
            for (int column = 0; column < Columns; column++)
            {
                float sum = 0;
                for (nint step = 0; step < steps; step++)
                {
                    uint a = BitConverter.SingleToUInt32Bits(left[(row * leftRow) + (step * leftStep)]);
                    uint b = BitConverter.SingleToUInt32Bits(panel[(step * Columns) + column]);
                    sum = (Copy.FromBFloat16((ushort)(a >> 16)) * Copy.FromBFloat16((ushort)(b >> 16))) + sum;
                    sum = (Copy.FromBFloat16((ushort)a) * Copy.FromBFloat16((ushort)b)) + sum;
                }

                float* result = sums + (row * sumsRow) + column;
                *result = accumulate ? *result + sum : sum;
            }
        }
    }

    public static void MultiplyRow(float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate) =>
        Avx512Bf16Tile.MultiplyRow<PairTile>(sums, left, panels, nextPanel, steps, accumulate);

    public static void Pack(float* panel, float* source, nint column, nint step, int columns, nint depth) =>
        Avx512Bf16Tile.Pack(panel, source, column, step, columns, depth);

    public static void PackRows(float* tile, float* source, nint step, int rows, nint depth) =>
        Avx512Bf16Tile.PackRows(tile, source, step, rows, depth);

    public static void CopyRow(float* row, float* source, nint depth) => Avx512Bf16Tile.CopyRow(row, source, depth);
}
