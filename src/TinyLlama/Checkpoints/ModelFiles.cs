using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Compute;

namespace TinyLlama.Checkpoints;

/// <summary>
/// How the weights of a checkpoint are divided over files, one a rank: whole tensors, of about as many bytes each. A small
/// model, or that of one rank, stays in one file.
/// </summary>
internal sealed class ModelFiles
{
    /// <summary>The name of the list that says which tensor is in which file.</summary>
    public const string IndexName = TrainingCheckpoint.ModelName + ".index.json";

    /// <summary>Bytes that a file has at least, where there are several.</summary>
    public const long LeastBytes = 64 << 20;

    private readonly List<List<ModelTensor>> _files = [];
    private readonly DType _type;

    /// <summary>Divides the tensors, in their order.</summary>
    /// <param name="tensors">Those of the model.</param>
    /// <param name="type">What they are stored in.</param>
    /// <param name="most">The most files.</param>
    /// <param name="leastBytes"><see cref="LeastBytes"/>, or less for small models.</param>
    public ModelFiles(IReadOnlyList<ModelTensor> tensors, DType type, int most, long leastBytes = LeastBytes)
    {
        _type = type;
        long total = tensors.Sum(ByteCount);
        long count = Math.Clamp(total / leastBytes, 1, most);
        long bytes = 0;
        long last = -1;
        foreach (ModelTensor tensor in tensors)
        {
            // A tensor goes where its middle falls; no tensor is cut, so a range may stay without a file.
            long range = (long)((Int128)(bytes + (ByteCount(tensor) / 2)) * count / total);
            if (range != last)
            {
                _files.Add([]);
                last = range;
            }

            _files[^1].Add(tensor);
            bytes += ByteCount(tensor);
        }
    }

    /// <summary>Gets the number of files.</summary>
    public int Count => _files.Count;

    /// <summary>The name of a file.</summary>
    /// <param name="file">0 … <see cref="Count"/>-1.</param>
    public string Name(int file) => NumberedName(TrainingCheckpoint.ModelName, file, Count);

    /// <summary>The tensors of a file.</summary>
    /// <param name="file">0 … <see cref="Count"/>-1.</param>
    public IReadOnlyList<ModelTensor> Tensors(int file) => _files[file];

    /// <summary>The text of the list, as Hugging Face has it.</summary>
    public string Index()
    {
        var map = new JsonObject();
        for (int file = 0; file < Count; file++)
        {
            foreach (ModelTensor tensor in _files[file])
            {
                map[tensor.Name] = Name(file);
            }
        }

        var metadata = new JsonObject { ["total_size"] = _files.Sum(file => file.Sum(ByteCount)) };
        return new JsonObject { ["metadata"] = metadata, ["weight_map"] = map }.ToJsonString(JsonText.Indented) + "\n";
    }

    /// <summary>The name of one of several files, as Hugging Face has it: <c>model-00001-of-00004.safetensors</c>; of one alone its own.</summary>
    public static string NumberedName(string name, int file, int count) => count == 1
        ? name
        : string.Create(CultureInfo.InvariantCulture, $"{Path.GetFileNameWithoutExtension(name)}-{file + 1:D5}-of-{count:D5}{Path.GetExtension(name)}");

    private long ByteCount(ModelTensor tensor) => tensor.Rows * _type.RowBytes(tensor.Columns);
}
