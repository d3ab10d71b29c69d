using System.Globalization;
using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>
/// The tensors that one rank of a run writes into every checkpoint: some whole parameters, so that the ranks' files together
/// are a model as Hugging Face keeps it, and the moments of the elements that the rank owns.
/// </summary>
public sealed class CheckpointPart
{
    // Elements that are copied at once.
    private const int CopiedElements = 1 << 20;

    private readonly ModelFiles _model;
    private readonly Piece[] _parameters;
    private readonly Piece[] _moments;
    private readonly Backend? _backend;
    private readonly int _rank;
    private readonly int _shards;

    /// <summary>Divides the tensors of a run.</summary>
    /// <param name="backend">The device of the tensors.</param>
    /// <param name="parameters">Those of <see cref="LlamaModel.Parameters"/>, alike on every rank. Where ranks keep only parts of them, only shapes count, and a snapshot is needed.</param>
    /// <param name="moments">The pieces that this rank writes, unless it is not one of the shards. Where it has only parts of them, as with parameters.</param>
    /// <param name="rank">This rank.</param>
    /// <param name="ranks">The number of ranks that write.</param>
    /// <param name="shards">The number of ranks that write the moments together, from rank 0 on.</param>
    public CheckpointPart(
        Backend backend, IReadOnlyList<Parameter> parameters, IReadOnlyList<MomentPiece> moments, int rank = 0, int ranks = 1, int shards = 1)
        : this(backend, parameters, moments, rank, ranks, shards, ModelFiles.LeastBytes)
    {
    }

    internal CheckpointPart(
        Backend backend, IReadOnlyList<Parameter> parameters, IReadOnlyList<MomentPiece> moments, int rank, int ranks, int shards, long leastFileBytes)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(rank, ranks);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(shards, ranks);
        (_backend, _rank, _shards) = (backend, rank, shards);
        _model = new ModelFiles(
            [.. parameters.Select(static parameter => new ModelTensor(parameter.Name, parameter.Rows, parameter.Columns))],
            parameters[0].Values.Type, ranks, leastFileBytes);
        Dictionary<string, Parameter> named = parameters.ToDictionary(static parameter => parameter.Name, StringComparer.Ordinal);
        _parameters = rank >= _model.Count
            ? []
            : [.. _model.Tensors(rank).Select(tensor => new Piece(tensor.Name, 0, named[tensor.Name].Values, tensor.IsVector))];
        Dictionary<string, MomentPiece> pieces = moments.Where(static piece => !piece.First.IsEmpty).ToDictionary(static piece => piece.Name, StringComparer.Ordinal);
        _moments = rank >= shards
            ? []
            : [.. parameters.Where(parameter => pieces.ContainsKey(parameter.Name)).SelectMany(parameter => Moments(pieces[parameter.Name], parameter))];
    }

    private CheckpointPart(CheckpointPart other, Arena arena)
    {
        (_model, _rank, _shards) = (other._model, other._rank, other._shards);
        _parameters = Array.ConvertAll(other._parameters, Taken);
        _moments = Array.ConvertAll(other._moments, Taken);

        Piece Taken(Piece piece) => piece with { Data = arena.Take(piece.Data.Rows, piece.Data.Columns, piece.Data.Type) };
    }

    /// <summary>
    /// The same part over memory of its own, for a <see cref="CheckpointWriter"/> to copy it to between two steps and to write it from
    /// while training goes on.
    /// </summary>
    /// <param name="arena">Owner of the copies, in host memory.</param>
    public CheckpointPart Snapshot(Arena arena) => new(this, arena);

    /// <summary>Copies those elements that this rank writes.</summary>
    /// <param name="backend">The device of the elements.</param>
    /// <param name="name">The name of a tensor in the files.</param>
    /// <param name="first">The first of the elements in the whole tensor.</param>
    /// <param name="elements">Some or all of the tensor's, contiguous.</param>
    internal void CopyFrom(Backend backend, string name, long first, Tensor elements)
    {
        foreach (Piece piece in _parameters.Concat(_moments).Where(piece => piece.Name == name))
        {
            long from = Math.Max(first, piece.First), end = Math.Min(first + elements.Count, piece.First + piece.Data.Count);
            while (from < end)
            {
                int count = (int)Math.Min(CopiedElements, end - from);
                Span<byte> bytes = DeviceElements.HostBytes(piece.Data.Elements(from - piece.First, count));
                DeviceElements.ReadBytes(bytes, backend, elements.Elements(from - first, count));
                from += count;
            }
        }
    }

    /// <summary>Writes this rank's files of tensors, and on rank 0 the list of several.</summary>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    internal void Write(FolderWriter writer)
    {
        if (_parameters.Length > 0)
        {
            writer.WriteTensors(_model.Name(_rank), _backend, [.. _parameters.Select(static piece => piece.Named)]);
        }

        if (_rank == 0 && _model.Count > 1)
        {
            writer.WriteText(ModelFiles.IndexName, _model.Index());
        }

        if (_moments.Length > 0)
        {
            var metadata = new Dictionary<string, string>(FolderWriter.TensorMetadata, StringComparer.Ordinal);
            foreach (Piece piece in _moments.Where(static piece => piece.First > 0))
            {
                metadata[piece.Name] = piece.First.ToString(CultureInfo.InvariantCulture);
            }

            writer.WriteTensors(
                ModelFiles.NumberedName(TrainingCheckpoint.OptimizerName, _rank, _shards), _backend, [.. _moments.Select(static piece => piece.Named)], metadata);
        }
    }

    private Piece[] Moments(MomentPiece piece, Parameter parameter)
    {
        bool isVector = _shards > 1 || parameter.IsVector;
        return
        [
            new(piece.Name + MomentPiece.FirstSuffix, piece.Offset, Shaped(piece.First), isVector),
            new(piece.Name + MomentPiece.SecondSuffix, piece.Offset, Shaped(piece.Second), isVector),
        ];

        // What one rank owns is whole and has the parameter's shape; what one of several owns is a range of elements.
        Tensor Shaped(Tensor data) => _shards == 1
            ? data with { Rows = parameter.Rows, Columns = parameter.Columns, Stride = parameter.Columns }
            : data.Elements(0, checked((int)data.Count));
    }

    // A range of a tensor's elements, which begins at the first.
    private readonly record struct Piece(string Name, long First, Tensor Data, bool IsVector)
    {
        public NamedTensor Named => new(Name, Data, IsVector);
    }
}
