namespace TinyLlama.Compute.Cuda;

/// <summary>
/// AdamW with clipping by the global norm, as PyTorch: g = gradient · min(1, MaxNorm / (norm + 1e-6)),
/// m = β₁ · m + (1 - β₁) · g, v = β₂ · v + (1 - β₂) · g², and with m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ):
/// value -= lr · (decay · value + m̂ / (√v̂ + ε)). Then gradient = 0.
/// </summary>
/// <remarks>All tensors contiguous, of F32. Memory-bound: reads and writes four streams, 32 bytes an element.</remarks>
internal static class AdamW
{
    private const int Threads = 256;

    /// <summary>Elements of a thread: enough that the clipping, which each block works out, costs nothing.</summary>
    private const int ElementsPerThread = 8;

    /// <summary>One step; nothing where the norm is not finite.</summary>
    public static void Step(
        CudaDevice device, Tensor values, Tensor first, Tensor second, Tensor gradient, Tensor step, Tensor sumOfSquares, AdamWSettings settings)
    {
        foreach (Tensor tensor in (ReadOnlySpan<Tensor>)[values, first, second, gradient])
        {
            tensor.Require(values.Rows, values.Columns, DType.F32);
            Shape.Require(tensor.IsContiguous, "contiguous tensors");
        }

        step.Require(1, 3, DType.F32);
        sumOfSquares.Require(1, 1, DType.F64);
        device.Launch(
            "adamw", (Operands.Blocks(values.Count, Threads * ElementsPerThread), 1, 1), Threads, 0, values, first, second, gradient, step,
            sumOfSquares, values.Count, settings.Beta1, (float)(1 - (double)settings.Beta1), settings.Beta2, (float)(1 - (double)settings.Beta2),
            settings.Epsilon, settings.WeightDecay, settings.MaxNorm, settings.RateFactor);
    }
}
