using System.Buffers;
using System.Buffers.Binary;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Data.Shards;

/// <summary>Turns documents into entries of buckets. Any number of threads may use it at once.</summary>
internal sealed class DocumentEncoder
{
    private readonly ITokenizer _tokenizer;
    private readonly PreparationOptions _options;
    private readonly int _bucketsPerSplit;

    /// <summary>Prepares to encode.</summary>
    /// <param name="tokenizer">From text to ids.</param>
    /// <param name="options">What goes around a document, and what decides its place.</param>
    /// <param name="bucketsPerSplit">Number of buckets of each side of the corpus.</param>
    /// <exception cref="UserErrorException">The tokenizer lacks BOS or EOS.</exception>
    public DocumentEncoder(ITokenizer tokenizer, PreparationOptions options, int bucketsPerSplit)
    {
        (_tokenizer, _options, _bucketsPerSplit) = (tokenizer, options, bucketsPerSplit);
        Bos = options.AddBos ? tokenizer.Bos ?? throw new UserErrorException("the tokenizer has no BOS to put before documents; say that none is wanted") : null;
        Eos = options.AddEos ? tokenizer.Eos ?? throw new UserErrorException("the tokenizer has no EOS to put after documents; say that none is wanted") : null;
        BytesPerToken = ShardFile.BytesPerToken(tokenizer.VocabularySize);
    }

    /// <summary>Gets what goes before each document.</summary>
    public int? Bos { get; }

    /// <summary>Gets what goes after each document.</summary>
    public int? Eos { get; }

    /// <summary>Gets the width of a token.</summary>
    public int BytesPerToken { get; }

    /// <summary>The place of a document in the shuffled corpus.</summary>
    public ulong Key(BucketEntry entry) => entry.Key(_options.Seed, _options.Deduplicate);

    /// <summary>Encodes a batch.</summary>
    public EncodedBatch Encode(Batch batch)
    {
        ArrayBufferWriter<byte> bytes = new(_options.BatchCharacters);
        List<(int Bucket, int Start, int Length)> places = new(batch.Documents.Count);
        List<int> tokens = [];
        Span<byte> sha = stackalloc byte[SHA256.HashSizeInBytes];
        long textBytes = 0;
        foreach (Document document in batch.Documents)
        {
            if (document.Fault is not null || document.Text.Length == 0)
            {
                places.Add((-1, 0, 0));
                continue;
            }

            byte[] utf8 = ArrayPool<byte>.Shared.Rent(Encoding.UTF8.GetByteCount(document.Text));
            int utf8Count = Encoding.UTF8.GetBytes(document.Text, utf8);
            SHA256.HashData(utf8.AsSpan(0, utf8Count), sha);
            ArrayPool<byte>.Shared.Return(utf8);
            textBytes += utf8Count;

            tokens.Clear();
            if (Bos is int bos)
            {
                tokens.Add(bos);
            }

            _tokenizer.Encode(document.Text, tokens);
            if (Eos is int eos)
            {
                tokens.Add(eos);
            }

            if (tokens.Count == 0)
            {
                places.Add((-1, 0, 0));
                continue;
            }

            BucketEntry entry = new(BinaryPrimitives.ReadUInt128BigEndian(sha), document.File, document.Line, utf8Count, checked(tokens.Count * BytesPerToken));
            int start = bytes.WrittenCount;
            entry.Write(bytes.GetSpan(BucketEntry.HeaderBytes));
            bytes.Advance(BucketEntry.HeaderBytes);
            ShardWriter.Pack(bytes.GetSpan(entry.TokenBytes), CollectionsMarshal.AsSpan(tokens), BytesPerToken);
            bytes.Advance(entry.TokenBytes);
            Split split = BucketEntry.SplitOf(entry.Hash, _options.ValidationShare);
            places.Add((((int)split * _bucketsPerSplit) + BucketEntry.Part(Key(entry), _bucketsPerSplit), start, bytes.WrittenCount - start));
        }

        return new EncodedBatch(batch, places, bytes.WrittenMemory, textBytes);
    }
}

/// <summary>Records to encode, and where the source goes on behind them.</summary>
internal sealed record Batch(List<Document> Documents, int NextFile, long NextRecord);

/// <summary>The bucket entries of a batch; the bucket of a record that is in none is -1.</summary>
internal sealed record EncodedBatch(Batch Batch, List<(int Bucket, int Start, int Length)> Places, ReadOnlyMemory<byte> Bytes, long TextBytes);
