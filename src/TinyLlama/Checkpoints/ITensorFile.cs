namespace TinyLlama.Checkpoints;

/// <summary>A file of named tensors, checked and mapped into memory.</summary>
internal interface ITensorFile : IDisposable
{
    /// <summary>Gets the path the file was opened by.</summary>
    string Path { get; }

    /// <summary>Gets the tensors; no two have the same name.</summary>
    IReadOnlyList<TensorEntry> Entries { get; }

    /// <summary>Reads elements as singles, from any floating-point type.</summary>
    /// <param name="destination">What is filled.</param>
    /// <param name="name">The tensor.</param>
    /// <param name="first">Its first element to read, in row-major order.</param>
    void Read(Span<float> destination, string name, long first = 0);

    /// <summary>A view of bytes of a tensor where they lie in the file in row-major order, else an empty one. Not to be used after the end of the file.</summary>
    /// <param name="name">The tensor.</param>
    /// <param name="first">The first byte, counted from the beginning of the tensor.</param>
    /// <param name="count">The number of bytes.</param>
    ReadOnlySpan<byte> MappedBytes(string name, long first, int count);

    /// <summary>Where a tensor lies in memory in row-major order, until the end of the file; 0 where it does not.</summary>
    /// <param name="name">The tensor.</param>
    nint MappedAddress(string name);

    /// <summary>Drops what has been read from memory; it can be read again.</summary>
    void DropPages();
}
