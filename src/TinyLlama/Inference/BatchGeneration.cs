using System.Diagnostics;
using System.Threading.Channels;

namespace TinyLlama.Inference;

/// <summary>A text in a <see cref="BatchGenerator"/>. Its tokens come as they are computed; enumerate them once.</summary>
public sealed class BatchGeneration : IAsyncEnumerable<GeneratedToken>
{
    private readonly Channel<GeneratedToken> _tokens = Channel.CreateUnbounded<GeneratedToken>(new() { SingleReader = true, SingleWriter = true });
    private readonly long _start = Stopwatch.GetTimestamp();

    internal BatchGeneration(int promptTokens, GenerationState state, CancellationToken stop) =>
        (PromptTokens, State, Stop) = (promptTokens, state, stop);

    /// <summary>Gets the number of tokens of the prompt, BOS included.</summary>
    public int PromptTokens { get; }

    /// <summary>Gets the number of new tokens; complete when the enumeration has ended.</summary>
    public int NewTokens { get; private set; }

    /// <summary>Gets why the text ended, when the enumeration has ended.</summary>
    public FinishReason Finish { get; private set; }

    /// <summary>Gets the time from its submission to its first token; null before.</summary>
    public TimeSpan? FirstTokenTime { get; private set; }

    /// <summary>Gets the number of tokens of the prompt whose keys and values were in the cache; known with the first token.</summary>
    public int CachedPromptTokens { get; internal set; }

    internal GenerationState State { get; }

    internal CancellationToken Stop { get; }

    /// <summary>Gets or sets the sequence while the text has a place.</summary>
    internal CachedSequence? Sequence { get; set; }

    /// <summary>Gets or sets the text that computes this one's prompt, while it does.</summary>
    internal BatchGeneration? Leader { get; set; }

    /// <summary>Gets the tokens that the model must see before the next one is chosen.</summary>
    internal ReadOnlyMemory<int> Pending => State.Input[Sequence!.Length..];

    /// <inheritdoc/>
    public IAsyncEnumerator<GeneratedToken> GetAsyncEnumerator(CancellationToken cancellationToken = default) =>
        _tokens.Reader.ReadAllAsync(cancellationToken).GetAsyncEnumerator(cancellationToken);

    internal void Write(GeneratedToken token)
    {
        FirstTokenTime ??= Stopwatch.GetElapsedTime(_start);
        NewTokens++;
        _tokens.Writer.TryWrite(token);
    }

    internal void Complete(Exception? error = null)
    {
        Finish = State.Finish;
        _tokens.Writer.TryComplete(error);
    }
}
