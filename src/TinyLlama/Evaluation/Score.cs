namespace TinyLlama.Evaluation;

/// <summary>How well something predicts <see cref="EvaluationTokens"/>.</summary>
/// <param name="TargetCount">Tokens that were predicted, BOS and EOS among them.</param>
/// <param name="ByteCount">Bytes of text that these tokens stand for.</param>
/// <param name="TotalNats">The sum of the negative log-likelihoods of all targets.</param>
public readonly record struct Score(long TargetCount, long ByteCount, double TotalNats)
{
    /// <summary>Gets the mean cross-entropy in nats per token.</summary>
    public double Loss => TotalNats / TargetCount;

    /// <summary>Gets exp(loss).</summary>
    public double Perplexity => Math.Exp(Loss);

    /// <summary>
    /// Gets the bits that a byte of the text costs, which models with different tokenizers share as a measure:
    /// total nats / (ln 2 · bytes).
    /// </summary>
    public double BitsPerByte => TotalNats / (Math.Log(2) * ByteCount);
}
