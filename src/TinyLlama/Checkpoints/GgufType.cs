using TinyLlama.Compute;

namespace TinyLlama.Checkpoints;

/// <summary>ggml's numbers of types, as GGUF files store them.</summary>
internal static class GgufType
{
    /// <summary>The type of ggml's number, or null where it is not supported.</summary>
    public static DType? Find(uint number) => number switch
    {
        0 => DType.F32,
        1 => DType.F16,
        2 => DType.Q4_0,
        3 => DType.Q4_1,
        6 => DType.Q5_0,
        7 => DType.Q5_1,
        8 => DType.Q8_0,
        12 => DType.Q4_K,
        13 => DType.Q5_K,
        14 => DType.Q6_K,
        30 => DType.BF16,
        _ => null,
    };

    /// <summary>ggml's number of a type.</summary>
    public static uint NumberOf(DType type)
    {
        uint number = 0;
        while (Find(number) != type)
        {
            number++;
        }

        return number;
    }

    /// <summary>ggml's name of a number, for messages.</summary>
    public static string NameOf(uint number) => Find(number)?.ToString() ?? number switch
    {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => $"number {number}",
    };
}

/// <summary>The types of metadata, by the numbers that GGUF files store.</summary>
internal enum GgufValueType
{
    UInt8,
    Int8,
    UInt16,
    Int16,
    UInt32,
    Int32,
    Float32,
    Bool,
    String,
    Array,
    UInt64,
    Int64,
    Float64,
}
