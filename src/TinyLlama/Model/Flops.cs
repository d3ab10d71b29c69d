namespace TinyLlama.Model;

/// <summary>
/// Floating-point operations that training on one token takes, forward and backward, a multiply-add counted as two.
/// What is recomputed does not count: it is not progress.
/// </summary>
public static class Flops
{
    /// <summary>
    /// The formula of PaLM (Chowdhery et al. 2022, appendix B): 6 operations for each parameter that a product multiplies
    /// by, and 12·L·C·T for attention, which counts the whole T × T square. Used for MFU everywhere here.
    /// </summary>
    /// <param name="model">The shape.</param>
    /// <param name="contextLength">T of the run.</param>
    public static long PerToken(ModelConfig model, int contextLength)
    {
        // An embedding is looked up, not multiplied; a tied one is the head's matrix too.
        long lookedUp = model.TiedEmbeddings ? 0 : (long)model.VocabularySize * model.Channels;
        return (6 * (model.ParameterCount - lookedUp)) + Attention(model, contextLength);
    }

    /// <summary>
    /// The formula of TinyLlama's own <c>estimate_flops</c>, which counts the embedding as a product too; for comparison
    /// with its published share of peak.
    /// </summary>
    /// <param name="model">The shape.</param>
    /// <param name="contextLength">T of the run.</param>
    public static long PerTokenAsTinyLlama(ModelConfig model, int contextLength) =>
        (6 * model.ParameterCount) + Attention(model, contextLength);

    private static long Attention(ModelConfig model, int contextLength) =>
        12L * model.Layers * model.Channels * contextLength;
}
