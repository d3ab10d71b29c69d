namespace TinyLlama.Inference;

/// <summary>A random number generator that is one number: the same seed gives the same text on every machine.</summary>
/// <remarks>Steele, Lea and Flood 2014.</remarks>
/// <param name="seed">Any number.</param>
public struct SplitMix64(ulong seed)
{
    private ulong _state = seed;

    /// <summary>The next number, uniform in [0, 1).</summary>
    public double NextUniform()
    {
        _state += 0x9E3779B97F4A7C15;
        ulong z = _state;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return ((z ^ (z >> 31)) >> 11) * (1.0 / (1UL << 53));
    }
}
