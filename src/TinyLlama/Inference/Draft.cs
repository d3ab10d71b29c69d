using TinyLlama.Data;

namespace TinyLlama.Inference;

/// <summary>A token that may come next.</summary>
/// <param name="Token">Its id.</param>
/// <param name="Distribution">(V) the distribution that it was drawn from, until the next proposal; empty where it was not drawn.</param>
internal readonly record struct DraftToken(int Token, ReadOnlyMemory<float> Distribution);

/// <summary>
/// Proposes tokens that the model verifies together in one forward (speculative decoding). The text's distribution stays
/// that of the model, and a greedy text the same text; only the time changes.
/// </summary>
/// <remarks>
/// Leviathan et al. 2023. With a temperature and a draft that is drawn, the same seed gives another text than without. One generation
/// at a time.
/// </remarks>
public abstract class Draft
{
    /// <summary>The most tokens that may be proposed at a time.</summary>
    public const int MostTokens = 64;

    private protected Draft(int tokens)
    {
        Tokens = tokens is >= 1 and <= MostTokens
            ? tokens
            : throw new UserErrorException($"a draft of {tokens} tokens is asked for, it must be 1 to {MostTokens}");
    }

    /// <summary>Gets the most tokens that are proposed at a time.</summary>
    public int Tokens { get; }

    /// <summary>Begins with a new text.</summary>
    /// <param name="input">What the model sees first.</param>
    /// <param name="options">How the text is continued.</param>
    /// <param name="stop">Ends it with <see cref="OperationCanceledException"/>.</param>
    internal abstract void Begin(ReadOnlySpan<int> input, GenerationOptions options, CancellationToken stop);

    /// <summary>Proposes tokens that follow.</summary>
    /// <param name="input">What the model sees.</param>
    /// <param name="generated">How many tokens of the text are new.</param>
    /// <param name="most">Most tokens, at least 1 and at most <see cref="Tokens"/>.</param>
    internal abstract IReadOnlyList<DraftToken> Propose(ReadOnlySpan<int> input, int generated, int most);

    /// <summary>Is told what became of a proposal.</summary>
    /// <param name="proposed">Its tokens, at least one.</param>
    /// <param name="accepted">How many of them came.</param>
    internal virtual void Learn(int proposed, int accepted)
    {
    }
}
