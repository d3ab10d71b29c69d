using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>A tile that notes which compact panels it is given to multiply, and what to fetch. One thread at a time.</summary>
internal readonly unsafe struct RecordingCompactTile : ITile
{
    /// <summary>The calls: addresses of panels and of what is fetched, and the bytes of each.</summary>
    public static List<(nint Compact, nint Ahead, nint Bytes)> Calls { get; } = [];

    public static DType Type => CompactTile.Type;

    public static int LeftDwords => CompactTile.LeftDwords;

    public static int Rows => CompactTile.Rows;

    public static int Columns => CompactTile.Columns;

    public static int FetchedOfStep => CompactTile.FetchedOfStep;

    public static int StepUnit => CompactTile.StepUnit;

    public static bool HasCompactPanels => true;

    public static nint CompactSize(nint steps) => CompactTile.CompactSize(steps);

    public static void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate) =>
        CompactTile.Multiply(sums, sumsRow, left, leftRow, leftStep, panel, steps, ahead, accumulate);

    public static void MultiplyRow(float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate) =>
        CompactTile.MultiplyRow(sums, left, panels, nextPanel, steps, accumulate);

    public static void CopyRow(float* row, float* source, nint depth) => CompactTile.CopyRow(row, source, depth);

    public static bool TryScaleRow(float* scaled, float* row, nint depth) => CompactTile.TryScaleRow(scaled, row, depth);

    public static bool TryCompact(float* panels, nint steps, float* scratch) => CompactTile.TryCompact(panels, steps, scratch);

    public static void MultiplyCompactRow(float* sums, float* left, float* panels, nint steps, float* after, bool accumulate)
    {
        Calls.Add(((nint)panels, (nint)after, CompactSize(steps) * sizeof(float)));
        CompactTile.MultiplyCompactRow(sums, left, panels, steps, after, accumulate);
    }

    public static void MultiplyCompact(
        float* sums, nint sumsRow, int rows, float* left, nint leftRow, float* compact, nint steps, float* ahead, bool accumulate)
    {
        Calls.Add(((nint)compact, (nint)ahead, CompactSize(steps) * sizeof(float)));
        CompactTile.MultiplyCompact(sums, sumsRow, rows, left, leftRow, compact, steps, ahead, accumulate);
    }
}
