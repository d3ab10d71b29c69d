using System.Diagnostics;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// The innermost matrix product: a tile of <see cref="Rows"/> × <see cref="Columns"/> sums in fp32, kept in registers
/// while k runs. Whatever multiplies matrices here does it with one of these.
/// </summary>
/// <remarks>
/// Packed operands are dwords, and a step of the product reads one of each column: a float, or a pair of 16-bit floats of two
/// consecutive k, the first in the low half; the pair that an odd depth leaves incomplete ends in a zero.
/// The right operand is a panel: <see cref="Columns"/> columns, step after step, so that a step reads two whole registers.
/// The left operand may lie anyhow: dword d of row r at <c>left[r · leftRow + d · leftStep]</c>, <see cref="LeftDwords"/> a step.
/// Each sum adds its products in one order, whatever the tile's place, so a row's bits do not depend on its company.
/// </remarks>
internal unsafe interface ITile
{
    /// <summary>Gets the type of packed operands: F32, BF16 or F16.</summary>
    static abstract DType Type { get; }

    /// <summary>Gets the dwords that a row of the left operand has for a step: 1, or 2 where the k of a pair are floats side by side.</summary>
    static abstract int LeftDwords { get; }

    /// <summary>Gets the rows of a tile, at most 32.</summary>
    static abstract int Rows { get; }

    /// <summary>Gets the columns of a tile and of a panel, at most 32.</summary>
    static abstract int Columns { get; }

    /// <summary>Gets the dwords from one row to the next of a packed left operand, whose dwords are <see cref="Rows"/> from each other.</summary>
    static virtual int PackedRow => 1;

    /// <summary>Gets a value indicating whether attention in training is multiplied by this too; else its products are fp32.</summary>
    static virtual bool InAttention => false;

    /// <summary>Gets the steps that are packed together: blocks of steps are multiples of it, but for the last.</summary>
    static virtual int StepUnit => 8;

    /// <summary>The floats of a line of a cache.</summary>
    const int Line = 16;

    /// <summary>Gets how many floats of what lies ahead a tile asks for with each step, in whole lines.</summary>
    static abstract int FetchedOfStep { get; }

    /// <summary>Makes this thread ready to multiply. Between this and <see cref="End"/> nothing but one product runs in it.</summary>
    static virtual void Begin()
    {
    }

    /// <summary>Ends what <see cref="Begin"/> began.</summary>
    static virtual void End()
    {
    }

    /// <summary>sums[r, j] = or += Σₛ left[r, s] · panel[s, j] for a whole tile.</summary>
    /// <param name="sums">First of the tile's sums.</param>
    /// <param name="sumsRow">Elements from one row of sums to the next.</param>
    /// <param name="left">The first dword of the left operand.</param>
    /// <param name="leftRow">Dwords from one of its rows to the next.</param>
    /// <param name="leftStep">Dwords from one dword of a row to the next.</param>
    /// <param name="panel">The first step of the panel.</param>
    /// <param name="steps">The number of steps, at least one.</param>
    /// <param name="ahead">What later calls read: <see cref="FetchedOfStep"/> floats of it are asked for with each step.</param>
    /// <param name="accumulate">Whether to add to the sums; the steps are summed first, then added.</param>
    static abstract void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate);

    /// <summary>Gets the rows that <see cref="MultiplyFew"/> multiplies, fewer than <see cref="Rows"/>; 0 if there is no such code.</summary>
    static virtual int FewRows => 0;

    /// <summary><see cref="Multiply"/> of the first <see cref="FewRows"/> rows of a tile, to the same bits. It never adds to sums.</summary>
    static virtual void MultiplyFew(float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead) =>
        throw new UnreachableException();

    /// <summary>
    /// One row by four panels: sums[j] = or += Σₛ left[s] · panels[s, j], the bits of <see cref="Multiply"/>. One row of
    /// a tile would wait for its own additions; four panels have enough sums to hide that.
    /// </summary>
    /// <param name="sums">4 · <see cref="Columns"/> sums.</param>
    /// <param name="left">The row, step after step.</param>
    /// <param name="panels">The first step of the first panel.</param>
    /// <param name="nextPanel">Dwords from one panel to the next.</param>
    /// <param name="steps">The number of steps, at least one.</param>
    /// <param name="accumulate">Whether to add to the sums.</param>
    static abstract void MultiplyRow(float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate);

    /// <summary>Fills a row of the left operand, dword after dword, from <paramref name="depth"/> elements.</summary>
    static abstract void CopyRow(float* row, float* source, nint depth);

    /// <summary>Gets a value indicating whether panels may be compact, four at a time, where the weight says so; what follows is about those.</summary>
    static virtual bool HasCompactPanels => false;

    /// <summary>The dwords that a compact panel takes: a quarter of those of four together.</summary>
    static virtual nint CompactSize(nint steps) => throw new UnreachableException();

    /// <summary>Makes four panels compact where they lie, if their numbers allow it; else they are left as they are.</summary>
    /// <param name="panels">The panels, one after the other.</param>
    /// <param name="steps">Their steps.</param>
    /// <param name="scratch">Room for as many dwords.</param>
    static virtual bool TryCompact(float* panels, nint steps, float* scratch) => throw new UnreachableException();

    /// <summary>Writes the panel that one of four compact ones was made from.</summary>
    /// <param name="panel">As many dwords as it had.</param>
    /// <param name="compact">The first dword of the compact panel: <see cref="Columns"/> behind that of the one before.</param>
    /// <param name="steps">Its steps.</param>
    static virtual void Expand(float* panel, float* compact, nint steps) => throw new UnreachableException();

    /// <summary>Makes from a row of <see cref="CopyRow"/> one that compact panels are multiplied by, unless its numbers are too large: then it is of no use.</summary>
    /// <param name="scaled">The row that is made.</param>
    /// <param name="row">The row.</param>
    /// <param name="depth">Their elements.</param>
    static virtual bool TryScaleRow(float* scaled, float* row, nint depth) => throw new UnreachableException();

    /// <summary>The bits of <see cref="MultiplyRow"/> with the panels that four compact ones were made from.</summary>
    /// <param name="sums">4 · <see cref="Columns"/> sums.</param>
    /// <param name="left">The row, scaled, step after step.</param>
    /// <param name="panels">The compact panels.</param>
    /// <param name="steps">The number of steps, at least one.</param>
    /// <param name="after">The panels that come next: their first dwords are asked for.</param>
    /// <param name="accumulate">Whether to add to the sums.</param>
    static virtual void MultiplyCompactRow(float* sums, float* left, float* panels, nint steps, float* after, bool accumulate) => throw new UnreachableException();

    /// <summary>The bits of <see cref="Multiply"/> with the panel that a compact one was made from.</summary>
    /// <param name="sums">First of the tile's sums.</param>
    /// <param name="sumsRow">Elements from one row of sums to the next.</param>
    /// <param name="rows">The rows whose sums are wanted; of the tile's others they may be written or not.</param>
    /// <param name="left">Rows, scaled, each step after step.</param>
    /// <param name="leftRow">Dwords from one of them to the next.</param>
    /// <param name="compact">The first dword of the compact panel.</param>
    /// <param name="steps">The number of steps, at least one.</param>
    /// <param name="ahead">What later calls read: as many dwords of it are asked for as a compact panel takes.</param>
    /// <param name="accumulate">Whether to add to the sums.</param>
    static virtual void MultiplyCompact(
        float* sums, nint sumsRow, int rows, float* left, nint leftRow, float* compact, nint steps, float* ahead, bool accumulate) =>
        throw new UnreachableException();
}

/// <summary>A tile that packs operands of fp32.</summary>
internal unsafe interface IPackingTile : ITile
{
    /// <summary>Fills a panel: column j, k from <c>source[j · column + k · step]</c>, and zeros beyond <paramref name="columns"/>.</summary>
    /// <param name="panel"><see cref="ITile.Columns"/> dwords for each step.</param>
    /// <param name="source">Element (0, 0).</param>
    /// <param name="column">Elements from one column to the next; 1 where columns are side by side.</param>
    /// <param name="step">Elements from one k to the next; 1 where a column is a row of the source, which it is if columns are not side by side.</param>
    /// <param name="columns">Columns that exist, at most <see cref="ITile.Columns"/>.</param>
    /// <param name="depth">The number of k.</param>
    static abstract void Pack(float* panel, float* source, nint column, nint step, int columns, nint depth);

    /// <summary>
    /// Fills a tile of the left operand whose rows are side by side in the source: row r, k from <c>source[r + k · step]</c>;
    /// dword d of row r to <c>tile[d · <see cref="ITile.Rows"/> + r]</c>, if a tile has no layout of its own. Rows beyond
    /// <paramref name="rows"/> may be left as they are. Any number of <see cref="ITile.StepUnit"/>s may be packed by a call, and what is left by the last.
    /// </summary>
    static abstract void PackRows(float* tile, float* source, nint step, int rows, nint depth);
}
