using TinyLlama.Compute;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Inference;

/// <summary>How probable a token was.</summary>
/// <param name="Token">Its id.</param>
/// <param name="Bytes">The bytes that it stands for; empty for a control token.</param>
/// <param name="LogProbability">ln p, in nats.</param>
public readonly record struct TokenLogProbability(int Token, ReadOnlyMemory<byte> Bytes, double LogProbability);

/// <summary>What the model itself says of a token: the softmax of its logits, before biases, penalties, temperature and cuts.</summary>
/// <param name="Chosen">The token that was chosen.</param>
/// <param name="Top">The likeliest tokens, the likeliest first; of equal ones the smaller id first.</param>
public sealed record LogProbabilities(TokenLogProbability Chosen, IReadOnlyList<TokenLogProbability> Top)
{
    /// <summary>Computes them.</summary>
    /// <param name="logits">(V) logits.</param>
    /// <param name="chosen">The token that was chosen.</param>
    /// <param name="top">The number of likeliest tokens.</param>
    /// <param name="tokenizer">The vocabulary.</param>
    internal static LogProbabilities Of(ReadOnlySpan<float> logits, int chosen, int top, ITokenizer tokenizer) =>
        Of(logits, columns: [], LogSum(logits), chosen, top, tokenizer);

    /// <summary>Computes them from the largest logits and the weight of the others at temperature 1.</summary>
    /// <remarks>The sum over the others is the device's: ln p is within 1e-4 of the others' probability of that from all logits.</remarks>
    /// <param name="row">As many logits as likeliest tokens are asked for, or more.</param>
    /// <param name="chosen">The place of the token that was chosen.</param>
    /// <param name="top">The number of likeliest tokens.</param>
    /// <param name="tokenizer">The vocabulary.</param>
    internal static LogProbabilities Of(TopLogitsRow row, int chosen, int top, ITokenizer tokenizer)
    {
        int[] columns = new int[row.Count];
        for (int place = 0; place < columns.Length; place++)
        {
            columns[place] = row.Column(place);
        }

        return Of(row.Logits, columns, LogSum(row.Logits, row.OthersAtOne), chosen, top, tokenizer);
    }

    // Of logits of all tokens, or of those in some columns.
    private static LogProbabilities Of(
        ReadOnlySpan<float> logits, int[] columns, double logSum, int chosen, int top, ITokenizer tokenizer)
    {
        var best = new PriorityQueue<int, (float Logit, int Rank)>();
        for (int id = 0; id < logits.Length; id++)
        {
            if (best.Count < top)
            {
                best.Enqueue(id, (logits[id], -id));
            }
            else if (top > 0 && logits[id] > logits[best.Peek()])
            {
                best.DequeueEnqueue(id, (logits[id], -id));
            }
        }

        var likeliest = new TokenLogProbability[best.Count];
        for (int i = likeliest.Length - 1; i >= 0; i--)
        {
            likeliest[i] = One(best.Dequeue(), logits);
        }

        return new LogProbabilities(One(chosen, logits), likeliest);

        TokenLogProbability One(int place, ReadOnlySpan<float> logits)
        {
            int token = columns.Length == 0 ? place : columns[place];
            return new(token, tokenizer.TokenBytes(token), logits[place] - logSum);
        }
    }

    /// <summary>ln Σ exp logit: a token's ln p is its logit less this.</summary>
    /// <param name="logits">(V) logits.</param>
    /// <param name="others">Σ exp (logit - largest) of logits that are not here.</param>
    /// <exception cref="TinyLlama.Data.UserErrorException">A logit is not a number or plus infinity, or all are minus infinity.</exception>
    internal static double LogSum(ReadOnlySpan<float> logits, double others = 0)
    {
        float largest = logits[Sampler.Greedy(logits)];
        double sum = others;
        foreach (float logit in logits)
        {
            sum += Math.Exp((double)logit - largest);
        }

        return largest + Math.Log(sum);
    }
}
