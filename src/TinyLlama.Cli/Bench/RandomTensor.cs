using TinyLlama.Compute;

namespace TinyLlama.Cli.Bench;

/// <summary>Operands whose values do not matter, but their being ordinary numbers does.</summary>
internal static class RandomTensor
{
    /// <summary>Takes a tensor and, unless the arena only counts, fills it with values in ±0.5, the same in every run.</summary>
    /// <param name="arena">Its owner.</param>
    /// <param name="backend">The device.</param>
    /// <param name="rows">Its rows.</param>
    /// <param name="columns">Its columns.</param>
    /// <param name="type">A floating-point type.</param>
    public static Tensor TakeRandom(this Arena arena, Backend backend, int rows, int columns, DType type = DType.F32)
    {
        Tensor tensor = arena.Take(rows, columns, type);
        Tensor single = type == DType.F32 ? default : arena.Take(1, columns);
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

                Tensor destination = tensor.RowRange(r, 1);
                backend.Write<float>(single.IsEmpty ? destination : single, row);
                if (!single.IsEmpty)
                {
                    backend.Copy(destination, single);
                }
            }
        }

        return tensor;
    }
}
