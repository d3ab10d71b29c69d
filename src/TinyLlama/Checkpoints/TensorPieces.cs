using TinyLlama.Compute;
using TinyLlama.Data;

namespace TinyLlama.Checkpoints;

/// <summary>
/// Copies tensors to a stream piece by piece, in the type of the file, rows of q and k in the order of
/// <see cref="ModelTensors.InterleavedRow"/>.
/// </summary>
/// <param name="source">The model.</param>
/// <param name="wrote">Is told the number of elements of each piece.</param>
internal sealed class TensorPieces(ModelSource source, Action<int> wrote)
{
    // Elements on their way from the source to the file: 4 MiB of singles, whatever the model's size.
    private const int PieceElements = 1 << 20;
    private const int ElementsPerTask = 1 << 14;

    private float[] _values = [];
    private byte[] _bytes = [];

    /// <summary>Copies a tensor.</summary>
    /// <exception cref="UserErrorException">A weight is beyond the type.</exception>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public void Write(Stream destination, ModelTensor tensor, DType type)
    {
        int columns = tensor.Columns;
        int most = Math.Min(tensor.Rows, Math.Max(1, PieceElements / columns));
        Reserve(most * columns, most * (int)type.RowBytes(columns));
        bool interleaved = ModelTensors.IsInterleaved(tensor.Name);
        for (int row = 0; row < tensor.Rows; row += most)
        {
            int rows = Math.Min(most, tensor.Rows - row);
            if (interleaved)
            {
                for (int r = 0; r < rows; r++)
                {
                    long from = ModelTensors.HalfSplitRow(row + r, source.Config.HeadDim);
                    source.Read(_values.AsSpan(r * columns, columns), tensor.Name, from * columns);
                }
            }
            else
            {
                source.Read(_values.AsSpan(0, rows * columns), tensor.Name, (long)row * columns);
            }

            Encode(tensor.Name, type, rows * columns);
            destination.Write(_bytes.AsSpan(0, rows * (int)type.RowBytes(columns)));
            wrote(rows * columns);
        }

        source.DropPages();
    }

    private void Reserve(int elements, int bytes)
    {
        _values = _values.Length < elements ? new float[elements] : _values;
        _bytes = _bytes.Length < bytes ? new byte[bytes] : _bytes;
    }

    // Blocks are independent: the bytes are the same for any number of threads.
    private void Encode(string name, DType type, int count)
    {
        try
        {
            Parallel.For(0, (count + ElementsPerTask - 1) / ElementsPerTask, task =>
            {
                int first = task * ElementsPerTask;
                int length = Math.Min(ElementsPerTask, count - first);
                ElementCodec.Encode(
                    _values.AsSpan(first, length),
                    type,
                    _bytes.AsSpan((int)type.RowBytes(first), (int)type.RowBytes(length)));
            });
        }
        catch (AggregateException e) when (e.InnerExceptions[0] is UserErrorException inner)
        {
            throw new UserErrorException($"{source.Path}: tensor '{name}': {inner.Message}", inner);
        }
    }
}
