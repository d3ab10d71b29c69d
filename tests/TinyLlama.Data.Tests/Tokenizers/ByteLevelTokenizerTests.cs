using System.Text;
using System.Text.Json;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Tests.Common;

namespace TinyLlama.Data.Tests.Tokenizers;

/// <summary>Byte-level BPE as GPT-2, SmolLM and Llama 3 have it.</summary>
public sealed class ByteLevelTokenizerTests : IDisposable
{
    private const int Merges = 60;

    private const string Text = "The old river's bank wasn't wide; we'll see 1234 boats, they'RE long gone.\n\n\tif (x_1 >= 20) {  return  'a';  }\r\n"
        + "  Übergröße, naïve café — \u65e5\u672c\u8a9e\u3002 \U0001F999\U0001D400x \u00a0\u3000y\u0661\u0662\u0663\u0664 \u2167 !!\n\n  end   ";

    private readonly string _folder = Directory.CreateTempSubdirectory("tinyllama-test-").FullName;

    public static TheoryData<string> Kinds => ["gpt2", "smollm", "llama3"];

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Theory]
    [MemberData(nameof(Kinds))]
    public void Words_are_those_of_the_published_expression(string kind)
    {
        string[] alphabet = [" ", " ", "  ", "a", "B", "é", "\u65e5", "1", "22", "\u0663", "'", "'s", "'LL", "'re", "!", "_", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u0301"];
        WordSplit split = Of(kind).Model.WordSplit;
        var random = new Random(6);
        for (int trial = 0; trial < 3000; trial++)
        {
            string text = string.Concat(Enumerable.Range(0, random.Next(1, 14)).Select(_ => alphabet[random.Next(alphabet.Length)]));
            var found = new List<string>();
            ReadOnlySpan<byte> rest = Encoding.UTF8.GetBytes(text);
            while (!rest.IsEmpty)
            {
                int length = WordSplitter.Next(split, rest);
                found.Add(Encoding.UTF8.GetString(rest[..length]));
                rest = rest[length..];
            }

            Assert.Equal(ByteLevelJson.Words[kind].Matches(text).Select(match => match.Value), found);
        }
    }

    [Theory]
    [MemberData(nameof(Kinds))]
    public void Ids_are_those_of_the_definition(string kind)
    {
        using JsonDocument json = JsonDocument.Parse(ByteLevelJson.Make(kind, Text, Merges));
        JsonElement model = json.RootElement.GetProperty("model");
        var ids = model.GetProperty("vocab").EnumerateObject().ToDictionary(pair => pair.Name, pair => pair.Value.GetInt32());
        string[] merges = [.. model.GetProperty("merges").EnumerateArray().Select(merge => merge.GetString()!)];
        var letters = ids.Where(pair => pair.Value < 256).ToDictionary(pair => (byte)pair.Value, pair => pair.Key);
        BpeTokenizer tokenizer = Of(kind);
        var random = new Random(7);
        for (int trial = 0; trial < 200; trial++)
        {
            // Surrogate pairs are one character to a tokenizer and two to the expression.
            int start = random.Next(Text.Length - 2);
            string text = Text.Substring(start, random.Next(1, Text.Length - start)).Replace("\U0001F999\U0001D400", "").Trim('\uD83E', '\uDD99', '\uD835', '\uDC00');
            List<int> expected = [];
            foreach (string word in ByteLevelJson.Words[kind].Matches(text).Select(match => match.Value))
            {
                List<string> parts = [.. Encoding.UTF8.GetBytes(word).Select(value => letters[value])];
                if (kind == "llama3" && ids.TryGetValue(string.Concat(parts), out int whole))
                {
                    expected.Add(whole);
                    continue;
                }

                foreach (string[] merge in merges.Select(merge => merge.Split(' ')))
                {
                    for (int i = 0; i + 1 < parts.Count; i++)
                    {
                        if (parts[i] == merge[0] && parts[i + 1] == merge[1])
                        {
                            parts[i] += merge[1];
                            parts.RemoveAt(i + 1);
                        }
                    }
                }

                expected.AddRange(parts.Select(part => ids[part]));
            }

            Assert.Equal(expected, Encode(tokenizer, text));
        }
    }

    [Theory]
    [MemberData(nameof(Kinds))]
    public void Any_bytes_come_back(string kind)
    {
        BpeTokenizer tokenizer = Of(kind);
        var random = new Random(8);
        for (int trial = 0; trial < 200; trial++)
        {
            byte[] bytes = new byte[random.Next(1, 60)];
            random.NextBytes(bytes);
            List<int> ids = [];
            tokenizer.EncodeUtf8(bytes, ids);
            Assert.Equal(bytes, ids.SelectMany(id => tokenizer.TokenBytes(id).ToArray()));
        }

        Assert.Equal(Text + "[SYM] ", tokenizer.Decode([.. Encode(tokenizer, Text + "[SYM] ")]));
        Assert.Equal([256 + Merges + 2], Encode(tokenizer, "[SYM]"));
        List<int> controls = [];
        tokenizer.EncodeWithControls("<|bos|>x", controls);
        Assert.Equal([256 + Merges, .. Encode(tokenizer, "x")], controls);
        Assert.Equal(kind == "llama3", tokenizer.Model.AddsBos);
        Assert.Equal(kind == "llama3" ? 256 + Merges : null, tokenizer.Bos);
    }

    [Theory]
    [MemberData(nameof(Kinds))]
    public void What_is_written_is_read_back(string kind)
    {
        BpeTokenizer tokenizer = Of(kind);
        IReadOnlyList<string> leftOut = tokenizer.Save(_folder);
        Assert.StartsWith("tokenizer.model is left out", Assert.Single(leftOut), StringComparison.Ordinal);
        BpeTokenizer read = Tokenizer.Load(_folder);
        Assert.Equal(tokenizer.Hash, read.Hash);
        Assert.Equal(tokenizer.Model.AddsBos, read.Model.AddsBos);
    }

    [Theory]
    [MemberData(nameof(Kinds))]
    public void Hugging_Faces_transformers_give_the_same_ids(string kind)
    {
        string package = NodePackages.Require("@huggingface/transformers");
        Of(kind).Save(Path.Combine(_folder, "ours"));
        string[] texts = [Text, .. Text.Split('\n'), "it's 12 o'clock", "   ", " 1 2  33", "\u0663\u0664x", "a[SYM] b"];
        string[] lines = NodePackages.Run(Path.Combine(_folder, "encode.mjs"), $$"""
            import { AutoTokenizer, env } from '{{Path.Combine(package, "dist", "transformers.node.mjs")}}';
            env.allowRemoteModels = false;
            env.localModelPath = '{{_folder}}/';
            const tokenizer = await AutoTokenizer.from_pretrained('ours', { local_files_only: true });
            for (const text of {{JsonSerializer.Serialize(texts)}}) {
                console.log(JSON.stringify(tokenizer.encode(text, { add_special_tokens: false })));
            }
            """);
        Assert.Equal(texts.Select(text => JsonSerializer.Serialize(Encode(Of(kind), text))), lines);
    }

    private static BpeTokenizer Of(string kind) =>
        new(HuggingFaceTokenizer.Read(Encoding.UTF8.GetBytes(ByteLevelJson.Make(kind, Text, Merges)), "x.json"));

    private static List<int> Encode(BpeTokenizer tokenizer, string text)
    {
        List<int> ids = [];
        tokenizer.Encode(text, ids);
        return ids;
    }
}
