using System.Globalization;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Native;
using TinyLlama.Data;

namespace TinyLlama.Inference;

/// <summary>Keys and values of the last prompt in a file: a prompt that begins alike is not computed again.</summary>
/// <remarks>
/// A safetensors file: <c>tokens</c>, and <c>block.0</c>, <c>block.1</c> … as the device keeps them; its metadata says of
/// which model they are and has a SHA-256 of all. It is written beside its place and renamed.
/// </remarks>
/// <param name="path">The file; it need not be there yet.</param>
/// <param name="model">What tells the model, and the device's order of keys and values, from others.</param>
internal sealed class PromptCache(string path, string model)
{
    private const string Format = "tinyllama prompt cache 1";
    private const string Tokens = "tokens";

    private bool _isCurrent;

    /// <summary>Feeds an empty sequence what the file has of a text; at least the text's last token is left to compute.</summary>
    /// <returns>The number of tokens that were in the file.</returns>
    /// <exception cref="UserErrorException">The file is no prompt cache, damaged, or of another model.</exception>
    public int Restore(InferenceEngine engine, CachedSequence sequence, ReadOnlySpan<int> text)
    {
        _isCurrent = false;
        if (!File.Exists(path))
        {
            return 0;
        }

        try
        {
            using SafetensorsFile file = SafetensorsFile.Open(path);
            ReadOnlySpan<int> tokens = Check(file, engine.BlockBytes);
            int known = tokens.CommonPrefixLength(text);
            _isCurrent = known == text.Length;
            int restored = Math.Min(known, text.Length - 1);
            for (int i = 0; sequence.Length < restored; i++)
            {
                int count = Math.Min(TokenLayout.KeyBlock, restored - sequence.Length);
                engine.AppendBlock(sequence, text.Slice(sequence.Length, count), file.Bytes(file.Entry(Block(i)), 0, engine.BlockBytes));
            }

            return restored;
        }
        catch (UserErrorException e)
        {
            throw new UserErrorException($"{e.Message}; delete it, or name another file for the prompt cache", e);
        }
    }

    /// <summary>Writes the file, where it has not the whole text that <see cref="Restore"/> was given.</summary>
    /// <param name="engine">The engine of the sequence.</param>
    /// <param name="sequence">What was fed: the text.</param>
    /// <param name="text">Its tokens, all of them fed.</param>
    /// <exception cref="IOException">The disk is full or gone, or no file can be there; what was begun is removed.</exception>
    public void Save(InferenceEngine engine, CachedSequence sequence, ReadOnlySpan<int> text)
    {
        if (_isCurrent)
        {
            return;
        }

        byte[] tokens = MemoryMarshal.AsBytes(text).ToArray();
        byte[] block = new byte[engine.BlockBytes];
        using var hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        hash.AppendData(tokens);
        var tensors = new List<StoredTensor>
        {
            Integers(Tokens, text.Length, (first, bytes) => tokens.AsSpan((int)first * sizeof(int), bytes.Length).CopyTo(bytes)),
        };
        for (int i = 0; i < KeyValueCache.BlocksFor(text.Length); i++)
        {
            int index = i;
            engine.ReadBlock(block, sequence, index);
            hash.AppendData(block);
            tensors.Add(Integers(Block(index), block.Length / sizeof(int), (first, bytes) =>
            {
                if (first == 0)
                {
                    engine.ReadBlock(block, sequence, index);
                }

                block.AsSpan((int)first * sizeof(int), bytes.Length).CopyTo(bytes);
            }));
        }

        var metadata = new Dictionary<string, string> { ["format"] = Format, ["model"] = model, ["sha256"] = Convert.ToHexStringLower(hash.GetHashAndReset()) };
        Replace(Path.GetFullPath(path), stream => Safetensors.Write(stream, tensors, metadata));
        _isCurrent = true;
    }

    private static void Replace(string path, Action<Stream> write)
    {
        string unfinished = $"{path}.{Path.GetRandomFileName()}.tmp";
        try
        {
            using (var file = new NewFile(unfinished))
            {
                write(file);
                file.Flush(flushToDisk: true);
            }

            File.Move(unfinished, path, overwrite: true);
            DirectoryFlush.Flush(Path.GetDirectoryName(path)!);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new IOException($"{path}: the prompt cache cannot be written: {e.Message}; name another file", e);
        }
        finally
        {
            // In a folder that is not there, deleting would fail in its turn.
            if (File.Exists(unfinished))
            {
                File.Delete(unfinished);
            }
        }
    }

    // Returns the tokens.
    private ReadOnlySpan<int> Check(SafetensorsFile file, int blockBytes)
    {
        if (file.Metadata.GetValueOrDefault("format") != Format)
        {
            throw new UserErrorException($"{path}: not a prompt cache, or one of another version");
        }

        if (file.Metadata.GetValueOrDefault("model") != model)
        {
            throw new UserErrorException($"{path}: is the prompt cache of another model or device");
        }

        SafetensorsEntry tokens = file.Entry(Tokens);
        using var hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        ReadOnlySpan<byte> bytes = file.Bytes(tokens, 0, (int)Math.Min(tokens.ByteCount, int.MaxValue));
        hash.AppendData(bytes);
        for (int i = 0; i < KeyValueCache.BlocksFor(bytes.Length / sizeof(int)); i++)
        {
            SafetensorsEntry block = file.Entry(Block(i));
            if (block.ByteCount != blockBytes)
            {
                throw new UserErrorException($"{path}: '{block.Name}' has {block.ByteCount} bytes, {blockBytes} are needed");
            }

            hash.AppendData(file.Bytes(block, 0, blockBytes));
        }

        return file.Metadata.GetValueOrDefault("sha256") == Convert.ToHexStringLower(hash.GetHashAndReset())
            ? MemoryMarshal.Cast<byte, int>(bytes)
            : throw new UserErrorException($"{path}: is damaged: its hash does not match");
    }

    private static string Block(int index) => string.Create(CultureInfo.InvariantCulture, $"block.{index}");

    private static StoredTensor Integers(string name, int count, ReadElements read) => new(name, [count], DType.I32, read);
}
