using System.Runtime.InteropServices;
using TinyLlama.Compute;
using TinyLlama.Compute.Native;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>What has been written.</summary>
/// <param name="ByteCount">The size of the file.</param>
/// <param name="BitsPerWeight">The size of the tensors in bits, for each of the model's parameters.</param>
/// <param name="Notes">What is otherwise than asked for, a line each.</param>
public sealed record GgufExported(long ByteCount, double BitsPerWeight, IReadOnlyList<string> Notes);

/// <summary>Writes a model as a GGUF file, which llama.cpp and programs built on it load.</summary>
public static class GgufExport
{
    private const string Extension = ".gguf";

    /// <summary>Writes the file beside its place and renames it, so that it is never seen half written.</summary>
    /// <param name="path">Where to; nothing may be there, unless <paramref name="force"/>.</param>
    /// <param name="source">The model.</param>
    /// <param name="mix">What its tensors are stored in.</param>
    /// <param name="tokenizer">The tokenizer; null where the model comes without one.</param>
    /// <param name="force">Whether a file of that name is replaced.</param>
    /// <param name="progress">Is told the number of elements written so far.</param>
    /// <exception cref="UserErrorException">
    /// The place is taken, GGUF cannot express the tokenizer, or a weight is beyond its type.
    /// </exception>
    /// <exception cref="IOException">The disk is full or gone; what was begun is removed.</exception>
    public static GgufExported Write(
        string path, ModelSource source, GgufMix mix, BpeTokenizer? tokenizer, bool force = false, Action<long>? progress = null)
    {
        path = Path.GetFullPath(path);
        RequirePlace(path, force);
        string folder = Path.GetDirectoryName(path)!;
        Directory.CreateDirectory(folder);
        string unfinished = $"{path}.{Path.GetRandomFileName()}.tmp";
        try
        {
            using (var file = new NewFile(unfinished))
            {
                Write(file, source, mix, tokenizer, progress);
                file.Flush(flushToDisk: true);
            }

            File.Move(unfinished, path, overwrite: force);
            DirectoryFlush.Flush(folder);
        }
        finally
        {
            File.Delete(unfinished);
        }

        ModelConfig config = source.Config;
        long bytes = source.Tensors.Sum(tensor => tensor.Rows * mix.TypeOf(tensor, config).RowBytes(tensor.Columns));
        return new GgufExported(new FileInfo(path).Length, 8.0 * bytes / config.ParameterCount, Notes(source, mix));
    }

    /// <summary>Throws unless a file may be written: before the work, to say so early.</summary>
    /// <param name="path">The file.</param>
    /// <param name="force">Whether one that is there is replaced.</param>
    /// <exception cref="UserErrorException">It is a folder, or it is there, or its name does not end in <c>.gguf</c>.</exception>
    public static void RequirePlace(string path, bool force)
    {
        NewFile.RequirePlace(path, force);
        if (Path.GetExtension(path) != Extension)
        {
            throw new UserErrorException($"{path}: a GGUF file is known by its ending; name it {Path.ChangeExtension(path, Extension)}");
        }
    }

    private static void Write(Stream file, ModelSource source, GgufMix mix, BpeTokenizer? tokenizer, Action<long>? progress)
    {
        var writer = new GgufWriter();
        AddShape(writer, source.Config, mix);
        GgufTokenizer.Write(writer, tokenizer, source);
        long done = 0;
        var pieces = new TensorPieces(source, count => progress?.Invoke(done += count));
        writer.Write(file, [.. RopeDivisors(source.Config), .. source.Tensors.Select(tensor =>
        {
            DType type = mix.TypeOf(tensor, source.Config);
            long[] shape = tensor.IsVector ? [tensor.Columns] : [tensor.Rows, tensor.Columns];
            return new GgufTensor(GgufNames.Of(tensor.Name), shape, type, stream => pieces.Write(stream, tensor, type));
        })]);
    }

    private static void AddShape(GgufWriter writer, ModelConfig config, GgufMix mix)
    {
        writer.Add("general.architecture", "llama");
        writer.Add("general.type", "model");
        writer.Add("general.file_type", mix.FileType);
        writer.Add("general.quantization_version", 2);
        writer.Add("llama.vocab_size", config.VocabularySize);
        writer.Add("llama.context_length", config.ContextLength);
        writer.Add("llama.embedding_length", config.Channels);
        writer.Add("llama.block_count", config.Layers);
        writer.Add("llama.feed_forward_length", config.Hidden);
        writer.Add("llama.attention.head_count", config.Heads);
        writer.Add("llama.attention.head_count_kv", config.KeyValueHeads);
        writer.Add("llama.attention.layer_norm_rms_epsilon", config.NormEpsilon);
        writer.Add("llama.rope.dimension_count", config.HeadDim);
        writer.Add("llama.rope.freq_base", config.RopeTheta);
        if (config.RopeFactor != 1)
        {
            writer.Add("llama.rope.scaling.type", "linear");
            writer.Add("llama.rope.scaling.factor", config.RopeFactor);
        }
    }

    private static IEnumerable<GgufTensor> RopeDivisors(ModelConfig config)
    {
        if (config.RopeScaling is { } scaling)
        {
            float[] divisors = [.. Enumerable.Range(0, config.HeadDim / 2).Select(pair =>
                (float)scaling.Divisor(Math.Pow(config.RopeTheta, -2.0 * pair / config.HeadDim)))];
            yield return new GgufTensor(
                GgufNames.RopeDivisors, [divisors.Length], DType.F32, stream => stream.Write(MemoryMarshal.AsBytes<float>(divisors)));
        }
    }

    // Where the source is quantized already, and one line for each type that does not fit the rows of some tensors.
    private static string[] Notes(ModelSource source, GgufMix mix) =>
    [
        .. source.Tensors.Any(tensor => source.StorageOf(tensor.Name).IsQuantized() && mix.TypeOf(tensor, source.Config) != source.StorageOf(tensor.Name))
            ? [$"{source.Path} is quantized already, and what that lost stays lost; begin with the original if there is one"]
            : Array.Empty<string>(),
        .. source.Tensors
            .Select(tensor => (tensor.Columns, Due: mix.DueTypeOf(tensor, source.Config), Type: mix.TypeOf(tensor, source.Config)))
            .Where(static tensor => tensor.Due != tensor.Type)
            .GroupBy(static tensor => tensor)
            .Select(static group =>
                $"rows of {group.Key.Columns} elements are no multiple of {group.Key.Due.BlockElements()}: stored in {group.Key.Type} instead of "
                + $"{group.Key.Due} (tensors: {group.Count()})"),
    ];
}
