namespace TinyLlama.Compute;

/// <summary>The type of a tensor's elements.</summary>
public enum DType : byte
{
    /// <summary>IEEE 754 single precision, 4 bytes.</summary>
    F32,

    /// <summary>bfloat16: the upper half of a single, 2 bytes.</summary>
    BF16,

    /// <summary>IEEE 754 half precision, 2 bytes.</summary>
    F16,

    /// <summary>IEEE 754 double precision, 8 bytes: sums over many elements.</summary>
    F64,

    /// <summary>Signed 32-bit integer, 4 bytes: tokens, targets, positions.</summary>
    I32,
}

/// <summary>What follows from an element type alone.</summary>
public static class DTypes
{
    /// <summary>The size of one element in bytes.</summary>
    public static int ByteCount(this DType type) => type switch
    {
        DType.F64 => 8,
        DType.F32 or DType.I32 => 4,
        DType.BF16 or DType.F16 => 2,
        _ => throw new ArgumentOutOfRangeException(nameof(type), type, "no such element type"),
    };
}
