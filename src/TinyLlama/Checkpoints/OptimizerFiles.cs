using System.Globalization;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>
/// The moments in a checkpoint, whatever the number of ranks that wrote it: whole tensors in <c>optimizer.safetensors</c>,
/// or pieces of them in <c>optimizer-00001-of-00004.safetensors</c> and so on. Any range of any of them can be read.
/// </summary>
/// <remarks>
/// A piece has one dimension; the index of its first element stands under its name in <c>__metadata__</c>, 0 where it does
/// not. Once the files are open, every element of every moment is known to be in exactly one of them.
/// </remarks>
public sealed class OptimizerFiles : IDisposable
{
    private readonly List<SafetensorsFile> _files = [];
    private readonly Dictionary<string, List<Piece>> _pieces = new(StringComparer.Ordinal);

    private OptimizerFiles()
    {
    }

    /// <summary>Opens the files and checks that they hold the moments of a model, whole and once.</summary>
    /// <param name="checkpoint">The checkpoint.</param>
    /// <param name="model">The model's shape.</param>
    /// <exception cref="UserErrorException">A file is damaged, elements are missing or there twice, or the moments are those of another model.</exception>
    public static OptimizerFiles Open(TrainingCheckpoint checkpoint, ModelConfig model) =>
        Open(checkpoint.Path, checkpoint.Files.Select(static file => file.Name), model);

    /// <summary>Opens those of a folder's files that hold moments.</summary>
    internal static OptimizerFiles Open(string path, IEnumerable<string> names, ModelConfig model)
    {
        var opened = new OptimizerFiles();
        try
        {
            opened.OpenFiles(path, names);
            opened.RequireCover(path, model);
            return opened;
        }
        catch
        {
            opened.Dispose();
            throw;
        }
    }

    /// <summary>Fills both moments of a piece.</summary>
    /// <param name="backend">Its device.</param>
    /// <param name="piece">Any range of a parameter of the model.</param>
    public void CopyTo(Backend backend, MomentPiece piece)
    {
        CopyTo(backend, piece.First, piece.Name + MomentPiece.FirstSuffix, piece.Offset);
        CopyTo(backend, piece.Second, piece.Name + MomentPiece.SecondSuffix, piece.Offset);
    }

    /// <summary>Fills a tensor with a range of a moment.</summary>
    /// <param name="backend">The tensor's device.</param>
    /// <param name="destination">As many elements as the range has, contiguous.</param>
    /// <param name="name">The moment's name in the files.</param>
    /// <param name="first">The first element of the range.</param>
    internal void CopyTo(Backend backend, Tensor destination, string name, long first)
    {
        foreach (Piece piece in _pieces[name])
        {
            long from = Math.Max(first, piece.First);
            long end = Math.Min(first + destination.Count, piece.End);
            while (from < end)
            {
                int count = (int)Math.Min(SafetensorsFile.PieceElements, end - from);
                ReadOnlySpan<byte> bytes = piece.File.Bytes(piece.Entry, (from - piece.First) * sizeof(float), count * sizeof(float));
                DeviceElements.WriteBytes(backend, destination.Elements(from - first, count), bytes);
                from += count;
            }
        }
    }

    /// <summary>Drops what has been read from memory; it can be read again.</summary>
    public void DropPages() => _files.ForEach(static file => file.DropPages());

    /// <inheritdoc/>
    public void Dispose() => _files.ForEach(static file => file.Dispose());

    private void OpenFiles(string path, IEnumerable<string> names)
    {
        string prefix = Path.GetFileNameWithoutExtension(TrainingCheckpoint.OptimizerName) + "-";
        string extension = Path.GetExtension(TrainingCheckpoint.OptimizerName);
        foreach (string name in names)
        {
            bool isPart = name.StartsWith(prefix, StringComparison.Ordinal) && name.EndsWith(extension, StringComparison.Ordinal);
            if (isPart || name == TrainingCheckpoint.OptimizerName)
            {
                var file = SafetensorsFile.Open(Path.Combine(path, name));
                _files.Add(file);
                foreach (SafetensorsEntry entry in file.Entries)
                {
                    AddPiece(file, entry);
                }
            }
        }

        if (_files.Count == 0)
        {
            throw new UserErrorException(
                $"{path}: has no {TrainingCheckpoint.OptimizerName}, so a run cannot go on from it; begin another run with init: {path}");
        }
    }

    private void AddPiece(SafetensorsFile file, SafetensorsEntry entry)
    {
        if (entry.ElementType != DType.F32)
        {
            throw new UserErrorException($"{file.Path}: tensor '{entry.Name}' is {entry.Type}, F32 is needed");
        }

        long first = 0;
        if (file.Metadata.TryGetValue(entry.Name, out string? text)
            && !long.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out first))
        {
            throw new UserErrorException($"{file.Path}: tensor '{entry.Name}' begins at element '{text}', which is no whole number");
        }

        if (!_pieces.TryGetValue(entry.Name, out List<Piece>? pieces))
        {
            _pieces.Add(entry.Name, pieces = []);
        }

        pieces.Add(new Piece(file, entry, first));
    }

    private void RequireCover(string path, ModelConfig model)
    {
        var known = new HashSet<string>(StringComparer.Ordinal);
        foreach (ModelTensor tensor in ModelTensors.Of(model))
        {
            foreach (string name in (string[])[tensor.Name + MomentPiece.FirstSuffix, tensor.Name + MomentPiece.SecondSuffix])
            {
                known.Add(name);
                RequireCover(path, name, tensor, _pieces.GetValueOrDefault(name) ?? []);
            }
        }

        if (_pieces.Keys.FirstOrDefault(name => !known.Contains(name)) is string unknown)
        {
            throw new UserErrorException($"{_pieces[unknown][0].File.Path}: tensor '{unknown}' is of no parameter of this model");
        }
    }

    private static void RequireCover(string path, string name, ModelTensor tensor, List<Piece> pieces)
    {
        foreach (Piece piece in pieces)
        {
            if (piece.Entry.Shape.Count != 1)
            {
                SafetensorsFile.RequireShape(piece.File.Path, name, piece.Entry.Shape, tensor.Rows, tensor.Columns);
            }

            if (piece.First > tensor.Count - piece.Entry.Count)
            {
                throw new UserErrorException(
                    $"{piece.File.Path}: tensor '{name}' holds {piece.Entry.Count} elements from {piece.First} on, the parameter has {tensor.Count}");
            }
        }

        pieces.Sort(static (a, b) => (a.First, a.Entry.Count).CompareTo((b.First, b.Entry.Count)));
        long next = 0;
        string before = "";
        foreach (Piece piece in pieces)
        {
            if (piece.First < next)
            {
                throw new UserErrorException($"{piece.File.Path}: tensor '{name}' begins at element {piece.First}, {before} holds those up to {next}");
            }

            RequireNoGap(path, name, next, piece.First);
            (next, before) = (piece.End, piece.File.Path);
        }

        RequireNoGap(path, name, next, tensor.Count);
    }

    private static void RequireNoGap(string path, string name, long next, long first)
    {
        if (next < first)
        {
            throw new UserErrorException($"{path}: elements {next} to {first - 1} of tensor '{name}' are in no optimizer file");
        }
    }

    private readonly record struct Piece(SafetensorsFile File, SafetensorsEntry Entry, long First)
    {
        /// <summary>Gets the element after the last.</summary>
        public long End => First + Entry.Count;
    }
}
