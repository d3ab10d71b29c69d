using System.Security.Cryptography;
using System.Text;
using TinyLlama.Compute;

namespace TinyLlama.Model;

/// <summary>The initial weights that TinyLlama published, twice.</summary>
public enum InitializationScheme
{
    /// <summary>
    /// The repository's final form: N(0, √(2/(5C))) for the embedding and all products, but N(0, 1/(√C · L)) for the two
    /// that write to the residual stream (o_proj and down_proj).
    /// </summary>
    TinyLlama,

    /// <summary>
    /// What the published run used: N(0, √(2/(5I))) by the inputs I of each product, but N(0, 1/(√H · L)) for down_proj.
    /// </summary>
    TinyLlamaV1,
}

/// <summary>Seeded initial weights: each tensor from a generator of its own, so they depend on (seed, name) alone.</summary>
public static class Initialization
{
    /// <summary>Writes initial values to every parameter and packs them. Norms are ones.</summary>
    public static void Initialize(LlamaModel model, Backend backend, InitializationScheme scheme, ulong seed)
    {
        Initialize(model.Parameters, model.Config, backend, scheme, seed);
        model.Pack();
    }

    /// <summary>Writes initial values to some parameters of a model.</summary>
    public static void Initialize(
        IEnumerable<Parameter> parameters, ModelConfig config, Backend backend, InitializationScheme scheme, ulong seed)
    {
        float[] chunk = new float[1 << 16];
        foreach (Parameter parameter in parameters)
        {
            double deviation = parameter.IsVector ? 0 : Deviation(config, scheme, parameter);
            var normal = new NormalSource(seed, parameter.Name);
            Tensor flat = parameter.Values with { Rows = 1 };
            for (long done = 0; done < parameter.Values.Count;)
            {
                int count = (int)Math.Min(chunk.Length, parameter.Values.Count - done);
                for (int i = 0; i < count; i++)
                {
                    chunk[i] = parameter.IsVector ? 1 : (float)(deviation * normal.Next());
                }

                nint offset = (nint)(done * sizeof(float));
                backend.Write<float>(flat with { Address = flat.Address + offset, Columns = count, Stride = count }, chunk.AsSpan(0, count));
                done += count;
            }
        }
    }

    /// <summary>The standard deviation of a matrix's initial values.</summary>
    public static double Deviation(ModelConfig config, InitializationScheme scheme, Parameter parameter)
    {
        bool down = parameter.Name.EndsWith("mlp.down_proj.weight", StringComparison.Ordinal);
        bool output = parameter.Name.EndsWith("self_attn.o_proj.weight", StringComparison.Ordinal);
        return scheme switch
        {
            InitializationScheme.TinyLlama when down || output => 1 / (Math.Sqrt(config.Channels) * config.Layers),
            InitializationScheme.TinyLlama => Math.Sqrt(2.0 / (5.0 * config.Channels)),
            InitializationScheme.TinyLlamaV1 when down => 1 / (Math.Sqrt(config.Hidden) * config.Layers),
            InitializationScheme.TinyLlamaV1 => Math.Sqrt(2.0 / (5.0 * parameter.Values.Columns)),
            _ => throw new ArgumentOutOfRangeException(nameof(scheme), scheme, "no such scheme"),
        };
    }

    // SplitMix64 (Steele et al. 2014) and the polar method (Marsaglia): a few lines, the same everywhere.
    private sealed class NormalSource
    {
        private ulong _state;
        private double _spare;
        private bool _hasSpare;

        public NormalSource(ulong seed, string name)
        {
            byte[] hash = SHA256.HashData(Encoding.UTF8.GetBytes($"{seed}:{name}"));
            _state = BitConverter.ToUInt64(hash);
        }

        public double Next()
        {
            if (_hasSpare)
            {
                _hasSpare = false;
                return _spare;
            }

            double x, y, square;
            do
            {
                x = (2 * Uniform()) - 1;
                y = (2 * Uniform()) - 1;
                square = (x * x) + (y * y);
            }
            while (square >= 1 || square == 0);

            double factor = Math.Sqrt(-2 * Math.Log(square) / square);
            (_spare, _hasSpare) = (y * factor, true);
            return x * factor;
        }

        private double Uniform()
        {
            _state += 0x9E3779B97F4A7C15;
            ulong z = _state;
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
            return ((z ^ (z >> 31)) >> 11) * (1.0 / (1UL << 53));
        }
    }
}
