namespace TinyLlama.Compute.Cuda;

/// <summary>Cross-entropy of each row in nats, and its gradient in place: dLogits = (softmax - target) · scale.</summary>
/// <remarks>
/// Shapes: logits (N, V) of F32 or BF16; targets (N, 1); losses (N, 1) and scale (1, 1) or empty, of F32. A negative target is
/// ignored: loss and gradient are 0. Memory-bound: with a gradient a row of logits is read twice and written once.
/// </remarks>
internal static class CrossEntropy
{
    /// <summary>Writes losses, and gradients over the logits where there is a scale.</summary>
    public static void Forward(CudaDevice device, Tensor losses, Tensor logits, Tensor targets, Tensor scale)
    {
        (int tokens, int vocabulary) = (logits.Rows, logits.Columns);
        logits.Require(tokens, vocabulary, logits.Type);
        losses.Require(tokens, 1, DType.F32);
        Shape.Require(losses.IsContiguous && logits.Type is DType.F32 or DType.BF16, "contiguous losses and logits of F32 or BF16");
        targets.RequireIndices(tokens);
        if (!scale.IsEmpty)
        {
            scale.Require(1, 1, DType.F32);
        }

        bool eights = vocabulary % Operands.Eight == 0 && logits.HasEights();
        string kernel = (logits.Type == DType.BF16, eights) switch
        {
            (true, true) => "cross_entropy_bf16_by_8",
            (true, false) => "cross_entropy_bf16",
            (false, true) => "cross_entropy_f32_by_8",
            (false, false) => "cross_entropy_f32",
        };
        device.Launch(
            kernel, (tokens, 1, 1), Math.Max(32, Operands.RowThreads(vocabulary, most: 1024)), 0, losses, logits, (long)logits.Stride, targets, scale,
            vocabulary);
    }
}
