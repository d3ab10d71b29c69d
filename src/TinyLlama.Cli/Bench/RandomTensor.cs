using TinyLlama.Compute;

namespace TinyLlama.Cli.Bench;

/// <summary>Operands whose values do not matter, but their being ordinary numbers does.</summary>
internal static class RandomTensor
{
    /// <summary>Takes a tensor of F32 and, unless the arena only counts, fills it with values in ±0.5, the same in every run.</summary>
    public static Tensor TakeRandom(this Arena arena, Backend backend, int rows, int columns)
    {
        Tensor tensor = arena.Take(rows, columns);
        if (!arena.IsPlan)
        {
            var random = new Random(1);
            float[] row = new float[columns];
            for (int r = 0; r < rows; r++)
            {
                for (int i = 0; i < columns; i++)
                {
                    row[i] = random.NextSingle() - 0.5f;
                }

                backend.Write<float>(tensor.RowRange(r, 1), row);
            }
        }

        return tensor;
    }
}
