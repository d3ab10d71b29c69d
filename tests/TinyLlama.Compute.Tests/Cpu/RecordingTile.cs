using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>A tile that notes what it is given to multiply and to fetch. One thread at a time.</summary>
internal readonly unsafe struct RecordingTile : IPackingTile
{
    /// <summary>The calls: addresses of panels and of what is fetched, and bytes of each.</summary>
    public static List<(nint Panel, nint PanelBytes, nint Ahead, nint AheadBytes)> Calls { get; } = [];

    public static DType Type => Tile<Lanes128>.Type;

    public static int LeftDwords => Tile<Lanes128>.LeftDwords;

    public static int Rows => Tile<Lanes128>.Rows;

    public static int Columns => Tile<Lanes128>.Columns;

    public static int FetchedOfStep => Tile<Lanes128>.FetchedOfStep;

    public static void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate)
    {
        Calls.Add(((nint)panel, steps * Columns * sizeof(float), (nint)ahead, steps * FetchedOfStep / ITile.Line * ITile.Line * sizeof(float)));
        Tile<Lanes128>.Multiply(sums, sumsRow, left, leftRow, leftStep, panel, steps, ahead, accumulate);
    }

    public static void MultiplyRow(float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate) =>
        Tile<Lanes128>.MultiplyRow(sums, left, panels, nextPanel, steps, accumulate);

    public static void Pack(float* panel, float* source, nint column, nint step, int columns, nint depth) =>
        Tile<Lanes128>.Pack(panel, source, column, step, columns, depth);

    public static void PackRows(float* tile, float* source, nint step, int rows, nint depth) =>
        Tile<Lanes128>.PackRows(tile, source, step, rows, depth);

    public static void CopyRow(float* row, float* source, nint depth) => Tile<Lanes128>.CopyRow(row, source, depth);
}
