using TinyLlama.Data;
using TinyLlama.Data.Shards;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Evaluation;

/// <summary>
/// The fixed tokens that models are compared on. Token 0 is context only; tokens 1 … N are the targets, each scored
/// exactly once, and <see cref="ByteCount"/> is the exact length of the text that the targets stand for.
/// </summary>
public sealed class EvaluationTokens
{
    private readonly int[] _tokens;
    private readonly int[] _documentStarts;

    internal EvaluationTokens(int[] tokens, int[] documentStarts, ITokenizer tokenizer, string source)
    {
        if (tokens.Length < 2)
        {
            throw new UserErrorException($"{source} has {tokens.Length} tokens, at least 2 are needed to score one; give more text");
        }

        (_tokens, _documentStarts, Source) = (tokens, documentStarts, source);
        ByteCount = CountBytes(tokens, documentStarts, tokenizer);
    }

    /// <summary>Gets where the tokens come from, as reports name it.</summary>
    public string Source { get; }

    /// <summary>Gets all tokens: the first, and after it the targets.</summary>
    public ReadOnlySpan<int> Tokens => _tokens;

    /// <summary>Gets the number of targets.</summary>
    public int TargetCount => _tokens.Length - 1;

    /// <summary>
    /// Gets the bytes of UTF-8 text that the targets stand for. BOS and EOS stand for none; the space that a tokenizer
    /// puts before the first word of a document is not counted.
    /// </summary>
    public long ByteCount { get; }

    /// <summary>Gets the places of tokens that begin a document, ascending.</summary>
    internal ReadOnlySpan<int> DocumentStarts => _documentStarts;

    /// <summary>One text as one document: BOS where the vocabulary has it, then the text; no EOS.</summary>
    /// <param name="text">The text.</param>
    /// <param name="tokenizer">The model's tokenizer. Without BOS the first token of the text is context and not scored.</param>
    /// <param name="source">What messages and reports call the text.</param>
    /// <param name="addBos">Whether the model has seen BOS before its documents.</param>
    /// <param name="maxTargets">Most targets; by default the whole text.</param>
    /// <exception cref="UserErrorException">The text is too short.</exception>
    public static EvaluationTokens FromText(
        string text, ITokenizer tokenizer, string source, bool addBos = true, long maxTargets = long.MaxValue)
    {
        List<int> tokens = [];
        if (addBos && tokenizer.Bos is int bos)
        {
            tokens.Add(bos);
        }

        tokenizer.Encode(text, tokens);
        if (maxTargets < tokens.Count)
        {
            tokens.RemoveRange((int)maxTargets + 1, tokens.Count - (int)maxTargets - 1);
        }

        return new EvaluationTokens([.. tokens], [0], tokenizer, source);
    }

    /// <summary>The first tokens of a split of prepared shards, with BOS and EOS as they were written.</summary>
    /// <param name="shards">The corpus.</param>
    /// <param name="split">Which side.</param>
    /// <param name="tokenizer">The tokenizer that wrote them.</param>
    /// <param name="maxTargets">Most targets; by default the whole split.</param>
    /// <exception cref="UserErrorException">Another tokenizer wrote the shards, or there are too few tokens.</exception>
    public static EvaluationTokens FromShards(TokenShards shards, Split split, ITokenizer tokenizer, long maxTargets = long.MaxValue)
    {
        if (shards.Manifest.TokenizerSha256 != tokenizer.Hash)
        {
            throw new UserErrorException(
                "the token shards were written with another tokenizer than the model's; prepare the data with the model's own");
        }

        long count = shards.TokenCount(split);
        if (maxTargets < count)
        {
            count = maxTargets + 1;
        }

        if (count > Array.MaxLength)
        {
            throw new UserErrorException($"the split has {count} tokens, at most {Array.MaxLength} are scored at once; set --max-tokens");
        }

        int[] tokens = new int[count];
        int[] starts = new int[count];
        int documents = 0;
        if (count > 0)
        {
            shards.ReadTokens(split, 0, tokens);
            documents = shards.ReadDocumentStarts(split, 0, tokens.Length, starts);
        }

        string source = split == Split.Train ? "the training split" : "the validation split";
        return new EvaluationTokens(tokens, starts[..documents], tokenizer, source);
    }

    private static long CountBytes(int[] tokens, int[] documentStarts, ITokenizer tokenizer)
    {
        long bytes = 0;
        int nextStart = 0;
        bool atStart = false;
        for (int i = 0; i < tokens.Length; i++)
        {
            if (nextStart < documentStarts.Length && documentStarts[nextStart] == i)
            {
                atStart = true;
                nextStart++;
            }

            int length = tokenizer.TokenBytes(tokens[i]).Length;
            if (length > 0 && atStart)
            {
                length = tokenizer.FirstTokenBytes(tokens[i]).Length;
                atStart = false;
            }

            bytes += i > 0 ? length : 0;
        }

        return bytes;
    }
}
