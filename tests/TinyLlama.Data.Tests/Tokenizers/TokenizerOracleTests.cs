using System.Text.Json;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Tests.Common;

namespace TinyLlama.Data.Tests.Tokenizers;

/// <summary>Llama 2's tokenizer against ids that other programs gave.</summary>
public sealed class TokenizerOracleTests
{
    private static readonly Lazy<BpeTokenizer> s_llama = new(() => Tokenizer.Load(LlamaPath()));

    internal static BpeTokenizer Llama2 => s_llama.Value;

    [Fact]
    public void All_cases_of_llama_cpp_give_its_ids()
    {
        string folder = SharedFiles.Require("oracles/spm-vectors");
        string[] texts = File.ReadAllText(Path.Combine(folder, "ggml-vocab-llama-spm.gguf.inp"))
            .Split("\n__ggml_vocab_test__\n");
        string[] lines = File.ReadAllText(Path.Combine(folder, "ggml-vocab-llama-spm.gguf.out")).Split('\n');
        Assert.Equal(47, texts.Length);
        for (int i = 0; i < texts.Length; i++)
        {
            int[] expected = [.. lines[i].Split(' ', StringSplitOptions.RemoveEmptyEntries).Select(int.Parse)];
            Assert.Equal(expected, Encode(texts[i]));
            Assert.Equal(texts[i], Llama2.Decode(expected));
        }
    }

    [Fact]
    public void All_cases_of_llama2_c_give_its_ids()
    {
        string path = SharedFiles.Require("oracles/spm-vectors/llama2c_test_vectors.json");
        using JsonDocument cases = JsonDocument.Parse(File.ReadAllText(path));
        foreach (JsonElement item in cases.RootElement.EnumerateArray())
        {
            int[] expected = [.. item.GetProperty("ids_with_bos").EnumerateArray().Select(id => id.GetInt32())];
            Assert.Equal(expected, Encode(item.GetProperty("text").GetString()!).Prepend(Llama2.Bos!.Value));
        }
    }

    [Fact]
    public void All_golden_cases_give_their_ids_with_and_without_control_symbols_invalid_text_included()
    {
        string path = SharedFiles.Require("goldens/gguf/tokenizer-32000.json");
        using JsonDocument cases = JsonDocument.Parse(File.ReadAllText(path));
        foreach (JsonElement item in cases.RootElement.EnumerateArray())
        {
            int[] expected = [.. item.GetProperty("ids").EnumerateArray().Select(id => id.GetInt32())];
            List<int> ids = [Llama2.Bos!.Value];
            if (item.TryGetProperty("text_base64", out JsonElement bytes))
            {
                Llama2.EncodeUtf8(bytes.GetBytesFromBase64(), ids);
            }
            else if (item.GetProperty("parse_special").GetInt32() == 1)
            {
                Llama2.EncodeWithControls(item.GetProperty("text").GetString()!, ids);
            }
            else
            {
                Llama2.Encode(item.GetProperty("text").GetString(), ids);
            }

            Assert.Equal(expected, ids);
        }
    }

    [Fact]
    public void Llama_2_has_its_known_shape()
    {
        BpeTokenizer llama = Llama2;
        Assert.Equal(32000, llama.VocabularySize);
        Assert.Equal(1, llama.Bos);
        Assert.Equal(2, llama.Eos);
        Assert.Equal(" the"u8.ToArray(), llama.TokenBytes(278).ToArray());
        Assert.Equal("the"u8.ToArray(), llama.FirstTokenBytes(278).ToArray());
        Assert.Equal([10], llama.TokenBytes(13).ToArray());
        Assert.Empty(llama.TokenBytes(1).ToArray());
        Assert.Throws<ArgumentOutOfRangeException>(() => llama.TokenBytes(32000));
        Assert.Throws<ArgumentOutOfRangeException>(() => llama.Decode([-1]));
    }

    [Fact]
    public void A_unigram_model_is_refused_by_name()
    {
        string path = SharedFiles.Require("oracles/spm-vectors/test_model.model");
        var error = Assert.Throws<UserErrorException>(() => Tokenizer.Load(path));
        Assert.Contains("unigram", error.Message, StringComparison.Ordinal);
        Assert.Contains(path, error.Message, StringComparison.Ordinal);
    }

    internal static string LlamaPath() => SharedFiles.Require("oracles/llama2-tokenizer/tokenizer.model");

    private static List<int> Encode(string text)
    {
        List<int> ids = [];
        Llama2.Encode(text, ids);
        return ids;
    }
}
