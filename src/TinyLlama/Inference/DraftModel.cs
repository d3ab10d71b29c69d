using System.Runtime.InteropServices;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Model;

namespace TinyLlama.Inference;

/// <summary>Proposes what a small model with the same tokenizer would say.</summary>
public sealed class DraftModel : Draft, IDisposable
{
    private readonly InferenceEngine _engine;
    private readonly CachedSequence _sequence;
    private readonly List<int> _seen = [];
    private readonly float[] _logits;
    private readonly int _tokenCount;
    private GenerationOptions _options = new();
    private SplitMix64 _random;

    /// <summary>Takes the memory for one sequence of the small model.</summary>
    /// <param name="draft">The small model; it outlives this. Its vocabulary may be padded to another size than the target's.</param>
    /// <param name="target">The model that verifies.</param>
    /// <param name="tokens">Most tokens that are proposed at a time, 1 to 64.</param>
    /// <exception cref="UserErrorException">The two have different tokenizers, or the number is out of range.</exception>
    /// <exception cref="DeviceException">The device has too little memory.</exception>
    public DraftModel(LanguageModel draft, LanguageModel target, int tokens)
        : this(RequireTokenizer(draft, target), draft.Backend, draft.Tokenizer.VocabularySize, target.ContextLength, tokens, draft.CacheType)
    {
    }

    internal DraftModel(LlamaModel model, Backend backend, int tokenCount, int contextLength, int tokens, DType cacheType)
        : base(tokens)
    {
        _tokenCount = tokenCount;
        _engine = new InferenceEngine(model, backend, contextLength, cacheType: cacheType);
        _sequence = _engine.Begin();
        _logits = new float[tokens * _engine.VocabularySize];
    }

    /// <inheritdoc/>
    public void Dispose() => _engine.Dispose();

    internal override void Begin(ReadOnlySpan<int> input, GenerationOptions options, CancellationToken stop)
    {
        // These draws are independent of those that verify them.
        (_options, _random) = (options, new SplitMix64(~options.Seed));
        _seen.Clear();
        See(input, stop);
    }

    internal override IReadOnlyList<DraftToken> Propose(ReadOnlySpan<int> input, int generated, int most)
    {
        See(input, CancellationToken.None);
        var proposed = new List<DraftToken>(most);
        while (true)
        {
            Memory<float> logits = _logits.AsMemory(proposed.Count * _engine.VocabularySize, _engine.VocabularySize);
            _engine.ReadLogits(logits.Span);
            Memory<float> distribution = logits[.._tokenCount];
            Span<int> text = CollectionsMarshal.AsSpan(_seen);
            Sampler.Distribution(distribution.Span, text, text[^Math.Min(generated + proposed.Count, text.Length)..], _options);
            int token = Sampler.Draw(distribution.Span, ref _random);
            proposed.Add(new DraftToken(token, distribution));
            if (proposed.Count == most)
            {
                return proposed;
            }

            Feed([token], CancellationToken.None);
        }
    }

    // Makes what the model saw the input; at least the last token is fed, for its logits.
    private void See(ReadOnlySpan<int> input, CancellationToken stop)
    {
        int kept = Math.Min(CollectionsMarshal.AsSpan(_seen).CommonPrefixLength(input), input.Length - 1);
        _engine.Truncate(_sequence, kept);
        CollectionsMarshal.SetCount(_seen, kept);
        Feed(input[kept..], stop);
    }

    private void Feed(ReadOnlySpan<int> tokens, CancellationToken stop)
    {
        _engine.Feed(_sequence, tokens.ToArray(), stop);
        _seen.AddRange(tokens);
    }

    private static LlamaModel RequireTokenizer(LanguageModel draft, LanguageModel target) =>
        draft.Tokenizer.Hash == target.Tokenizer.Hash
            ? draft.Model
            : throw new UserErrorException("the draft model has another tokenizer than the model; it must have the same tokens");
}
