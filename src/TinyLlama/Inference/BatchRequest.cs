namespace TinyLlama.Inference;

/// <summary>What a <see cref="BatchGenerator"/> was asked for.</summary>
public abstract class BatchRequest
{
    private protected BatchRequest(int promptTokens, CancellationToken stop) => (PromptTokens, Stop) = (promptTokens, stop);

    /// <summary>Gets the number of tokens of the prompt, BOS included.</summary>
    public int PromptTokens { get; }

    internal CancellationToken Stop { get; }

    /// <summary>Gets or sets the sequence while the request has a place.</summary>
    internal CachedSequence? Sequence { get; set; }

    /// <summary>Gets or sets the text that computes this one's prompt, while it does.</summary>
    internal BatchGeneration? Leader { get; set; }

    /// <summary>Gets all tokens that the model must have seen, from position 0 on.</summary>
    internal abstract ReadOnlyMemory<int> Input { get; }

    /// <summary>Gets those that it must see yet.</summary>
    internal ReadOnlyMemory<int> Pending => Input[Sequence!.Length..];

    internal abstract void Complete(Exception? error = null);
}
