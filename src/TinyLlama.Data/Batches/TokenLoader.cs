using TinyLlama.Data.Shards;

namespace TinyLlama.Data.Batches;

/// <summary>
/// The samples that training sees: a pure function from the index of a sample to its tokens, so that resuming anywhere
/// costs nothing and nobody's order depends on the number of threads or ranks.
/// </summary>
/// <remarks>
/// Block b of a split of N tokens has the inputs bT … bT+T-1 and, one further on, the targets bT+1 … bT+T. There are
/// ⌈(N-1)/T⌉ blocks, so that in an epoch every token but the very first is a target exactly once; the last block is
/// filled up with tokens whose target is <see cref="Ignored"/>. Sample s is in epoch s / blocks, and each epoch has an
/// order of its own.
/// </remarks>
public sealed class TokenLoader
{
    /// <summary>The target of a row that no loss is counted for.</summary>
    public const int Ignored = -1;

    private readonly TokenShards _shards;
    private readonly ulong _seed;
    private readonly long _tokens;

    /// <summary>Takes a split.</summary>
    /// <param name="shards">The corpus; the caller keeps and disposes of it.</param>
    /// <param name="split">Which side.</param>
    /// <param name="contextLength">Tokens of a sample (T).</param>
    /// <param name="seed">Chooses the order of the blocks.</param>
    /// <exception cref="UserErrorException">The split has fewer than two tokens: nothing could be predicted.</exception>
    public TokenLoader(TokenShards shards, Split split, int contextLength, ulong seed)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(contextLength, 1);
        (_shards, Split, ContextLength, _seed, _tokens) = (shards, split, contextLength, seed, shards.TokenCount(split));
        if (_tokens < 2)
        {
            throw new UserErrorException($"the {(split == Split.Train ? "training" : "validation")} split has {_tokens} tokens, at least 2 are needed; prepare more text");
        }

        BlocksPerEpoch = ((_tokens - 2) / contextLength) + 1;
    }

    /// <summary>Gets the side of the corpus.</summary>
    public Split Split { get; }

    /// <summary>Gets the tokens of a sample (T).</summary>
    public int ContextLength { get; }

    /// <summary>Gets the number of samples in which every block is seen once.</summary>
    public long BlocksPerEpoch { get; }

    /// <summary>The block of a sample.</summary>
    /// <param name="sample">Index of the sample, from 0 without end.</param>
    public long BlockOf(long sample)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(sample);
        return new Permutation(BlocksPerEpoch, _seed, sample / BlocksPerEpoch)[sample % BlocksPerEpoch];
    }

    /// <summary>The number of targets of a sample, without reading it: T but for the last block.</summary>
    /// <param name="sample">Index of the sample, from 0 without end.</param>
    public int TargetCount(long sample) => Range(BlockOf(sample)).Count;

    /// <summary>Reads a sample of training. Allocates nothing; safe from several threads at once.</summary>
    /// <param name="sample">Index of the sample, from 0 without end.</param>
    /// <param name="tokens">Receives T tokens.</param>
    /// <param name="targets">Receives T targets, each a token or <see cref="Ignored"/>.</param>
    /// <returns>The number of targets that are tokens: T but for the last block.</returns>
    public int Read(long sample, Span<int> tokens, Span<int> targets) => ReadBlock(BlockOf(sample), tokens, targets);

    /// <summary>Reads a block by its place in the split: validation reads blocks 0, 1, 2 … and so always the same tokens.</summary>
    /// <param name="block">0 … <see cref="BlocksPerEpoch"/>-1.</param>
    /// <param name="tokens">Receives T tokens.</param>
    /// <param name="targets">Receives T targets, each a token or <see cref="Ignored"/>.</param>
    /// <returns>The number of targets that are tokens: T but for the last block.</returns>
    public int ReadBlock(long block, Span<int> tokens, Span<int> targets)
    {
        (long first, int count) = Range(block);
        ArgumentOutOfRangeException.ThrowIfNotEqual(tokens.Length, ContextLength);
        ArgumentOutOfRangeException.ThrowIfNotEqual(targets.Length, ContextLength);
        _shards.ReadTokens(Split, first, tokens[..1]);
        _shards.ReadTokens(Split, first + 1, targets[..count]);
        targets[..(count - 1)].CopyTo(tokens[1..]);
        tokens[count..].Clear();
        targets[count..].Fill(Ignored);
        return count;
    }

    /// <summary>
    /// Where documents begin among the tokens of a block: the segments of attention, where documents are masked. The first
    /// is 0. Padding belongs to the last document.
    /// </summary>
    /// <param name="block">0 … <see cref="BlocksPerEpoch"/>-1; of a sample, <see cref="BlockOf"/>.</param>
    /// <param name="starts">Receives the beginnings; T places always suffice.</param>
    /// <returns>How many there are.</returns>
    public int ReadDocumentStarts(long block, Span<int> starts)
    {
        (long first, int count) = Range(block);
        return _shards.ReadDocumentStarts(Split, first, count, starts);
    }

    /// <summary>The documents that the tokens of a block are part of: source files and lines, for messages.</summary>
    /// <param name="block">0 … <see cref="BlocksPerEpoch"/>-1; of a sample, <see cref="BlockOf"/>.</param>
    public IReadOnlyList<DocumentOrigin> Documents(long block)
    {
        (long first, int count) = Range(block);
        return _shards.Documents(Split, first, count);
    }

    private (long First, int Count) Range(long block)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(block);
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(block, BlocksPerEpoch);
        long first = block * ContextLength;
        return (first, (int)Math.Min(ContextLength, _tokens - 1 - first));
    }
}
