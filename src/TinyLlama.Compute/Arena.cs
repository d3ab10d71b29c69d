using TinyLlama.Compute.Native;

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
    private long _position;

    private Arena(string name, long capacityBytes, nint address, Action? release)
    {
        (Name, CapacityBytes, _address, _release) = (name, capacityBytes, address, release);
    }

    /// <summary>Gets what the arena is for, as the plan prints it.</summary>
    public string Name { get; }

    /// <summary>Gets the bytes the arena owns; <see cref="long.MaxValue"/> for one that only counts.</summary>
    public long CapacityBytes { get; }

    /// <summary>Gets the bytes taken so far, padding included: the most at any time of one that was rewound.</summary>
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

    /// <summary>Allocates zeroed memory of the host, whatever device computes.</summary>
    /// <param name="name">What the arena is for.</param>
    /// <param name="byteCount">Its size.</param>
    /// <exception cref="DeviceException">The machine has not that much memory left.</exception>
    public static Arena OnHost(string name, long byteCount)
    {
        nint address = PageMemory.Map(name, byteCount);
        return Over(name, byteCount, address, () => PageMemory.Release(address, byteCount));
    }

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
        long first = _position;
        Advance(checked(first + ((bytes + Alignment - 1) & -Alignment)));
        return new Tensor(_address + (nint)first, rows, columns, columns, type);
    }

    /// <summary>Takes tensors that belong together and gives back all of them as one of F32, padded with zeros to whole rows.</summary>
    /// <param name="take">Takes them.</param>
    /// <param name="columns">Columns of the whole.</param>
    /// <param name="rowMultiple">What its rows are a multiple of.</param>
    /// <returns>(rows, columns) over everything that was taken.</returns>
    public Tensor TakeTogether(Action take, int columns, int rowMultiple)
    {
        ArgumentNullException.ThrowIfNull(take);
        long first = _position;
        take();
        long quantum = (long)columns * sizeof(float) * rowMultiple;
        long bytes = checked((_position - first + quantum - 1) / quantum * quantum);
        Advance(first + bytes);
        return new Tensor(_address + (nint)first, checked((int)(bytes / sizeof(float) / columns)), columns, columns, DType.F32);
    }

    /// <summary>Begins again at the first byte: what is taken next shares the memory of what was taken before.</summary>
    public void Rewind() => _position = 0;

    /// <inheritdoc/>
    public void Dispose()
    {
        _release?.Invoke();
        _release = null;
    }

    private void Advance(long next)
    {
        if (next > CapacityBytes)
        {
            throw new InvalidOperationException(
                $"arena '{Name}' of {CapacityBytes} bytes cannot hold {next}: it was planned for another shape");
        }

        _position = next;
        UsedBytes = Math.Max(UsedBytes, next);
    }
}
