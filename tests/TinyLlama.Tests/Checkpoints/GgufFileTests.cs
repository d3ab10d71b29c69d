using System.Text;
using TinyLlama.Checkpoints;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>GGUF files made here, whole and damaged.</summary>
public sealed class GgufFileTests : IDisposable
{
    private static readonly ModelConfig s_tiny = new()
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

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void The_chat_template_is_that_of_the_metadata()
    {
        using ModelSource source = ModelSource.Open(Write(new Builder().Text("tokenizer.chat_template", "{{ bos_token }}").Bytes()), Assert.Fail);
        Assert.Equal("{{ bos_token }}", source.ChatTemplate);
    }

    [Fact]
    public void Shape_values_and_tokenizer_are_those_of_the_file()
    {
        using ModelSource source = ModelSource.Open(Write(new Builder().Bytes()), Assert.Fail);
        Assert.Equal(s_tiny, source.Config);
        Assert.True(source.AddsBos);
        Assert.Null(source.ChatTemplate);
        BpeTokenizer tokenizer = source.LoadTokenizer()!;
        Assert.Equal((1, 2, 262), (tokenizer.Bos, tokenizer.Eos, tokenizer.VocabularySize));
        List<int> ids = [];
        tokenizer.Encode("aba", ids);
        Assert.Equal([261, 3 + (byte)'b', 260], ids);
        Assert.Equal("aba", tokenizer.Decode([.. ids]));

        // The type of each tensor is another one, all of them exact for small whole numbers.
        foreach (ModelTensor tensor in source.Tensors)
        {
            float[] values = new float[tensor.Rows * (long)tensor.Columns];
            source.Read(values, tensor.Name, 0);
            bool rotated = tensor.Name.Contains("q_proj", StringComparison.Ordinal) || tensor.Name.Contains("k_proj", StringComparison.Ordinal);
            for (int row = 0; row < tensor.Rows; row++)
            {
                // Heads are 16 wide: row i of the first half is row 2i of the file, of the second row 2(i - 8) + 1.
                int stored = !rotated ? row : (row & ~15) + (row % 16 < 8 ? 2 * (row % 16) : (2 * (row % 16)) - 15);
                Assert.Equal(Builder.Value(stored, 5), values[(row * tensor.Columns) + 5]);
            }

            float[] part = new float[7];
            source.Read(part, tensor.Name, tensor.Columns - 7);
            Assert.Equal(values[(tensor.Columns - 7)..tensor.Columns], part);
        }
    }

    [Fact]
    public void A_file_cut_off_anywhere_is_refused_in_one_line()
    {
        byte[] whole = new Builder().Bytes();
        for (int length = 0; length < whole.Length; length += length < 2000 || length > whole.Length - 40 ? 1 : 97)
        {
            AssertRefused(whole[..length]);
        }
    }

    [Fact]
    public void An_altered_file_is_read_or_refused_in_one_line()
    {
        byte[] whole = new Builder().Bytes();
        var random = new Random(5);
        for (int i = 0; i < 3000; i++)
        {
            byte[] altered = [.. whole];
            for (int flips = random.Next(1, 4); flips > 0; flips--)
            {
                altered[random.Next(9000)] ^= (byte)(1 << random.Next(8));
            }

            try
            {
                using ModelSource source = ModelSource.Open(Write(altered), Assert.Fail);
                source.LoadTokenizer();
                source.Read(new float[33], source.Tensors[0].Name, 0);
            }
            catch (UserErrorException e)
            {
                Assert.DoesNotContain('\n', e.Message.TrimEnd('\n'));
            }
        }
    }

    [Theory]
    [InlineData("nested", "array of arrays")]
    [InlineData("twice", "has 'general.name' twice")]
    [InlineData("huge-array", "claims 4611686018427387904 elements of 'x'")]
    [InlineData("huge-text", "cut off or damaged")]
    [InlineData("alignment", "'general.alignment' is not a power of two")]
    [InlineData("architecture", "architecture 'gpt2'; only 'llama'")]
    [InlineData("tokenizer", "'t5', only 'llama' (SentencePiece BPE) and 'gpt2'")]
    [InlineData("words", "'tokenizer.ggml.pre' is 'qwen2', only 'gpt-2', 'smollm', 'llama-bpe'")]
    [InlineData("rope", "'llama.rope.scaling.type' is 'yarn'")]
    [InlineData("split", "is one of 2 files of a model, but not named so")]
    public void What_is_wrong_is_named(string wrong, string message)
    {
        var builder = new Builder();
        switch (wrong)
        {
            case "nested":
                builder.Add("x", 9, w => Array(w, 9, 1, () => w.Write(0)));
                break;
            case "twice":
                builder.Text("general.name", "a").Text("general.name", "b");
                break;
            case "huge-array":
                builder.Add("x", 9, w => Array(w, 4, 1UL << 62, () => w.Write(0)));
                break;
            case "huge-text":
                builder.Add("x", 8, w => w.Write(1UL << 62));
                break;
            case "alignment":
                builder.Add("general.alignment", 4, w => w.Write(33));
                break;
            case "architecture":
                builder.Replace("general.architecture", "gpt2");
                break;
            case "tokenizer":
                builder.Replace("tokenizer.ggml.model", "t5");
                break;
            case "words":
                builder.Replace("tokenizer.ggml.model", "gpt2");
                builder.Text("tokenizer.ggml.pre", "qwen2");
                break;
            case "rope":
                builder.Replace("llama.rope.scaling.type", "yarn");
                break;
            default:
                builder.Add("split.count", 2, w => w.Write((ushort)2));
                break;
        }

        Assert.Contains(message, AssertRefused(builder.Bytes()), StringComparison.Ordinal);
    }

    [Fact]
    public void Other_byte_orders_versions_and_types_are_refused_by_name()
    {
        byte[] file = new Builder().Bytes();
        byte[] bigEndian = [.. file[..4], 0, 0, 0, 3, .. file[8..]];
        Assert.Contains("big-endian", AssertRefused(bigEndian), StringComparison.Ordinal);
        byte[] old = [.. file[..4], 1, 0, 0, 0, .. file[8..]];
        Assert.Contains("version 1", AssertRefused(old), StringComparison.Ordinal);
        Assert.Contains("type IQ4_NL", AssertRefused(new Builder { EmbeddingType = 20 }.Bytes()), StringComparison.Ordinal);
        Assert.Contains("beyond the end", AssertRefused(new Builder { OffsetError = 1 << 20 }.Bytes()), StringComparison.Ordinal);
        Assert.Contains("shares bytes", AssertRefused(new Builder { OffsetError = -64 }.Bytes()), StringComparison.Ordinal);
        Assert.Contains("not aligned", AssertRefused(new Builder { OffsetError = 4 }.Bytes()), StringComparison.Ordinal);
    }

    [Fact]
    public void A_model_in_parts_is_opened_by_any_of_them()
    {
        Range[] ranges = { ..0, ..4, 4.. };
        string[] paths = [.. ranges.Select((range, i) => WritePart(i, Builder.Part(i, 3, range)))];
        using ModelSource whole = ModelSource.Open(Write(new Builder().Bytes()), Assert.Fail);
        foreach (string path in paths)
        {
            using ModelSource parts = ModelSource.Open(path, Assert.Fail);
            Assert.Equal(whole.Config, parts.Config);
            Assert.Equal(whole.LoadTokenizer()!.Hash, parts.LoadTokenizer()!.Hash);
            foreach (ModelTensor tensor in whole.Tensors)
            {
                (float[] expected, float[] actual) = (new float[tensor.Count], new float[tensor.Count]);
                whole.Read(expected, tensor.Name, 0);
                parts.Read(actual, tensor.Name, 0);
                Assert.Equal(expected, actual);
            }
        }
    }

    [Theory]
    [InlineData("missing", "cannot be read")]
    [InlineData("number", "is not part 2 of 3, as its name says")]
    [InlineData("twice", "'blk.0.attn_k.weight', which another part has too")]
    [InlineData("few", "its parts have 10 tensors, 11 are said to be there")]
    public void Parts_that_do_not_belong_together_are_refused(string wrong, string message)
    {
        string first = WritePart(0, Builder.Part(0, 3, ..0));
        string second = WritePart(1, Builder.Part(wrong == "number" ? 2 : 1, 3, ..4));
        WritePart(2, Builder.Part(2, 3, wrong == "twice" ? 3.. : wrong == "few" ? 5.. : 4..));
        if (wrong == "missing")
        {
            File.Delete(second);
        }

        Assert.Contains(message, Assert.Throws<UserErrorException>(() => ModelSource.Open(first, Assert.Fail)).Message, StringComparison.Ordinal);
    }

    private static void Array(BinaryWriter writer, uint type, ulong count, Action elements)
    {
        writer.Write(type);
        writer.Write(count);
        elements();
    }

    private string AssertRefused(byte[] bytes)
    {
        string path = Write(bytes);
        string message = Assert.Throws<UserErrorException>(() =>
        {
            using ModelSource source = ModelSource.Open(path, Assert.Fail);
            source.LoadTokenizer();
        }).Message;
        Assert.StartsWith(path + ": ", message, StringComparison.Ordinal);
        Assert.DoesNotContain('\n', message);
        return message;
    }

    private string WritePart(int number, byte[] bytes)
    {
        string path = _folder[$"x-{number + 1:00000}-of-00003.gguf"];
        File.WriteAllBytes(path, bytes);
        return path;
    }

    private string Write(byte[] bytes)
    {
        string path = _folder["x.gguf"];
        File.WriteAllBytes(path, bytes);
        return path;
    }

    /// <summary>Writes a model of <see cref="s_tiny"/>'s shape, by the format's specification.</summary>
    private sealed class Builder
    {
        private readonly List<(string Key, uint Type, Action<BinaryWriter> Value)> _metadata = [];

        public Builder()
        {
            Text("general.architecture", "llama");
            Count("llama.context_length", s_tiny.ContextLength).Count("llama.block_count", s_tiny.Layers);
            Count("llama.attention.head_count", s_tiny.Heads).Count("llama.attention.head_count_kv", s_tiny.KeyValueHeads);
            Count("llama.embedding_length", s_tiny.Channels).Count("llama.feed_forward_length", s_tiny.Hidden);
            Real("llama.attention.layer_norm_rms_epsilon", s_tiny.NormEpsilon);
            Text("llama.rope.scaling.type", "linear").Real("llama.rope.scaling.factor", s_tiny.RopeFactor);
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

        public Builder Add(string key, uint type, Action<BinaryWriter> value)
        {
            _metadata.Add((key, type, value));
            return this;
        }

        public Builder Text(string key, string text) => Add(key, 8, w => WriteText(w, text));

        public void Replace(string key, string text)
        {
            _metadata.RemoveAll(pair => pair.Key == key);
            Text(key, text);
        }

        /// <summary>One part of a file; of all parts, the first has the metadata.</summary>
        public static byte[] Part(int number, int count, Range tensors, int total = 11)
        {
            var builder = new Builder();
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
                ("token_embd.weight", s_tiny.VocabularySize, s_tiny.Channels, EmbeddingType),
                ("blk.0.attn_norm.weight", 1, s_tiny.Channels, 0),
                ("blk.0.attn_q.weight", s_tiny.Channels, s_tiny.Channels, 8),
                ("blk.0.attn_k.weight", s_tiny.KeyValueChannels, s_tiny.Channels, 1),
                ("blk.0.attn_v.weight", s_tiny.KeyValueChannels, s_tiny.Channels, 30),
                ("blk.0.attn_output.weight", s_tiny.Channels, s_tiny.Channels, 2),
                ("blk.0.ffn_norm.weight", 1, s_tiny.Channels, 0),
                ("blk.0.ffn_gate.weight", s_tiny.Hidden, s_tiny.Channels, 8),
                ("blk.0.ffn_up.weight", s_tiny.Hidden, s_tiny.Channels, 2),
                ("blk.0.ffn_down.weight", s_tiny.Channels, s_tiny.Hidden, 1),
                ("output_norm.weight", 1, s_tiny.Channels, 0),
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

        private Builder Count(string key, int count) => Add(key, 4, w => w.Write((uint)count));

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
}
