namespace TinyLlama.Training;

/// <summary>Which parameters weight decay shrinks.</summary>
public enum DecayGroup
{
    /// <summary>All of them, norms and embeddings too, as TinyLlama did.</summary>
    All,

    /// <summary>Only those with two dimensions.</summary>
    Matrices,
}
