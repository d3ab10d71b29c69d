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
    private readonly NamedTensor[] _parameters;
    private readonly NamedTensor[] _moments;
    private readonly Dictionary<string, string> _metadata = new(FolderWriter.TensorMetadata, StringComparer.Ordinal);
    private readonly Backend? _backend;
    private readonly int _rank;
    private readonly int _shards;

    /// <summary>Divides the tensors of a run.</summary>
    /// <param name="backend">The device of the tensors.</param>
    /// <param name="parameters">Those of <see cref="LlamaModel.Parameters"/>, alike on every rank. Where ranks keep only parts of them, only shapes count, and a snapshot is needed.</param>
    /// <param name="moments">The pieces that this rank owns; not written by a rank that is not one of the shards.</param>
    /// <param name="rank">This rank.</param>
    /// <param name="ranks">The number of ranks that write.</param>
    /// <param name="shards">The number of ranks that own the moments together, from rank 0 on.</param>
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
        (_backend, Owned, _rank, _shards) = (backend, moments, rank, shards);
        _model = new ModelFiles(
            [.. parameters.Select(static parameter => new ModelTensor(parameter.Name, parameter.Rows, parameter.Columns))],
            parameters[0].Values.Type, ranks, leastFileBytes);
        Dictionary<string, Parameter> named = parameters.ToDictionary(static parameter => parameter.Name, StringComparer.Ordinal);
        _parameters = rank >= _model.Count
            ? []
            : [.. _model.Tensors(rank).Select(tensor => new NamedTensor(tensor.Name, named[tensor.Name].Values, tensor.IsVector))];
        Dictionary<string, MomentPiece> pieces = moments.Where(static piece => !piece.First.IsEmpty).ToDictionary(static piece => piece.Name, StringComparer.Ordinal);
        _moments = rank >= shards
            ? []
            : [.. parameters.Where(parameter => pieces.ContainsKey(parameter.Name)).SelectMany(parameter => Moments(pieces[parameter.Name], parameter))];
    }

    private CheckpointPart(CheckpointPart other, Arena arena)
    {
        (_model, _metadata, Owned, _rank, _shards) = (other._model, other._metadata, other.Owned, other._rank, other._shards);
        _parameters = Array.ConvertAll(other._parameters, Taken);
        _moments = Array.ConvertAll(other._moments, Taken);

        NamedTensor Taken(NamedTensor tensor) => tensor with { Data = arena.Take(tensor.Data.Rows, tensor.Data.Columns, tensor.Data.Type) };
    }

    /// <summary>Gets the moments that the rank owns, whether it is the one that writes them or not.</summary>
    public IReadOnlyList<MomentPiece> Owned { get; }

    /// <summary>
    /// The same part over memory of its own, for a <see cref="CheckpointWriter"/> to copy it to between two steps and to write it from
    /// while training goes on.
    /// </summary>
    /// <param name="arena">Owner of the copies, in host memory.</param>
    public CheckpointPart Snapshot(Arena arena) => new(this, arena);

    /// <summary>Copies those of the parameters that this rank writes. Where a rank has no whole model, for each unit while it is gathered.</summary>
    /// <param name="backend">The device of the parameters.</param>
    /// <param name="parameters">Some or all of the model's.</param>
    internal void CopyFrom(Backend backend, IEnumerable<Parameter> parameters)
    {
        foreach (Parameter parameter in parameters)
        {
            foreach (NamedTensor tensor in _parameters)
            {
                if (tensor.Name == parameter.Name)
                {
                    Copy(tensor.Data, backend, parameter.Values);
                }
            }
        }
    }

    /// <summary>Copies the moments of the part that this is a snapshot of.</summary>
    internal void CopyMomentsFrom(CheckpointPart part)
    {
        for (int i = 0; i < _moments.Length; i++)
        {
            Copy(_moments[i].Data, part._backend!, part._moments[i].Data);
        }
    }

    /// <summary>Writes this rank's files of tensors, and on rank 0 the list of several.</summary>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    internal void Write(FolderWriter writer)
    {
        if (_parameters.Length > 0)
        {
            writer.WriteTensors(_model.Name(_rank), _backend, _parameters);
        }

        if (_rank == 0 && _model.Count > 1)
        {
            writer.WriteText(ModelFiles.IndexName, _model.Index());
        }

        if (_moments.Length > 0)
        {
            writer.WriteTensors(ModelFiles.NumberedName(TrainingCheckpoint.OptimizerName, _rank, _shards), _backend, _moments, _metadata);
        }
    }

    private NamedTensor[] Moments(MomentPiece piece, Parameter parameter)
    {
        (string first, string second) = (piece.Name + MomentPiece.FirstSuffix, piece.Name + MomentPiece.SecondSuffix);
        if (_shards > 1 && piece.Offset > 0)
        {
            _metadata[first] = _metadata[second] = piece.Offset.ToString(CultureInfo.InvariantCulture);
        }

        bool isVector = _shards > 1 || parameter.IsVector;
        return [new(first, Shaped(piece.First), isVector), new(second, Shaped(piece.Second), isVector)];

        // What one rank owns is whole and has the parameter's shape; what one of several owns is a range of elements.
        Tensor Shaped(Tensor data) => _shards == 1
            ? data with { Rows = parameter.Rows, Columns = parameter.Columns, Stride = parameter.Columns }
            : data.Elements(0, checked((int)data.Count));
    }

    private static void Copy(Tensor destination, Backend backend, Tensor source)
    {
        for (long first = 0; first < source.Count;)
        {
            int count = (int)Math.Min(CopiedElements, source.Count - first);
            DeviceElements.ReadBytes(DeviceElements.HostBytes(destination.Elements(first, count)), backend, source.Elements(first, count));
            first += count;
        }
    }
}
