using System.Text;
using System.Text.Json;
using System.Text.RegularExpressions;

namespace TinyLlama.Tests.Common;

/// <summary>Makes a small <c>tokenizer.json</c> with byte-level BPE, as GPT-2, SmolLM and Llama 3 have it.</summary>
internal static class ByteLevelJson
{
    /// <summary>The words of each kind, by the published expressions.</summary>
    public static readonly IReadOnlyDictionary<string, Regex> Words = new Dictionary<string, Regex>
    {
        ["gpt2"] = Expression(@"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
        ["smollm"] = Expression(@"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"),
        ["llama3"] = Expression(Llama3),
    };

    private const string Llama3 =
        @"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    /// <summary>The content of a file whose merges are the most frequent pairs of a text.</summary>
    /// <param name="kind">A key of <see cref="Words"/>.</param>
    /// <param name="text">The text.</param>
    /// <param name="merges">How many merges.</param>
    public static string Make(string kind, string text, int merges)
    {
        List<List<string>> words = [.. Words[kind].Matches(text).Select(match => Encoding.UTF8.GetBytes(match.Value).Select(Letter).ToList())];
        List<string> vocabulary = [.. Enumerable.Range(0, 256).Select(value => Letter((byte)value))];
        var list = new List<string>();
        while (list.Count < merges)
        {
            (string left, string right) = words.SelectMany(word => word.Zip(word.Skip(1))).CountBy(pair => pair)
                .OrderByDescending(pair => pair.Value).ThenBy(pair => pair.Key.First + " " + pair.Key.Second, StringComparer.Ordinal).First().Key;
            list.Add($"{left} {right}");
            vocabulary.Add(left + right);
            foreach (List<string> word in words)
            {
                for (int i = 0; i + 1 < word.Count; i++)
                {
                    if (word[i] == left && word[i + 1] == right)
                    {
                        word[i] = left + right;
                        word.RemoveAt(i + 1);
                    }
                }
            }
        }

        string[] added = ["<|bos|>", "<|eos|>", "[SYM]"];
        var byteLevel = new { type = "ByteLevel", add_prefix_space = false, trim_offsets = true, use_regex = kind != "llama3" };
        object[] steps = kind switch
        {
            "smollm" => [new { type = "Digits", individual_digits = true }, byteLevel],
            "llama3" => [new { type = "Split", pattern = new { Regex = Llama3 }, behavior = "Isolated", invert = false }, byteLevel],
            _ => [byteLevel],
        };
        object[] single = [new { SpecialToken = new { id = "<|bos|>", type_id = 0 } }, new { Sequence = new { id = "A", type_id = 0 } }];
        object template = new
        {
            type = "TemplateProcessing",
            single,
            pair = single,
            special_tokens = new Dictionary<string, object> { ["<|bos|>"] = new { id = "<|bos|>", ids = new[] { vocabulary.Count }, tokens = new[] { "<|bos|>" } } },
        };
        return JsonSerializer.Serialize(new
        {
            version = "1.0",
            added_tokens = added.Select((content, i) => new
            {
                id = vocabulary.Count + i,
                content,
                single_word = false,
                lstrip = false,
                rstrip = false,
                normalized = false,
                special = i < 2,
            }),
            normalizer = (object?)null,
            pre_tokenizer = new { type = "Sequence", pretokenizers = steps },
            post_processor = kind == "llama3" ? new { type = "Sequence", processors = new[] { byteLevel, template } } : (object)byteLevel,
            decoder = byteLevel,
            model = new
            {
                type = "BPE",
                unk_token = (string?)null,
                fuse_unk = false,
                byte_fallback = false,
                ignore_merges = kind == "llama3",
                vocab = vocabulary.Select((piece, id) => (piece, id)).ToDictionary(pair => pair.piece, pair => pair.id),
                merges = list,
            },
        });
    }

    // bytes_to_unicode of GPT-2.
    private static string Letter(byte value)
    {
        List<int> printing = [.. Enumerable.Range('!', '~' - '!' + 1), .. Enumerable.Range(0xA1, 0xAC - 0xA1 + 1), .. Enumerable.Range(0xAE, 0xFF - 0xAE + 1)];
        return ((char)(printing.Contains(value) ? value : 256 + Enumerable.Range(0, value).Count(other => !printing.Contains(other)))).ToString();
    }

    private static Regex Expression(string pattern) => new(pattern, RegexOptions.CultureInvariant, TimeSpan.FromSeconds(10));
}
