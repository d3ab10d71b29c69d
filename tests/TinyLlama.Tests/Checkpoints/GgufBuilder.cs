using System.Text;
using TinyLlama.Model;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>Writes a model of <see cref="Config"/>'s shape, by the format's specification.</summary>
internal sealed class GgufBuilder
{
    public static readonly ModelConfig Config = new()
    {
        VocabularySize = 262,
        ContextLength = 16,
        Layers = 1,
        Heads = 2,
        KeyValueHeads = 1,
        Channels = 32,
        Hidden = 32,
        NormEpsilon = 1e-5f,
        RopeFactor = 2,
        TiedEmbeddings = true,
    };

    private readonly List<(string Key, uint Type, Action<BinaryWriter> Value)> _metadata = [];

    public GgufBuilder()
    {
        Text("general.architecture", "llama");
        Count("llama.context_length", Config.ContextLength).Count("llama.block_count", Config.Layers);
        Count("llama.attention.head_count", Config.Heads).Count("llama.attention.head_count_kv", Config.KeyValueHeads);
        Count("llama.embedding_length", Config.Channels).Count("llama.feed_forward_length", Config.Hidden);
        Real("llama.attention.layer_norm_rms_epsilon", Config.NormEpsilon);
        Text("llama.rope.scaling.type", "linear").Real("llama.rope.scaling.factor", Config.RopeFactor);
        Text("tokenizer.ggml.model", "llama");
        string[] pieces = ["<unk>", "<s>", "</s>", .. Enumerable.Range(0, 256).Select(b => $"<0x{b:X2}>"), "▁", "a", "▁a"];
        int[] kinds = [2, 3, 3, .. Enumerable.Repeat(6, 256), 1, 1, 1];
        Add("tokenizer.ggml.tokens", 9, w => Array(w, 8, (ulong)pieces.Length, () => System.Array.ForEach(pieces, piece => WriteText(w, piece))));
        Add("tokenizer.ggml.scores", 9, w => Array(w, 6, (ulong)pieces.Length, () => System.Array.ForEach(pieces, _ => w.Write(-1f))));
        Add("tokenizer.ggml.token_type", 9, w => Array(w, 5, (ulong)kinds.Length, () => System.Array.ForEach(kinds, w.Write)));
        Count("tokenizer.ggml.bos_token_id", 1).Count("tokenizer.ggml.eos_token_id", 2);
    }

    public uint EmbeddingType { get; init; }

    public long OffsetError { get; init; }

    /// <summary>A small whole number, so that every type holds it exactly; the 8 that gives blocks the scale 1 is not among them.</summary>
    public static float Value(int row, int column) => ((row * 3) + column) % 7;

    public GgufBuilder Add(string key, uint type, Action<BinaryWriter> value)
    {
        _metadata.Add((key, type, value));
        return this;
    }

    public GgufBuilder Text(string key, string text) => Add(key, 8, w => WriteText(w, text));

    public void Replace(string key, string text)
    {
        _metadata.RemoveAll(pair => pair.Key == key);
        Text(key, text);
    }

    /// <summary>One part of a file; of all parts, the first has the metadata.</summary>
    public static byte[] Part(int number, int count, Range tensors, int total = 11)
    {
        var builder = new GgufBuilder();
        if (number > 0)
        {
            builder._metadata.Clear();
        }

        builder.Add("split.no", 2, w => w.Write((ushort)number)).Add("split.count", 2, w => w.Write((ushort)count));
        return builder.Add("split.tensors.count", 5, w => w.Write(total)).Bytes(tensors);
    }

    public byte[] Bytes() => Bytes(..);

    private byte[] Bytes(Range range)
    {
        (string Name, int Rows, int Columns, uint Type)[] all =
        [
            ("token_embd.weight", Config.VocabularySize, Config.Channels, EmbeddingType),
            ("blk.0.attn_norm.weight", 1, Config.Channels, 0),
            ("blk.0.attn_q.weight", Config.Channels, Config.Channels, 8),
            ("blk.0.attn_k.weight", Config.KeyValueChannels, Config.Channels, 1),
            ("blk.0.attn_v.weight", Config.KeyValueChannels, Config.Channels, 30),
            ("blk.0.attn_output.weight", Config.Channels, Config.Channels, 2),
            ("blk.0.ffn_norm.weight", 1, Config.Channels, 0),
            ("blk.0.ffn_gate.weight", Config.Hidden, Config.Channels, 8),
            ("blk.0.ffn_up.weight", Config.Hidden, Config.Channels, 2),
            ("blk.0.ffn_down.weight", Config.Channels, Config.Hidden, 1),
            ("output_norm.weight", 1, Config.Channels, 0),
        ];
        (string Name, int Rows, int Columns, uint Type)[] tensors = all[range];
        using var file = new MemoryStream();
        using var writer = new BinaryWriter(file);
        writer.Write("GGUF"u8);
        writer.Write(3);
        writer.Write((ulong)tensors.Length);
        writer.Write((ulong)_metadata.Count);
        foreach ((string key, uint type, Action<BinaryWriter> value) in _metadata)
        {
            WriteText(writer, key);
            writer.Write(type);
            value(writer);
        }

        using var data = new MemoryStream();
        using var dataWriter = new BinaryWriter(data);
        foreach ((string name, int rows, int columns, uint type) in tensors)
        {
            Align(dataWriter);
            WriteText(writer, name);
            bool vector = name.Contains("norm", StringComparison.Ordinal);
            writer.Write(vector ? 1 : 2);
            writer.Write((ulong)columns);
            if (!vector)
            {
                writer.Write((ulong)rows);
            }

            writer.Write(type);
            writer.Write((ulong)(data.Position + (name == "output_norm.weight" ? OffsetError : 0)));
            for (int row = 0; row < rows; row++)
            {
                WriteRow(dataWriter, type, [.. Enumerable.Range(0, columns).Select(column => Value(row, column))]);
            }
        }

        Align(writer);
        writer.Write(data.ToArray());
        return file.ToArray();
    }

    /// <summary>The value of an array.</summary>
    public static void Array(BinaryWriter writer, uint type, ulong count, Action elements)
    {
        writer.Write(type);
        writer.Write(count);
        elements();
    }

    private GgufBuilder Count(string key, int count) => Add(key, 4, w => w.Write((uint)count));

    private void Real(string key, float value) => Add(key, 6, w => w.Write(value));

    private static void Align(BinaryWriter writer)
    {
        while (writer.BaseStream.Position % 32 != 0)
        {
            writer.Write((byte)0);
        }
    }

    private static void WriteText(BinaryWriter writer, string text)
    {
        byte[] bytes = Encoding.UTF8.GetBytes(text);
        writer.Write((ulong)bytes.Length);
        writer.Write(bytes);
    }

    private static void WriteRow(BinaryWriter writer, uint type, float[] row)
    {
        foreach (float[] block in row.Chunk(32))
        {
            switch (type)
            {
                case 1:
                    System.Array.ForEach(block, value => writer.Write((Half)value));
                    break;
                case 2:
                    // Scale 1, then value + 8 in nibbles: the first half of the block low, the second high.
                    writer.Write((Half)1);
                    for (int i = 0; i < 16; i++)
                    {
                        writer.Write((byte)((int)block[i] + 8 | ((int)block[16 + i] + 8 << 4)));
                    }

                    break;
                case 8:
                    writer.Write((Half)0.5);
                    System.Array.ForEach(block, value => writer.Write((sbyte)(2 * value)));
                    break;
                case 30:
                    System.Array.ForEach(block, value => writer.Write((ushort)(BitConverter.SingleToUInt32Bits(value) >> 16)));
                    break;
                default:
                    System.Array.ForEach(block, writer.Write);
                    break;
            }
        }
    }
}
