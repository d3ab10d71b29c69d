namespace TinyLlama.Compute.Cuda;

/// <summary>SwiGLU (Shazeer 2020): output = silu(gate) · up with silu(x) = x / (1 + e⁻ˣ).</summary>
/// <remarks>
/// Shapes: output, dOutput (N, H); gateUp, dGateUp (N, 2H), gate in the first half; all BF16, all written, none accumulated.
/// Memory-bound: forward moves 6 · N · H bytes, backward 10 · N · H.
/// </remarks>
internal static class SwiGlu
{
    private const int Threads = 256;

    /// <summary>Writes output.</summary>
    public static void Forward(CudaDevice device, Tensor output, Tensor gateUp)
    {
        (int tokens, int hidden) = (output.Rows, output.Columns);
        output.RequireEights(tokens, hidden);
        gateUp.RequireEights(tokens, 2 * hidden);
        device.Launch(
            "swiglu", (Operands.Blocks(output.Count, Operands.Eight * Threads), 1, 1), Threads, 0, output, (long)output.Stride, gateUp,
            (long)gateUp.Stride, tokens, hidden);
    }

    /// <summary>Writes dGateUp.</summary>
    public static void Backward(CudaDevice device, Tensor dGateUp, Tensor dOutput, Tensor gateUp)
    {
        (int tokens, int hidden) = (dOutput.Rows, dOutput.Columns);
        dOutput.RequireEights(tokens, hidden);
        dGateUp.RequireEights(tokens, 2 * hidden);
        gateUp.RequireEights(tokens, 2 * hidden);
        device.Launch(
            "swiglu_backward", (Operands.Blocks(dOutput.Count, Operands.Eight * Threads), 1, 1), Threads, 0, dGateUp, (long)dGateUp.Stride,
            dOutput, (long)dOutput.Stride, gateUp, (long)gateUp.Stride, tokens, hidden);
    }
}
