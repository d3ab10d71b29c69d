namespace TinyLlama.Inference;

/// <summary>The embedding of a text: the mean over its tokens of the final norm's output, scaled to length 1.</summary>
public sealed class BatchEmbedding : BatchRequest
{
    private readonly TaskCompletionSource<float[]> _vector = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly int[] _prompt;
    private readonly double[] _sum;

    internal BatchEmbedding(int[] prompt, int channels, CancellationToken stop)
        : base(prompt.Length, stop) => (_prompt, _sum) = (prompt, new double[channels]);

    /// <summary>Gets the vector of C numbers; fails with <see cref="OperationCanceledException"/> where it was stopped.</summary>
    public Task<float[]> Vector => _vector.Task;

    internal override ReadOnlyMemory<int> Input => _prompt;

    /// <summary>Begins again, before the first token.</summary>
    internal void Clear() => Array.Clear(_sum);

    /// <summary>Takes the output of the next tokens: (tokens, C), row after row.</summary>
    internal void Add(ReadOnlySpan<float> hidden)
    {
        for (int i = 0; i < hidden.Length; i++)
        {
            _sum[i % _sum.Length] += hidden[i];
        }
    }

    internal override void Complete(Exception? error = null)
    {
        if (error is not null)
        {
            _vector.TrySetException(error);
            return;
        }

        // The length of the sum is that of the mean: it cancels.
        double length = Math.Sqrt(_sum.Sum(x => x * x));
        _vector.TrySetResult(Array.ConvertAll(_sum, x => (float)(x / Math.Max(length, double.Epsilon))));
    }
}
