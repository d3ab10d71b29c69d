namespace TinyLlama.Compute;

/// <summary>
/// What a matrix product multiplies by: the logical matrix (O, I), in rows of outputs as files keep it, and the packed
/// forms that a device's kernels read.
/// </summary>
/// <remarks>
/// A packed form is a copy in the device's own order and in the type that its products round to, made by <see cref="Backend.Pack"/> once after the values change.
/// Without one (the arena had no room for it) a product packs what it reads, each time.
/// </remarks>
/// <param name="values">The master values, (O, I).</param>
/// <param name="gradient">Their gradient, (O, I) in F32, or empty where the weight is frozen.</param>
public sealed class Weight(Tensor values, Tensor gradient = default)
{
    private Weight(int outputs, int inputs, DType type)
        : this(default) => (Outputs, Inputs, Type) = (outputs, inputs, type);

    /// <summary>Gets the number of outputs, O.</summary>
    public int Outputs { get; } = values.Rows;

    /// <summary>Gets the number of inputs, I.</summary>
    public int Inputs { get; } = values.Columns;

    /// <summary>Gets the type that the weight is stored in.</summary>
    public DType Type { get; } = values.Type;

    /// <summary>Gets the master values, (O, I); empty where the weight is frozen and only its packed form is kept.</summary>
    public Tensor Values { get; } = values;

    /// <summary>Gets the gradient, (O, I), or an empty tensor.</summary>
    public Tensor Gradient { get; } = gradient;

    /// <summary>Gets where the rows of a frozen weight lie, for products that read them as files keep them (<see cref="Backend.ReadsInPlace"/>).</summary>
    public StoredRows[] Rows { get; private set; } = [];

    /// <summary>Gets a value indicating whether products read the rows in mapped files, which nothing writes to.</summary>
    public bool IsInPlace { get; private set; }

    /// <summary>Gets a value indicating whether it is in place only until <see cref="Backend.Pack"/> fills its packed form.</summary>
    public bool AwaitsPacking { get; private set; }

    /// <summary>Gets the form that <see cref="Backend.MatMul"/> reads, as one tensor where it is one; or an empty tensor.</summary>
    public Tensor PackedForward { get; private set; }

    /// <summary>Gets the form that <see cref="Backend.MatMulBackwardInput"/> reads where the device has one (<see cref="Backend.HasBackwardForm"/>), or an empty tensor.</summary>
    public Tensor PackedBackward { get; private set; }

    /// <summary>Gets the bytes of the packed form that no product reads, because panels before them are compact.</summary>
    public long UnreadBytes { get; internal set; }

    /// <summary>Gets or sets which panels of the packed form are compact, some together, block of inputs after block, where the device has such panels.</summary>
    internal bool[]? CompactPanels { get; set; }

    /// <summary>Gets or sets how many rows of the packed form have been written, one after the other from the first, where the device asks.</summary>
    internal int RowsInOrder { get; set; }

    /// <summary>A frozen weight that is nothing but the form which <see cref="Backend.MatMul"/> reads; <see cref="Backend.WriteRows"/> fills it.</summary>
    /// <param name="arena">Owner of its room.</param>
    /// <param name="backend">The device, which says how large the form is.</param>
    /// <param name="outputs">O.</param>
    /// <param name="inputs">I.</param>
    /// <param name="type">What it is stored in: a floating-point type, or a quantized one.</param>
    public static Weight Frozen(Arena arena, Backend backend, int outputs, int inputs, DType type)
    {
        Tensor packed = backend.TakePacked(arena, outputs, inputs, type);
        return new Weight(outputs, inputs, type) { PackedForward = packed, Rows = [new StoredRows(packed.Address, outputs)] };
    }

    /// <summary>A frozen weight that stays where it is: rows of mapped files, each of which the device reads in place (<see cref="Backend.ReadsInPlace"/>).</summary>
    /// <param name="rows">The rows, one after the other in the outputs. Their memory is their owner's, and outlives the weight.</param>
    /// <param name="inputs">I.</param>
    /// <param name="type">What they are stored in.</param>
    public static Weight InPlace(StoredRows[] rows, int inputs, DType type) =>
        new(rows.Sum(static range => range.Count), inputs, type)
        {
            Rows = rows,
            IsInPlace = true,
            PackedForward = rows is [{ HeadDim: 0 } all] ? new Tensor(all.Address, all.Count, inputs, inputs, type) : default,
        };

    /// <summary>Gives a weight in place room for the form that products read faster; until <see cref="Backend.Pack"/> fills it, they read the rows.</summary>
    /// <param name="arena">Owner of the room.</param>
    /// <param name="backend">The device, which says how large the form is.</param>
    public void AwaitPacking(Arena arena, Backend backend) =>
        (PackedForward, AwaitsPacking) = (backend.TakePacked(arena, Outputs, Inputs, Type), true);

    /// <summary>Says that the packed form has been filled from the rows.</summary>
    internal void LeaveRows() => (Rows, IsInPlace, AwaitsPacking) = ([], false, false);

    /// <summary>Gives the weight room for packed forms; <see cref="Backend.Pack"/> fills them.</summary>
    /// <param name="arena">Owner of the room.</param>
    /// <param name="backend">The device, which says how large its forms are.</param>
    /// <param name="backward">Whether gradients will flow through the weight.</param>
    public void TakePacked(Arena arena, Backend backend, bool backward)
    {
        PackedForward = backend.TakePacked(arena, Outputs, Inputs, Type);
        if (backward && backend.HasBackwardForm)
        {
            PackedBackward = backend.TakePacked(arena, Inputs, Outputs, Type);
        }
    }
}
