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

    /// <summary>Blocks of 32 elements in 34 bytes: see <see cref="QuantizedBlocks"/>.</summary>
    Q8_0,

    /// <summary>Blocks of 32 elements in 18 bytes.</summary>
    Q4_0,

    /// <summary>Blocks of 32 elements in 20 bytes.</summary>
    Q4_1,

    /// <summary>Blocks of 32 elements in 22 bytes.</summary>
    Q5_0,

    /// <summary>Blocks of 32 elements in 24 bytes.</summary>
    Q5_1,

    /// <summary>Blocks of 256 elements in 144 bytes.</summary>
    Q4_K,

    /// <summary>Blocks of 256 elements in 176 bytes.</summary>
    Q5_K,

    /// <summary>Blocks of 256 elements in 210 bytes.</summary>
    Q6_K,
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
        _ => throw new ArgumentOutOfRangeException(nameof(type), type, "an element of it has no size of its own"),
    };

    /// <summary>Whether elements are stored in blocks, which share scales: ggml's quantized types.</summary>
    public static bool IsQuantized(this DType type) => type >= DType.Q8_0;

    /// <summary>The number of elements, side by side in a row, that are stored together: 1 where each stands alone.</summary>
    public static int BlockElements(this DType type) => type switch
    {
        < DType.Q8_0 => 1,
        DType.Q4_K or DType.Q5_K or DType.Q6_K => 256,
        _ => 32,
    };

    /// <summary>The size of one block in bytes; of one element where each stands alone.</summary>
    public static int BlockBytes(this DType type) => type switch
    {
        DType.Q8_0 => 34,
        DType.Q4_0 => 18,
        DType.Q4_1 => 20,
        DType.Q5_0 => 22,
        DType.Q5_1 => 24,
        DType.Q4_K => 144,
        DType.Q5_K => 176,
        DType.Q6_K => 210,
        _ => type.ByteCount(),
    };

    /// <summary>The size of a row in bytes, as files store it.</summary>
    /// <param name="type">The type of its elements.</param>
    /// <param name="columns">Its elements: a multiple of <see cref="BlockElements"/>.</param>
    public static long RowBytes(this DType type, long columns) => checked(columns / type.BlockElements() * type.BlockBytes());
}
