namespace TinyLlama.Compute.Cuda;

/// <summary>RMSNorm over packed tokens: output = input · r · weight with r = 1 / sqrt(mean(input²) + ε).</summary>
/// <remarks>
/// Shapes: input, output, their gradients (N, C) of BF16; weight, dWeight (1, C) and r (N, 1) of F32. Backward accumulates into
/// dWeight and into dInput, which is the residual stream. Memory-bound: forward moves 4 · N · C bytes, with the addition
/// 8 · N · C, backward 8 · N · C.
/// </remarks>
internal static class RmsNorm
{
    /// <summary>Most channels: a row of sums lies in the shared memory of a block.</summary>
    public const int MaxChannels = 32768;

    /// <summary>Most partial sums of dWeight, each over every so-manieth row: part of the meaning of the result.</summary>
    private const int Partials = 512;

    /// <summary>Writes output and r.</summary>
    public static void Forward(CudaDevice device, Tensor output, Tensor r, Tensor input, Tensor weight, float epsilon)
    {
        (int tokens, int channels) = (input.Rows, input.Columns);
        Require(tokens, channels, output, input, weight, r);
        device.Launch(
            "rms_norm", (tokens, 1, 1), Operands.RowThreads(channels), 0, output, (long)output.Stride, r, input, (long)input.Stride, weight,
            channels, epsilon);
    }

    /// <summary>Writes sum = input + branch, rounded, then output and r of it.</summary>
    public static void AddForward(
        CudaDevice device, Tensor sum, Tensor output, Tensor r, Tensor input, Tensor branch, Tensor weight, float epsilon)
    {
        (int tokens, int channels) = (input.Rows, input.Columns);
        Require(tokens, channels, output, input, weight, r);
        sum.RequireEights(tokens, channels);
        branch.RequireEights(tokens, channels);
        device.Launch(
            "add_rms_norm", (tokens, 1, 1), Operands.RowThreads(channels), 0, sum, (long)sum.Stride, output, (long)output.Stride, r, input,
            (long)input.Stride, branch, (long)branch.Stride, weight, channels, epsilon);
    }

    /// <summary>dInput += …; dWeight += …, by partial sums that are added in order.</summary>
    public static void Backward(
        CudaDevice device, Tensor dInput, Tensor dWeight, Tensor dOutput, Tensor input, Tensor weight, Tensor r)
    {
        (int tokens, int channels) = (input.Rows, input.Columns);
        Require(tokens, channels, dOutput, input, weight, r);
        dInput.RequireEights(tokens, channels);
        dWeight.Require(1, channels, DType.F32);
        Shape.Require(channels <= MaxChannels, "at most 32768 channels");
        int rowBytes = channels * sizeof(float);
        int partials = Math.Min(tokens, Math.Min(Partials, CudaDevice.ScratchBytes / rowBytes));
        if (partials == 0)
        {
            return;
        }

        Tensor sums = new(device.Scratch, partials, channels, channels, DType.F32);
        device.Launch(
            "rms_norm_backward", (partials, 1, 1), Operands.RowThreads(channels), rowBytes, dInput, (long)dInput.Stride, sums, dOutput,
            (long)dOutput.Stride, input, (long)input.Stride, weight, r, tokens, channels);
        device.Launch("rms_norm_backward_weight", (Operands.Blocks(channels, 32), 1, 1), 1024, 0, dWeight, sums, partials, channels);
    }

    private static void Require(int tokens, int channels, Tensor output, Tensor input, Tensor weight, Tensor r)
    {
        output.RequireEights(tokens, channels);
        input.RequireEights(tokens, channels);
        weight.RequireEights(1, channels, DType.F32);
        r.Require(tokens, 1, DType.F32);
        Shape.Require(r.IsContiguous, "contiguous statistics");
    }
}
