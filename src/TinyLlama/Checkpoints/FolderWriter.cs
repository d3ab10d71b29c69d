using System.Security.Cryptography;
using System.Text;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>A file of a folder, as a manifest lists it.</summary>
/// <param name="Name">Its name, without a path.</param>
/// <param name="ByteCount">Its size in bytes.</param>
/// <param name="Sha256">SHA-256 of its bytes, in lower-case hexadecimal.</param>
public sealed record ListedFile(string Name, long ByteCount, string Sha256);

/// <summary>Writes the files of one folder: each is hashed on its way and on the disk (fsync) when its call returns.</summary>
public sealed class FolderWriter
{
    // Other programs look for the framework that a file was written for; "pt" is what all of them accept.
    internal static readonly IReadOnlyDictionary<string, string> TensorMetadata = new Dictionary<string, string>(StringComparer.Ordinal) { ["format"] = "pt" };

    private readonly string _folder;
    private readonly List<ListedFile> _files = [];
    private long _written;

    internal FolderWriter(string folder) => _folder = folder;

    /// <summary>Gets what has been written.</summary>
    public IReadOnlyList<ListedFile> Files => _files;

    /// <summary>Gets the bytes that the disk has taken; any thread may ask.</summary>
    internal long Written => Volatile.Read(ref _written);

    /// <summary>Writes the files of a Hugging Face folder for a model on a device: weights, configs and the tokenizer's.</summary>
    /// <param name="config">The shape.</param>
    /// <param name="backend">The device.</param>
    /// <param name="parameters">Those of <see cref="LlamaModel.Parameters"/>.</param>
    /// <param name="tokenizer">The tokenizer; null where the model comes without one that has files.</param>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public void WriteModel(ModelConfig config, Backend backend, IReadOnlyList<Parameter> parameters, BpeTokenizer? tokenizer)
    {
        NamedTensor[] tensors =
            [.. parameters.Select(static parameter => new NamedTensor(parameter.Name, parameter.Values, parameter.IsVector))];
        WriteTensors(TrainingCheckpoint.ModelName, backend, tensors);
        WriteDescription(config, parameters[0].Values.Type, tokenizer);
    }

    /// <summary>Writes the files of a Hugging Face folder for a model in other files.</summary>
    /// <param name="source">The model.</param>
    /// <param name="type">What its weights are stored in: F32, BF16 or F16.</param>
    /// <param name="tokenizer">The tokenizer; null where the model comes without one.</param>
    /// <param name="originals">A folder whose tokenizer files are taken as they are, or null.</param>
    /// <param name="progress">Is told the number of elements written so far.</param>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public void WriteModel(
        ModelSource source, DType type, BpeTokenizer? tokenizer, string? originals = null, Action<long>? progress = null)
    {
        long done = 0;
        float[] singles = new float[SafetensorsFile.PieceElements];
        StoredTensor[] tensors = [.. source.Tensors.Select(tensor => new StoredTensor(
            tensor.Name,
            tensor.IsVector ? [tensor.Columns] : [tensor.Rows, tensor.Columns],
            type,
            (first, bytes) => ReadPiece(tensor.Name, first, bytes)))];
        Write(TrainingCheckpoint.ModelName, stream => Safetensors.Write(stream, tensors, TensorMetadata));
        WriteDescription(source.Config, type, tokenizer, originals);

        void ReadPiece(string name, long first, Span<byte> bytes)
        {
            if (first == 0)
            {
                // The tensor before this one is written.
                source.DropPages();
            }

            Span<float> piece = singles.AsSpan(0, bytes.Length / type.ByteCount());
            source.Read(piece, name, first);
            ElementCodec.Encode(piece, type, bytes);
            progress?.Invoke(done += piece.Length);
        }
    }

    /// <summary>Writes the files of a Hugging Face folder that hold no weights: configs and the tokenizer's.</summary>
    /// <param name="config">The shape.</param>
    /// <param name="type">What the weights are stored in.</param>
    /// <param name="tokenizer">The tokenizer; null where the model comes without one that has files.</param>
    /// <param name="originals">A folder whose tokenizer files are taken as they are, or null.</param>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public void WriteDescription(ModelConfig config, DType type, BpeTokenizer? tokenizer, string? originals = null)
    {
        WriteText(HuggingFaceConfig.FileName, HuggingFaceConfig.Write(config, type, tokenizer?.Bos, tokenizer?.Eos));
        WriteText(HuggingFaceConfig.GenerationFileName, HuggingFaceConfig.WriteGeneration(tokenizer?.Bos, tokenizer?.Eos));
        WriteTokenizer(tokenizer, originals);
    }

    /// <summary>Writes a file of tensors; see <see cref="Safetensors"/>.</summary>
    /// <param name="name">Its name, without a path; each name once.</param>
    /// <param name="backend">The device of the tensors; null for host memory.</param>
    /// <param name="tensors">Contiguous tensors, each name once.</param>
    /// <param name="metadata">Texts under <c>__metadata__</c>; null for those that other programs ask for.</param>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public void WriteTensors(
        string name, Backend? backend, IReadOnlyList<NamedTensor> tensors, IReadOnlyDictionary<string, string>? metadata = null) =>
        Write(name, stream => Safetensors.Write(stream, backend, tensors, metadata ?? TensorMetadata));

    /// <summary>Writes a text file in UTF-8.</summary>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public void WriteText(string name, string text) => Write(name, stream => stream.Write(Encoding.UTF8.GetBytes(text)));

    /// <summary>Writes a file.</summary>
    /// <param name="name">Its name, without a path; each name once.</param>
    /// <param name="write">Writes the bytes.</param>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public void Write(string name, Action<Stream> write)
    {
        ArgumentOutOfRangeException.ThrowIfNotEqual(Path.GetFileName(name), name);
        using var file = new NewFile(Path.Combine(_folder, name));
        using var hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        using (var hashing = new HashingStream(this, file, hash))
        {
            write(hashing);
        }

        file.Flush(flushToDisk: true);
        _files.Add(new ListedFile(name, file.Length, Convert.ToHexStringLower(hash.GetHashAndReset())));
    }

    private void WriteTokenizer(BpeTokenizer? tokenizer, string? originals)
    {
        try
        {
            tokenizer?.Save(_folder);
        }
        catch (UserErrorException e) when (e.InnerException is IOException)
        {
            throw new IOException(e.Message, e);
        }

        foreach (string name in Tokenizer.FileNames)
        {
            string path = Path.Combine(_folder, name);
            string? original = originals is null ? null : Path.Combine(originals, name);
            if (File.Exists(original))
            {
                // What is not known here, such as a chat template, survives in the original alone.
                File.Delete(path);
                using var source = new FileStream(original, FileMode.Open, FileAccess.Read, FileShare.Read, bufferSize: 0);
                Write(name, source.CopyTo);
            }
            else if (File.Exists(path))
            {
                Add(name);
            }
        }
    }

    /// <summary>Lists a file that others wrote into the folder.</summary>
    private void Add(string name)
    {
        using var file = new FileStream(
            Path.Combine(_folder, name), FileMode.Open, FileAccess.ReadWrite, FileShare.None, bufferSize: 0);
        string hash = Convert.ToHexStringLower(SHA256.HashData(file));
        file.Flush(flushToDisk: true);
        _files.Add(new ListedFile(name, file.Length, hash));
    }

    /// <summary>Passes bytes on, hashes and counts them.</summary>
    private sealed class HashingStream(FolderWriter writer, Stream destination, IncrementalHash hash) : Stream
    {
        public override bool CanRead => false;

        public override bool CanSeek => false;

        public override bool CanWrite => true;

        public override long Length => destination.Length;

        public override long Position
        {
            get => destination.Position;
            set => throw new NotSupportedException();
        }

        public override void Write(ReadOnlySpan<byte> buffer)
        {
            destination.Write(buffer);
            Volatile.Write(ref writer._written, writer._written + buffer.Length);
            hash.AppendData(buffer);
        }

        public override void Write(byte[] buffer, int offset, int count) => Write(buffer.AsSpan(offset, count));

        public override void Flush() => destination.Flush();

        public override int Read(byte[] buffer, int offset, int count) => throw new NotSupportedException();

        public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

        public override void SetLength(long value) => throw new NotSupportedException();
    }
}
