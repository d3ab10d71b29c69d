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
    internal static LogProbabilities Of(ReadOnlySpan<float> logits, int chosen, int top, ITokenizer tokenizer)
    {
        double logSum = LogSum(logits);
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

        TokenLogProbability One(int token, ReadOnlySpan<float> logits) =>
            new(token, tokenizer.TokenBytes(token), logits[token] - logSum);
    }

    /// <summary>ln Σ exp logit: a token's ln p is its logit less this.</summary>
    /// <param name="logits">(V) logits.</param>
    /// <exception cref="TinyLlama.Data.UserErrorException">A logit is not a number or plus infinity, or all are minus infinity.</exception>
    internal static double LogSum(ReadOnlySpan<float> logits)
    {
        float largest = logits[Sampler.Greedy(logits)];
        double sum = 0;
        foreach (float logit in logits)
        {
            sum += Math.Exp((double)logit - largest);
        }

        return largest + Math.Log(sum);
    }
}
