using System.Diagnostics;
using System.Runtime.CompilerServices;

namespace TinyLlama.Compute;

/// <summary>A view of a matrix on a device: an address and a shape. It owns nothing; its <see cref="Arena"/> does.</summary>
/// <param name="Address">Address of the first element, on the device of the arena it was taken from.</param>
/// <param name="Rows">Number of rows: packed tokens (N) for activations, outputs (O) for weights.</param>
/// <param name="Columns">Number of columns.</param>
/// <param name="Stride">Elements from one row to the next; larger than <paramref name="Columns"/> for a column range.</param>
/// <param name="Type">Element type.</param>
public readonly record struct Tensor(nint Address, int Rows, int Columns, int Stride, DType Type)
{
    /// <summary>Gets a value indicating whether there is nothing behind this view, as for an optional argument left out.</summary>
    public bool IsEmpty => Rows == 0 || Columns == 0;

    /// <summary>Gets a value indicating whether the rows follow each other without a gap.</summary>
    public bool IsContiguous => Stride == Columns || Rows <= 1;

    /// <summary>Gets the number of elements.</summary>
    public long Count => (long)Rows * Columns;

    /// <summary>The view of <paramref name="count"/> rows from <paramref name="first"/> on.</summary>
    public Tensor RowRange(int first, int count)
    {
        Debug.Assert(first >= 0 && count >= 0 && first + count <= Rows, "row range outside the tensor");
        return this with { Address = Address + (nint)(first * Type.RowBytes(Stride)), Rows = count };
    }

    /// <summary>The view of <paramref name="count"/> columns from <paramref name="first"/> on; rows keep their stride.</summary>
    public Tensor ColumnRange(int first, int count)
    {
        Debug.Assert(first >= 0 && count >= 0 && first + count <= Columns, "column range outside the tensor");
        return this with { Address = Address + ((nint)first * Type.ByteCount()), Columns = count };
    }

    /// <summary>The view of <paramref name="count"/> elements of a contiguous tensor, as one row: to copy it piece by piece.</summary>
    public Tensor Elements(long first, int count)
    {
        Shape.Require(IsContiguous && first >= 0 && count >= 0 && first + count <= Count, "a range inside a contiguous tensor");
        return new Tensor(Address + (nint)(first * Type.ByteCount()), 1, count, count, Type);
    }

    /// <summary>The elements of a host tensor, which must be contiguous. Never for device memory.</summary>
    /// <typeparam name="T">The element type; its size must be that of <see cref="Type"/>.</typeparam>
    public unsafe Span<T> HostSpan<T>()
        where T : unmanaged
    {
        Shape.Require(IsContiguous && Unsafe.SizeOf<T>() == Type.ByteCount(), "a contiguous tensor of that element size");
        return new Span<T>((void*)Address, checked((int)Count));
    }
}

/// <summary>Shape checks at the boundary of an operation: always on, nanoseconds each.</summary>
internal static class Shape
{
    /// <summary>Throws if a caller broke the contract of an operation.</summary>
    public static void Require(bool condition, string expected)
    {
        if (!condition)
        {
            Fail(expected);
        }
    }

    private static void Fail(string expected) => throw new ArgumentException("the operation needs " + expected);
}
