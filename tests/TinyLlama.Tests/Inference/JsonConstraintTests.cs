using System.Runtime.CompilerServices;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using System.Text.Unicode;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;

namespace TinyLlama.Tests.Inference;

public sealed class JsonConstraintTests
{
    private static readonly ByteTokenizer s_bytes = new();
    private static readonly string[] s_names = ["a", "b\"", "ü c", "d"];

    public static TheoryData<string, string> LargeSchemas => new()
    {
        { $"{{\"enum\":[{string.Join(',', Enumerable.Range(0, 20_000))}]}}", "the schema is too large" },
        { $"{{\"const\":\"{new string('x', 60_000)}\"}}", "#/const: the schema is too large" },
        { $"{{\"properties\":{{\"{new string('x', 60_000)}\":true}}}}", "the schema is too large" },
    };

    [Theory]
    [InlineData("""{"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"string"}},"required":["a"],"additionalProperties":false}""",
        """{"a":1}|{"a":-20,"b":"x"}| {"a": 0, "b": ""}""", """{}|{"b":"x"}|{"a":1.5}|{"a":1,"c":2}|{"a":01}|{"a":1,}|[1]""")]
    [InlineData("""{"type":"object","properties":{"a":true,"b":true,"c":true},"required":["b"]}""",
        """{"b":1}|{"a":1,"b":2}|{"b":1,"c":[]}|{"a":{"x":null},"b":2,"c":3}""", """{"a":1}|{"a":1,"c":2}|{,"b":1}|{"b":1"c":2}""")]
    [InlineData("""{"type":"object","properties":{"a":true,"b":true}}""", """{}|{"a":1}|{"b":1}|{"a":1,"b":1}""", """{"a":1,}|{"b":1,"a":1}""")]
    [InlineData("""{"enum":["red","gr\"een",3,null,{"x":[1]}]}""", """3|"red"|"gr\"een"|null|{"x":[1]}""", """4|"blue"|"re"|{"x":[2]}""")]
    [InlineData("""{"const":"é"}""", "\"é\"", "\"e\"|\"\"")]
    [InlineData("""{"type":"array","items":{"type":"boolean"},"minItems":1,"maxItems":3}""",
        "[true]|[ false,true]|[true,true,true]", "[]|[true,true,true,true]|[null]|[true,]")]
    [InlineData("""{"type":"array","minItems":2}""", "[1,2]|[1,[],{},\"\"]", "[1]|[]")]
    [InlineData("""{"type":"array","maxItems":0}""", "[]|[ ]", "[1]")]
    [InlineData("""{"type":"string","minLength":2,"maxLength":3}""", """ "ab"|"éü😀"|"\u00e9\n\""|"\ud83d\ude00a" """, """ab|"a"|"abcd"|"\ud83dx"|"\ud83d\ude00" """)]
    [InlineData("""{"anyOf":[{"type":"integer"},{"type":"null"},{"type":"array","items":{"$ref":"#"}}]}""", "1|null|[]|[1,[null,[2]]]", "1.5|[true]|{}")]
    [InlineData("""{"type":["number","boolean"]}""", "1.5|-0.25e-10|1E+5|true|0", "null|.5|1.|00|1e|+1|--1")]
    [InlineData("""{"$ref":"#/$defs/a~1b","$defs":{"a/b":{"type":"object","properties":{"next":{"$ref":"#/$defs/a~1b"}}}}}""",
        """{}|{"next":{"next":{}}}""", """{"next":1}""")]
    [InlineData("{}", """null|[1,{"a":[]}]|"x"|{"a":{"b":[true,false]}}""", "nul|{a:1}|[1 2]|{\"a\"}")]
    public void A_schema_takes_what_is_valid_and_nothing_else(string schema, string valid, string invalid)
    {
        JsonConstraint constraint = JsonConstraint.FromSchema(schema);
        Assert.All(valid.Split('|'), text => Assert.True(Takes(constraint, text.Trim()), text));
        Assert.All(invalid.Split('|'), text => Assert.False(Takes(constraint, text.Trim()), text));
    }

    [Theory]
    [InlineData("""{"type":"string","pattern":"a"}""", "#/pattern: is not supported")]
    [InlineData("""{"type":"object","properties":{"a":{"type":"number","minimum":1}}}""", "#/properties/a/minimum: is not supported")]
    [InlineData("""{"type":"object","additionalProperties":{"type":"string"}}""", "#/additionalProperties: only true and false")]
    [InlineData("""{"type":"object","required":["x"]}""", "#/required: names x")]
    [InlineData("""{"oneOf":[{}]}""", "#/oneOf: is not supported")]
    [InlineData("""{"anyOf":[{"type":"text"}]}""", "#/anyOf/0/type: is text")]
    [InlineData("""{"anyOf":[],"x":1}""", "#/x: is not supported beside anyOf")]
    [InlineData("""{"anyOf":[]}""", "#/anyOf: must be an array that is not empty")]
    [InlineData("""{"$ref":"#/$defs/a"}""", "#/$ref: refers to #/$defs/a, which is not there")]
    [InlineData("""{"$ref":"https://example.com"}""", "#/$ref: only references within")]
    [InlineData("""{"$ref":"#"}""", "#: refers to itself")]
    [InlineData("""{"anyOf":[{"type":"null"},{"$ref":"#/$defs/a"}],"$defs":{"a":{"anyOf":[{"$ref":"#"}]}}}""", "refers to itself")]
    [InlineData("""{"type":"array","minItems":3,"maxItems":2}""", "#/maxItems: is 2, less than minItems 3")]
    [InlineData("""{"type":"string","maxLength":-1}""", "#/maxLength: must be a whole number")]
    [InlineData("""{"type":"string","maxLength":1000000000}""", "#/maxLength: the schema is too large")]
    [MemberData(nameof(LargeSchemas))]
    [InlineData("""{"type":"integer","enum":[1,"a"]}""", "#/enum/1: is not of the type integer")]
    [InlineData("false", "#: allows no value")]
    [InlineData("[]", "#: must be an object")]
    [InlineData("{", "is no JSON")]
    [InlineData("""{"const":"\ud800"}""", "not sound Unicode")]
    public void What_is_not_supported_is_refused_by_its_path(string schema, string problem)
    {
        var error = Assert.Throws<UserErrorException>(() => JsonConstraint.FromSchema(schema));
        Assert.Contains(problem, error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Strings_are_well_formed_UTF8()
    {
        JsonConstraint constraint = JsonConstraint.FromSchema("""{"type":"string"}""");
        var random = new Random(1);
        foreach (int first in Enumerable.Range(0x80, 0x80))
        {
            for (int round = 0; round < 200; round++)
            {
                byte[] bytes = [(byte)first, (byte)random.Next(0x70, 0x100), .. Enumerable.Range(0, random.Next(3)).Select(_ => (byte)random.Next(0x80, 0xC0))];
                Assert.Equal(Utf8.IsValid(bytes), After(constraint, [(byte)'"', .. bytes, (byte)'"']).IsComplete);
            }
        }

        Assert.All(Enumerable.Range(0, 0x20), control => Assert.False(Takes(constraint, $"\"{(char)control}\"")));
    }

    [Fact]
    public void A_long_chain_of_references_is_refused_and_not_followed()
    {
        string defs = string.Join(',', Enumerable.Range(0, 10_000).Select(i => $"\"{i}\":{{\"$ref\":\"#/$defs/{i + 1}\"}}"));
        var error = Assert.Throws<UserErrorException>(() => JsonConstraint.FromSchema($"{{\"$ref\":\"#/$defs/0\",\"$defs\":{{{defs}}}}}"));
        Assert.Contains("nested too deeply", error.Message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    [InlineData(4)]
    public void Random_logits_under_random_schemas_give_valid_json(int seed)
    {
        var random = new Random(seed);
        for (int round = 0; round < 50; round++)
        {
            JsonObject schema = RandomSchema(random, depth: 0);
            var tokenizer = new WordTokenizer(random);
            string text = Generate(JsonConstraint.FromSchema(schema.ToJsonString()), tokenizer, random);
            JsonNode? value = JsonNode.Parse(text);
            Assert.True(IsValid(value, schema), $"{text} is not of {schema.ToJsonString()}");
        }
    }

    [Fact]
    public void Any_object_is_one()
    {
        var random = new Random(5);
        for (int round = 0; round < 20; round++)
        {
            string text = Generate(JsonConstraint.AnyObject, new WordTokenizer(random), random);
            using JsonDocument document = JsonDocument.Parse(text);
            Assert.Equal(JsonValueKind.Object, document.RootElement.ValueKind);
        }
    }

    [Fact]
    public void States_that_no_text_is_in_are_forgotten()
    {
        var masks = new TokenMasks(JsonConstraint.AnyObject, new SortedVocabulary(s_bytes));
        WeakReference first = Enter(0);
        for (int nesting = 1; nesting < 1 << 11; nesting++)
        {
            Enter(nesting);
        }

        GC.Collect();
        Assert.False(first.IsAlive);

        // Twelve arrays and objects in each other: another state for each of their orders.
        [MethodImpl(MethodImplOptions.NoInlining)]
        WeakReference Enter(int nesting)
        {
            IEnumerable<string> levels = Enumerable.Range(0, 11).Select(level => (nesting >> level & 1) == 0 ? "[" : "{\"\":");
            ConstraintState state = masks.Advance(masks.Start, Encoding.UTF8.GetBytes("{\"\":" + string.Concat(levels)));
            Assert.NotEqual(ConstraintState.Dead, state);
            return new WeakReference(state);
        }
    }

    [Fact]
    public void Masks_have_exactly_the_tokens_whose_bytes_may_follow()
    {
        var tokenizer = new WordTokenizer(new Random(3), words: 3000);
        var constraint = JsonConstraint.FromSchema(
            """{"type":"array","items":{"type":"object","properties":{"name":{"type":"string","maxLength":10},"n":{"type":"number"}}},"maxItems":2}""");
        var masks = new TokenMasks(constraint, new SortedVocabulary(tokenizer));
        string text = "[{\"name\": \"a \\\\é\", \"n\": 12.5},\n  {\"n\": -1e9 }]";
        for (int length = 0; length <= Encoding.UTF8.GetByteCount(text); length++)
        {
            byte[] begun = Encoding.UTF8.GetBytes(text)[..length];
            ConstraintState state = masks.Advance(masks.Start, begun);
            float[] logits = new float[tokenizer.VocabularySize];
            masks.Apply(logits, state, [257]);
            for (int id = 0; id < logits.Length; id++)
            {
                byte[] bytes = tokenizer.TokenBytes(id).ToArray();
                bool follows = bytes.Length > 0 ? After(constraint, [.. begun, .. bytes]) != ConstraintState.Dead : id == 257 && state.IsComplete;
                Assert.True(follows == (logits[id] == 0), $"token {id} after {length} bytes");
            }

            if (state.IsFinal)
            {
                return;
            }
        }

        Assert.Fail("the text is whole");
    }

    private static ConstraintState After(JsonConstraint constraint, byte[] text)
    {
        var automaton = new ConstraintAutomaton(constraint.Grammar, constraint.Root);
        return text.Aggregate(automaton.Start, automaton.Advance);
    }

    private static bool Takes(JsonConstraint constraint, string text) => After(constraint, Encoding.UTF8.GetBytes(text)).IsComplete;

    // Draws tokens as a model would; those that end strings, arrays and objects come often enough that the text ends.
    private static string Generate(JsonConstraint constraint, ITokenizer tokenizer, Random random)
    {
        var options = new GenerationOptions { Seed = (ulong)random.Next(), Json = constraint };
        var masks = new TokenMasks(constraint, new SortedVocabulary(tokenizer));
        var state = new GenerationState(tokenizer, [tokenizer.Bos!.Value], options, 5000, masks);
        var text = new StringBuilder();
        float[] logits = new float[tokenizer.VocabularySize];
        while (state.Finish == FinishReason.None)
        {
            for (int id = 0; id < logits.Length; id++)
            {
                logits[id] = (float)(4 * random.NextDouble()) + (tokenizer.TokenBytes(id).Span is [(byte)'"' or (byte)']' or (byte)'}'] ? 7 : 0);
            }

            logits[tokenizer.Eos!.Value] = 9;
            text.Append(state.Accept(logits).Text);
        }

        Assert.Equal(FinishReason.EndOfText, state.Finish);
        return text.ToString();
    }

    private static JsonObject RandomSchema(Random random, int depth)
    {
        switch (random.Next(depth < 3 ? 9 : 6))
        {
            case 0:
                return new JsonObject { ["type"] = "integer" };
            case 1:
                return new JsonObject { ["type"] = "number" };
            case 2:
                return new JsonObject { ["type"] = "boolean" };
            case 3:
                int least = random.Next(4);
                return new JsonObject { ["type"] = "string", ["minLength"] = least, ["maxLength"] = least + random.Next(5) };
            case 4:
                return new JsonObject { ["enum"] = new JsonArray("a", "é\"\\\n", 12, null, new JsonObject { ["x"] = 1 }) };
            case 5:
                return new JsonObject { ["type"] = "null", ["description"] = "nothing" };
            case 6:
                least = random.Next(3);
                return new JsonObject
                {
                    ["type"] = "array",
                    ["items"] = RandomSchema(random, depth + 1),
                    ["minItems"] = least,
                    ["maxItems"] = least + random.Next(3),
                };
            case 7:
                return new JsonObject { ["anyOf"] = new JsonArray(RandomSchema(random, depth + 1), RandomSchema(random, depth + 1)) };
            default:
                var properties = new JsonObject();
                var required = new JsonArray();
                foreach (string name in s_names.Take(random.Next(5)))
                {
                    properties[name] = RandomSchema(random, depth + 1);
                    if (random.Next(2) == 0)
                    {
                        required.Add(name);
                    }
                }

                return new JsonObject { ["type"] = "object", ["properties"] = properties, ["required"] = required, ["additionalProperties"] = false };
        }
    }

    // The schemas of RandomSchema, checked on their own.
    private static bool IsValid(JsonNode? value, JsonObject schema)
    {
        if (schema["anyOf"] is JsonArray any)
        {
            return any.Any(option => IsValid(value, option!.AsObject()));
        }

        if (schema["enum"] is JsonArray values)
        {
            return values.Any(one => JsonNode.DeepEquals(one, value));
        }

        switch ((string)schema["type"]!)
        {
            case "integer":
                return value?.GetValueKind() == JsonValueKind.Number && value.AsValue().TryGetValue(out long _);
            case "number":
                return value?.GetValueKind() == JsonValueKind.Number && double.IsFinite(value.AsValue().GetValue<double>());
            case "boolean":
                return value?.GetValueKind() is JsonValueKind.True or JsonValueKind.False;
            case "null":
                return value is null;
            case "string":
                int length = value?.GetValueKind() == JsonValueKind.String ? ((string)value!).EnumerateRunes().Count() : -1;
                return length >= (int)schema["minLength"]! && length <= (int)schema["maxLength"]!;
            case "array":
                return value is JsonArray array && array.Count >= (int)schema["minItems"]! && array.Count <= (int)schema["maxItems"]!
                    && array.All(item => IsValid(item, schema["items"]!.AsObject()));
            default:
                return value is JsonObject o
                    && o.All(member => schema["properties"]![member.Key] is JsonObject of && IsValid(member.Value, of))
                    && schema["required"]!.AsArray().All(name => o.ContainsKey((string)name!));
        }
    }

    /// <summary>Tokens for single bytes, BOS, EOS, and random runs of what JSON is made of.</summary>
    private sealed class WordTokenizer : ITokenizer
    {
        private readonly byte[][] _tokens;

        public WordTokenizer(Random random, int words = 300)
        {
            string[] parts = ["{", "}", "[", "]", "\"", ":", ", ", "true", "null", "1", "0.5", "-", "e", "a", "é", "😀", "\\", "\\u00", "\n  ", " "];
            _tokens = [
                .. Enumerable.Range(0, 256).Select(b => new[] { (byte)b }), [], [],
                .. Enumerable.Range(0, words).Select(_ => Encoding.UTF8.GetBytes(string.Concat(
                    Enumerable.Range(0, random.Next(1, 5)).Select(_ => parts[random.Next(parts.Length)])))),
            ];
        }

        public int VocabularySize => _tokens.Length;

        public int? Bos => 256;

        public int? Eos => 257;

        public string Hash => "words";

        public void Encode(ReadOnlySpan<char> text, List<int> tokens) => s_bytes.Encode(text, tokens);

        public string Decode(ReadOnlySpan<int> tokens) => throw new NotSupportedException();

        public ReadOnlyMemory<byte> TokenBytes(int token) => _tokens[token];

        public ReadOnlyMemory<byte> FirstTokenBytes(int token) => _tokens[token];
    }
}
