using System.Diagnostics;
using System.Threading.Channels;

namespace TinyLlama.Inference;

/// <summary>A text in a <see cref="BatchGenerator"/>. Its tokens come as they are computed; enumerate them once.</summary>
public sealed class BatchGeneration : BatchRequest, IAsyncEnumerable<GeneratedToken>
{
    private readonly Channel<GeneratedToken> _tokens = Channel.CreateUnbounded<GeneratedToken>(new() { SingleReader = true, SingleWriter = true });
    private readonly long _start = Stopwatch.GetTimestamp();

    internal BatchGeneration(int promptTokens, GenerationState state, CancellationToken stop)
        : base(promptTokens, stop) => State = state;

    /// <summary>Gets the number of new tokens; complete when the enumeration has ended.</summary>
    public int NewTokens { get; private set; }

    /// <summary>Gets why the text ended, when the enumeration has ended.</summary>
    public FinishReason Finish { get; private set; }

    /// <summary>Gets the time from its submission to its first token; null before.</summary>
    public TimeSpan? FirstTokenTime { get; private set; }

    /// <summary>Gets the number of tokens of the prompt whose keys and values were in the cache; known with the first token.</summary>
    public int CachedPromptTokens { get; internal set; }

    internal GenerationState State { get; }

    /// <summary>Gets or sets what proposes its next tokens, where something does.</summary>
    internal PromptLookup? Lookup { get; set; }

    internal override ReadOnlyMemory<int> Input => State.Input;

    /// <inheritdoc/>
    public IAsyncEnumerator<GeneratedToken> GetAsyncEnumerator(CancellationToken cancellationToken = default) =>
        _tokens.Reader.ReadAllAsync(cancellationToken).GetAsyncEnumerator(cancellationToken);

    internal void Write(GeneratedToken token)
    {
        FirstTokenTime ??= Stopwatch.GetElapsedTime(_start);
        NewTokens++;
        _tokens.Writer.TryWrite(token);
    }

    internal override void Complete(Exception? error = null)
    {
        Finish = State.Finish;
        _tokens.Writer.TryComplete(error);
    }
}
