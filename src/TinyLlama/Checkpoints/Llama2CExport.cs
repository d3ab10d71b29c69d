using System.Runtime.InteropServices;
using TinyLlama.Compute;
using TinyLlama.Compute.Native;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>Writes a model as files of llama2.c: the weights in version 0 of its format, fp32, and <c>tokenizer.bin</c> beside them.</summary>
public static class Llama2CExport
{
    /// <summary>The usual name of the weights.</summary>
    public const string ModelName = "model.bin";

    private const string TokenizerName = "tokenizer.bin";

    // What run.c computes with; its file has no place for other values.
    private const float RopeTheta = 10_000;
    private const float NormEpsilon = 1e-5f;

    /// <summary>Writes both files beside their places and renames them, so that they are never seen half written.</summary>
    /// <param name="path">The file of the weights; nothing may be there, and no <c>tokenizer.bin</c> beside it, unless <paramref name="force"/>.</param>
    /// <param name="source">The model.</param>
    /// <param name="tokenizer">The tokenizer; null where the model comes without one.</param>
    /// <param name="force">Whether files of these names are replaced.</param>
    /// <param name="progress">Is told the number of elements written so far.</param>
    /// <returns>What was written.</returns>
    /// <exception cref="UserErrorException">A place is taken, or the format cannot express the model or the tokenizer.</exception>
    /// <exception cref="IOException">The disk is full or gone; what was begun is removed.</exception>
    public static IReadOnlyList<ListedFile> Write(
        string path, ModelSource source, BpeTokenizer? tokenizer, bool force = false, Action<long>? progress = null)
    {
        path = Path.GetFullPath(path);
        RequirePlace(path, force);
        RequireExpressible(source);
        byte[]? pieces = tokenizer is null ? null : Llama2CTokenizer.Write(tokenizer.Model, source.Config.VocabularySize);
        string folder = Path.GetDirectoryName(path)!;
        Directory.CreateDirectory(folder);
        string unfinished = $"{path}.{Path.GetRandomFileName()}.tmp";
        try
        {
            Directory.CreateDirectory(unfinished);
            var writer = new FolderWriter(unfinished);
            writer.Write(Path.GetFileName(path), stream => Write(stream, source, progress));
            if (pieces is not null)
            {
                writer.Write(TokenizerName, stream => stream.Write(pieces));
            }

            // The weights come last: where they are, their tokenizer is.
            foreach (ListedFile file in writer.Files.Reverse())
            {
                File.Move(Path.Combine(unfinished, file.Name), Path.Combine(folder, file.Name), overwrite: force);
            }

            DirectoryFlush.Flush(folder);
            return writer.Files;
        }
        finally
        {
            if (Directory.Exists(unfinished))
            {
                Directory.Delete(unfinished, recursive: true);
            }
        }
    }

    /// <summary>Throws unless the files may be written: before the work, to say so early.</summary>
    /// <param name="path">The file of the weights.</param>
    /// <param name="force">Whether files that are there are replaced.</param>
    /// <exception cref="UserErrorException">One is a folder, or is there, or both have one name.</exception>
    public static void RequirePlace(string path, bool force)
    {
        if (Path.GetFileName(path) == TokenizerName)
        {
            throw new UserErrorException($"{path}: is the name of the tokenizer, which is written beside the weights; name another file");
        }

        NewFile.RequirePlace(path, force);
        NewFile.RequirePlace(Path.Combine(Path.GetDirectoryName(path) ?? "", TokenizerName), force);
    }

    private static void RequireExpressible(ModelSource source)
    {
        ModelConfig config = source.Config;
        string? reason = config.RopeFactor != 1 || config.RopeScaling is not null ? "its rotary embedding is scaled"
            : config.RopeTheta != RopeTheta ? $"its rope_theta is {config.RopeTheta}, that of llama2.c is {RopeTheta}"
            : config.NormEpsilon != NormEpsilon ? $"its rms_norm_eps is {config.NormEpsilon}, that of llama2.c is {NormEpsilon}"
            : null;
        if (reason is not null)
        {
            throw new UserErrorException($"{source.Path}: llama2.c cannot run this model: {reason}; export it with --format gguf or hf");
        }
    }

    private static void Write(Stream destination, ModelSource source, Action<long>? progress)
    {
        ModelConfig c = source.Config;
        int vocabulary = c.TiedEmbeddings ? c.VocabularySize : -c.VocabularySize;
        destination.Write(MemoryMarshal.AsBytes<int>([c.Channels, c.Hidden, c.Layers, c.Heads, c.KeyValueHeads, vocabulary, c.ContextLength]));
        long done = 0;
        var pieces = new TensorPieces(source, count => progress?.Invoke(done += count));
        foreach (ModelTensor tensor in Llama2CFile.Order(source.Tensors))
        {
            pieces.Write(destination, tensor, DType.F32);
            if (tensor.Name == Llama2CFile.BeforeTables)
            {
                WriteTable(destination, c, MathF.Cos);
                WriteTable(destination, c, MathF.Sin);
            }
        }
    }

    // (T, D/2), in single precision at each step, as llama2.c's model.py computes it.
    private static void WriteTable(Stream destination, ModelConfig config, Func<float, float> function)
    {
        float[] row = new float[config.HeadDim / 2];
        for (int position = 0; position < config.ContextLength; position++)
        {
            for (int pair = 0; pair < row.Length; pair++)
            {
                float frequency = 1 / MathF.Pow(RopeTheta, 2f * pair / config.HeadDim);
                row[pair] = function(position * frequency);
            }

            destination.Write(MemoryMarshal.AsBytes<float>(row));
        }
    }
}
