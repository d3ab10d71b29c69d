using TinyLlama.Checkpoints;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>GGUF files made here, whole and damaged.</summary>
public sealed class GgufFileTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void The_chat_template_is_that_of_the_metadata()
    {
        using ModelSource source = ModelSource.Open(Write(new GgufBuilder().Text("tokenizer.chat_template", "{{ bos_token }}").Bytes()), Assert.Fail);
        Assert.Equal("{{ bos_token }}", source.ChatTemplate);
    }

    [Fact]
    public void Shape_values_and_tokenizer_are_those_of_the_file()
    {
        using ModelSource source = ModelSource.Open(Write(new GgufBuilder().Bytes()), Assert.Fail);
        Assert.Equal(GgufBuilder.Config, source.Config);
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
                Assert.Equal(GgufBuilder.Value(stored, 5), values[(row * tensor.Columns) + 5]);
            }

            float[] part = new float[7];
            source.Read(part, tensor.Name, tensor.Columns - 7);
            Assert.Equal(values[(tensor.Columns - 7)..tensor.Columns], part);
        }
    }

    [Fact]
    public void A_file_cut_off_anywhere_is_refused_in_one_line()
    {
        byte[] whole = new GgufBuilder().Bytes();
        for (int length = 0; length < whole.Length; length += length < 2000 || length > whole.Length - 40 ? 1 : 97)
        {
            AssertRefused(whole[..length]);
        }
    }

    [Fact]
    public void An_altered_file_is_read_or_refused_in_one_line()
    {
        byte[] whole = new GgufBuilder().Bytes();
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
        var builder = new GgufBuilder();
        switch (wrong)
        {
            case "nested":
                builder.Add("x", 9, w => GgufBuilder.Array(w, 9, 1, () => w.Write(0)));
                break;
            case "twice":
                builder.Text("general.name", "a").Text("general.name", "b");
                break;
            case "huge-array":
                builder.Add("x", 9, w => GgufBuilder.Array(w, 4, 1UL << 62, () => w.Write(0)));
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
        byte[] file = new GgufBuilder().Bytes();
        byte[] bigEndian = [.. file[..4], 0, 0, 0, 3, .. file[8..]];
        Assert.Contains("big-endian", AssertRefused(bigEndian), StringComparison.Ordinal);
        byte[] old = [.. file[..4], 1, 0, 0, 0, .. file[8..]];
        Assert.Contains("version 1", AssertRefused(old), StringComparison.Ordinal);
        Assert.Contains("type IQ4_NL", AssertRefused(new GgufBuilder { EmbeddingType = 20 }.Bytes()), StringComparison.Ordinal);
        Assert.Contains("beyond the end", AssertRefused(new GgufBuilder { OffsetError = 1 << 20 }.Bytes()), StringComparison.Ordinal);
        Assert.Contains("shares bytes", AssertRefused(new GgufBuilder { OffsetError = -64 }.Bytes()), StringComparison.Ordinal);
        Assert.Contains("not aligned", AssertRefused(new GgufBuilder { OffsetError = 4 }.Bytes()), StringComparison.Ordinal);
    }

    [Fact]
    public void A_model_in_parts_is_opened_by_any_of_them()
    {
        Range[] ranges = { ..0, ..4, 4.. };
        string[] paths = [.. ranges.Select((range, i) => WritePart(i, GgufBuilder.Part(i, 3, range)))];
        using ModelSource whole = ModelSource.Open(Write(new GgufBuilder().Bytes()), Assert.Fail);
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
        string first = WritePart(0, GgufBuilder.Part(0, 3, ..0));
        string second = WritePart(1, GgufBuilder.Part(wrong == "number" ? 2 : 1, 3, ..4));
        WritePart(2, GgufBuilder.Part(2, 3, wrong == "twice" ? 3.. : wrong == "few" ? 5.. : 4..));
        if (wrong == "missing")
        {
            File.Delete(second);
        }

        Assert.Contains(message, Assert.Throws<UserErrorException>(() => ModelSource.Open(first, Assert.Fail)).Message, StringComparison.Ordinal);
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
}
