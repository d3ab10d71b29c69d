namespace TinyLlama.Compute;

/// <summary>
/// One allocation for one lifetime (weights, gradients, optimizer state, activations, …), carved into tensors in
/// order. An arena without memory only counts: building the same objects over it says how many bytes they need, so
/// that a plan and the run it describes cannot drift apart.
/// </summary>
public sealed class Arena : IDisposable
{
    /// <summary>Every tensor starts at a multiple of this many bytes: a cache line, and a whole AVX-512 register.</summary>
    public const int Alignment = 64;

    private readonly nint _address;
    private Action? _release;

    private Arena(string name, long capacityBytes, nint address, Action? release)
    {
        (Name, CapacityBytes, _address, _release) = (name, capacityBytes, address, release);
    }

    /// <summary>Gets what the arena is for, as the plan prints it.</summary>
    public string Name { get; }

    /// <summary>Gets the bytes the arena owns; <see cref="long.MaxValue"/> for one that only counts.</summary>
    public long CapacityBytes { get; }

    /// <summary>Gets the bytes taken so far, padding included.</summary>
    public long UsedBytes { get; private set; }

    /// <summary>Gets a value indicating whether this arena has no memory and only counts.</summary>
    public bool IsPlan => _address == 0;

    /// <summary>An arena that owns no memory: its tensors must never be given to an operation.</summary>
    public static Arena Plan(string name) => new(name, long.MaxValue, 0, null);

    /// <summary>An arena over zeroed memory that a backend allocated.</summary>
    /// <param name="name">What the arena is for.</param>
    /// <param name="capacityBytes">Size of the memory.</param>
    /// <param name="address">Its address on the device.</param>
    /// <param name="release">Gives it back; called once, by <see cref="Dispose"/>.</param>
    public static Arena Over(string name, long capacityBytes, nint address, Action release) =>
        new(name, capacityBytes, address, release);

    /// <summary>Takes the next tensor, contiguous and zero.</summary>
    /// <param name="rows">Its rows.</param>
    /// <param name="columns">Its columns; whole blocks of a quantized type.</param>
    /// <param name="type">Its type.</param>
    /// <exception cref="InvalidOperationException">The plan was smaller than the run.</exception>
    public Tensor Take(int rows, int columns, DType type = DType.F32)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(rows);
        ArgumentOutOfRangeException.ThrowIfNegative(columns);
        long bytes = checked(rows * type.RowBytes(columns));
        long first = UsedBytes;
        long next = checked(first + ((bytes + Alignment - 1) & -Alignment));
        if (next > CapacityBytes)
        {
            throw new InvalidOperationException(
                $"arena '{Name}' of {CapacityBytes} bytes cannot hold {next}: it was planned for another shape");
        }

        UsedBytes = next;
        return new Tensor(_address + (nint)first, rows, columns, columns, type);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _release?.Invoke();
        _release = null;
    }
}
