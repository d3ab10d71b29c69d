using System.Runtime.CompilerServices;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Inference;

/// <summary>The tokens of a vocabulary in the order of their bytes: those that begin alike lie side by side.</summary>
internal sealed class SortedVocabulary
{
    public SortedVocabulary(ITokenizer tokenizer)
    {
        VocabularySize = tokenizer.VocabularySize;
        (int Id, byte[] Bytes)[] tokens = [.. Enumerable.Range(0, VocabularySize)
            .Select(id => (id, tokenizer.TokenBytes(id).ToArray()))
            .Where(token => token.Item2.Length > 0)];
        Array.Sort(tokens, static (a, b) => a.Bytes.AsSpan().SequenceCompareTo(b.Bytes));
        Ids = [.. tokens.Select(token => token.Id)];
        Bytes = [.. tokens.Select(token => token.Bytes)];
        Common = new int[tokens.Length];
        for (int i = 1; i < tokens.Length; i++)
        {
            Common[i] = Bytes[i].AsSpan().CommonPrefixLength(Bytes[i - 1]);
        }

        Longest = Bytes.Length == 0 ? 0 : Bytes.Max(bytes => bytes.Length);
    }

    public int VocabularySize { get; }

    public int[] Ids { get; }

    public byte[][] Bytes { get; }

    /// <summary>Gets how many bytes each token shares with the one before it.</summary>
    public int[] Common { get; }

    public int Longest { get; }
}

/// <summary>Which tokens of a vocabulary may follow in each state of a constraint; found by trying their bytes, once a state.</summary>
internal sealed class TokenMasks
{
    private readonly ConstraintAutomaton _automaton;
    private readonly SortedVocabulary _vocabulary;
    private readonly ConstraintState[] _path;

    public TokenMasks(JsonConstraint constraint, SortedVocabulary vocabulary)
    {
        _automaton = new ConstraintAutomaton(constraint.Grammar, constraint.Root);
        _vocabulary = vocabulary;
        _path = new ConstraintState[vocabulary.Longest + 1];
    }

    public ConstraintState Start => _automaton.Start;

    /// <summary>Leaves only the tokens that may follow, and those that end the text where it may end here.</summary>
    /// <param name="logits">(V) logits; minus infinity for a token that may not follow.</param>
    /// <param name="state">Where the text is.</param>
    /// <param name="endings">Tokens that end the text.</param>
    /// <exception cref="UserErrorException">No token of the vocabulary may follow.</exception>
    public void Apply(Span<float> logits, ConstraintState state, ReadOnlySpan<int> endings)
    {
        ulong[] mask = state.Mask ??= Find(state);
        float[] kept = new float[endings.Length];
        for (int i = 0; i < endings.Length; i++)
        {
            kept[i] = logits[endings[i]];
        }

        for (int id = 0; id < logits.Length; id++)
        {
            logits[id] = (mask[id >> 6] >> (id & 63) & 1) == 0 ? float.NegativeInfinity : logits[id];
        }

        for (int i = 0; i < endings.Length; i++)
        {
            logits[endings[i]] = state.IsComplete ? kept[i] : float.NegativeInfinity;
        }

        if (!logits.ContainsAnyExcept(float.NegativeInfinity))
        {
            throw new UserErrorException("no token of the vocabulary can continue the JSON text; the tokenizer lacks tokens for single bytes");
        }
    }

    /// <summary>The same for the logits of some tokens, of which none may be left.</summary>
    /// <param name="logits">Their logits.</param>
    /// <param name="tokens">Their ids.</param>
    /// <param name="state">Where the text is.</param>
    /// <param name="endings">Tokens that end the text.</param>
    public void Apply(Span<float> logits, ReadOnlySpan<float> tokens, ConstraintState state, ReadOnlySpan<int> endings)
    {
        ulong[] mask = state.Mask ??= Find(state);
        for (int place = 0; place < logits.Length; place++)
        {
            int id = (int)tokens[place];
            bool may = endings.Contains(id) ? state.IsComplete : (mask[id >> 6] >> (id & 63) & 1) != 0;
            logits[place] = may ? logits[place] : float.NegativeInfinity;
        }
    }

    /// <summary>The state after a token that may follow.</summary>
    public ConstraintState Advance(ConstraintState state, ReadOnlySpan<byte> token)
    {
        foreach (byte b in token)
        {
            state = _automaton.Advance(state, b);
        }

        return state;
    }

    private ulong[] Find(ConstraintState state)
    {
        ulong[] mask = new ulong[(_vocabulary.VocabularySize + 63) / 64];
        _path[0] = state;

        // How many bytes of the token before lead somewhere.
        int reached = 0;
        for (int i = 0; i < _vocabulary.Ids.Length; i++)
        {
            if (_vocabulary.Common[i] > reached)
            {
                continue;
            }

            byte[] bytes = _vocabulary.Bytes[i];
            for (reached = _vocabulary.Common[i]; reached < bytes.Length; reached++)
            {
                ConstraintState next = _automaton.Advance(_path[reached], bytes[reached]);
                _path[reached + 1] = next;
                if (next == ConstraintState.Dead)
                {
                    break;
                }
            }

            if (reached == bytes.Length)
            {
                int id = _vocabulary.Ids[i];
                mask[id >> 6] |= 1UL << (id & 63);
            }
        }

        return mask;
    }
}

/// <summary>The constraints that texts of one vocabulary are under; what was computed for one serves the next text under it.</summary>
internal sealed class ConstraintCache(ITokenizer tokenizer)
{
    private readonly Lazy<SortedVocabulary> _vocabulary = new(() => new SortedVocabulary(tokenizer));
    private readonly ConditionalWeakTable<JsonConstraint, TokenMasks> _masks = [];

    /// <summary>The masks of a constraint; null for none.</summary>
    public TokenMasks? For(JsonConstraint? constraint) =>
        constraint is null ? null : _masks.GetValue(constraint, c => new TokenMasks(c, _vocabulary.Value));
}
