using TinyLlama.Compute;

namespace TinyLlama.Checkpoints;

/// <summary>The elements of a parameter whose moments a rank owns: one range of them, in row-major order.</summary>
/// <param name="Name">The parameter's name.</param>
/// <param name="Offset">The first element of the range.</param>
/// <param name="First">Their first moments: contiguous, F32, of any shape.</param>
/// <param name="Second">Their second moments, as many.</param>
public readonly record struct MomentPiece(string Name, long Offset, Tensor First, Tensor Second)
{
    /// <summary>What follows the parameter's name in that of its first moments.</summary>
    internal const string FirstSuffix = ".first";

    /// <summary>What follows the parameter's name in that of its second moments.</summary>
    internal const string SecondSuffix = ".second";
}
