using System.Text.Encodings.Web;
using System.Text.Json;
using TinyLlama.Data;

namespace TinyLlama.Inference;

/// <summary>From a JSON schema to a grammar. What it cannot express is refused, with the path of the key.</summary>
internal sealed class JsonSchemaCompiler
{
    private const int MostDepth = 200;

    private static readonly JsonWriterOptions s_compact = new() { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };

    private static readonly HashSet<string> s_annotations =
        ["title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id", "$comment", "$defs", "definitions"];

    private static readonly Dictionary<string, string[]> s_keysOfType = new()
    {
        ["object"] = ["properties", "required", "additionalProperties"],
        ["array"] = ["items", "minItems", "maxItems"],
        ["string"] = ["minLength", "maxLength"],
        ["integer"] = [],
        ["number"] = [],
        ["boolean"] = [],
        ["null"] = [],
    };

    private readonly JsonGrammar _grammar = new();
    private readonly JsonElement _root;
    private readonly Dictionary<string, int> _references = [];
    private readonly Dictionary<int, string> _paths = [];
    private int _depth;

    private JsonSchemaCompiler(JsonElement root) => _root = root;

    /// <summary>Compiles a schema.</summary>
    /// <exception cref="UserErrorException">It is no JSON, or it says what cannot be constrained to.</exception>
    public static JsonConstraint Compile(string schema)
    {
        try
        {
            using JsonDocument document = JsonDocument.Parse(schema, new JsonDocumentOptions { AllowDuplicateProperties = false });
            var compiler = new JsonSchemaCompiler(document.RootElement);
            int value = compiler.Reference("#", "#");
            compiler.RefuseEndlessReferences();
            return new JsonConstraint(compiler._grammar, value);
        }
        catch (JsonException e)
        {
            throw new UserErrorException($"the JSON schema is no JSON: line {e.LineNumber + 1}, byte {e.BytePositionInLine}", e);
        }
        catch (InvalidOperationException e)
        {
            throw new UserErrorException($"the JSON schema has text that is not sound Unicode: {e.Message}", e);
        }
    }

    // The rule of a schema that is referred to; made before it is built, because it may refer to itself.
    private int Reference(string reference, string path)
    {
        if (_references.TryGetValue(reference, out int rule))
        {
            return rule;
        }

        JsonElement target = _root;
        foreach (string part in reference.Split('/').Skip(1))
        {
            string key = part.Replace("~1", "/", StringComparison.Ordinal).Replace("~0", "~", StringComparison.Ordinal);
            if (target.ValueKind != JsonValueKind.Object || !target.TryGetProperty(key, out target))
            {
                throw Refused(path, $"refers to {reference}, which is not there");
            }
        }

        rule = AddRule(reference);
        _references.Add(reference, rule);
        Build(rule, target, reference);
        return rule;
    }

    private int Value(JsonElement schema, string path)
    {
        int rule = AddRule(path);
        Build(rule, schema, path);
        return rule;
    }

    private int AddRule(string path)
    {
        RequireSize(path);
        int rule = _grammar.AddRule();
        _paths.Add(rule, path);
        return rule;
    }

    private void Build(int rule, JsonElement schema, string path)
    {
        if (++_depth > MostDepth)
        {
            throw Refused(path, "references and values are nested too deeply");
        }

        BuildAlternatives(rule, schema, path);
        _depth--;
    }

    private void BuildAlternatives(int rule, JsonElement schema, string path)
    {
        if (schema.ValueKind == JsonValueKind.True)
        {
            Alternative(rule, _grammar.Any);
            return;
        }

        if (schema.ValueKind != JsonValueKind.Object)
        {
            throw Refused(path, schema.ValueKind == JsonValueKind.False ? "allows no value" : "must be an object or true");
        }

        if (schema.TryGetProperty("$ref", out JsonElement reference))
        {
            RequireKeys(schema, path, ["$ref"]);
            string target = Text(reference, $"{path}/$ref");
            if (target != "#" && !target.StartsWith("#/", StringComparison.Ordinal))
            {
                throw Refused($"{path}/$ref", "only references within the schema (#/$defs/…) are supported");
            }

            Alternative(rule, Reference(target, $"{path}/$ref"));
        }
        else if (schema.TryGetProperty("anyOf", out JsonElement anyOf))
        {
            RequireKeys(schema, path, ["anyOf"]);
            foreach ((JsonElement option, int i) in Items(anyOf, $"{path}/anyOf"))
            {
                Alternative(rule, Value(option, $"{path}/anyOf/{i}"));
            }
        }
        else if (schema.TryGetProperty("enum", out JsonElement values))
        {
            RequireKeys(schema, path, ["enum", "type"]);
            foreach ((JsonElement value, int i) in Items(values, $"{path}/enum"))
            {
                Literal(rule, Types(schema, path), value, $"{path}/enum/{i}");
            }
        }
        else if (schema.TryGetProperty("const", out JsonElement value))
        {
            RequireKeys(schema, path, ["const", "type"]);
            Literal(rule, Types(schema, path), value, $"{path}/const");
        }
        else
        {
            Typed(rule, schema, path);
        }
    }

    private void Typed(int rule, JsonElement schema, string path)
    {
        string[] types = Types(schema, path);
        RequireKeys(schema, path, ["type", .. types.SelectMany(type => s_keysOfType[type])]);
        if (types.Length == 0)
        {
            Alternative(rule, _grammar.Any);
        }

        foreach (string type in types)
        {
            switch (type)
            {
                case "object":
                    Object(rule, schema, path);
                    break;
                case "array":
                    (int least, int? most) = Bounds(schema, path, "minItems", "maxItems");
                    int item = schema.TryGetProperty("items", out JsonElement items) ? Value(items, $"{path}/items") : _grammar.Any;
                    _grammar.Repeat(rule, '[', ']', least, most, separated: true, node => _grammar.Call(node, item));
                    RequireSize($"{path}/maxItems");
                    break;
                case "string":
                    (least, most) = Bounds(schema, path, "minLength", "maxLength");
                    _grammar.Repeat(rule, '"', '"', least, most, separated: false, node => _grammar.Call(node, _grammar.Character));
                    RequireSize($"{path}/maxLength");
                    break;
                case "boolean":
                    Alternative(rule, "true"u8);
                    Alternative(rule, "false"u8);
                    break;
                case "null":
                    Alternative(rule, "null"u8);
                    break;
                default:
                    Alternative(rule, type == "integer" ? _grammar.Integer : _grammar.Number);
                    break;
            }
        }
    }

    // Properties in their order, each with the comma before it where one was written; those not required may be left out.
    private void Object(int rule, JsonElement schema, string path)
    {
        bool additional = true;
        if (schema.TryGetProperty("additionalProperties", out JsonElement allowed))
        {
            if (allowed.ValueKind is not (JsonValueKind.True or JsonValueKind.False))
            {
                throw Refused($"{path}/additionalProperties", "only true and false are supported");
            }

            additional = allowed.ValueKind == JsonValueKind.True;
        }

        HashSet<string> required = schema.TryGetProperty("required", out JsonElement names)
            ? [.. Items(names, $"{path}/required", mayBeEmpty: true).Select(name => Text(name.Item, $"{path}/required/{name.Index}"))]
            : [];
        if (!schema.TryGetProperty("properties", out JsonElement properties) && additional && required.Count == 0)
        {
            Alternative(rule, _grammar.AnyObject);
            return;
        }

        if (properties.ValueKind is not (JsonValueKind.Object or JsonValueKind.Undefined))
        {
            throw Refused($"{path}/properties", "must be an object");
        }

        int first = _grammar.Call(_grammar.Bytes(_grammar.Start(rule), "{"u8), _grammar.Whitespace);
        int? later = null;
        IEnumerable<JsonProperty> members = properties.ValueKind == JsonValueKind.Object ? properties.EnumerateObject() : [];
        foreach (JsonProperty property in members)
        {
            string memberPath = $"{path}/properties/{property.Name}";
            int member = AddRule(memberPath);
            byte[] name = Utf8(writer => writer.WriteStringValue(property.Name));
            RequireSize(memberPath, name.Length);
            int colon = _grammar.Bytes(_grammar.Start(member), name);
            int value = _grammar.Call(_grammar.Bytes(colon, ":"u8), _grammar.Whitespace);
            _grammar.Link(_grammar.Call(value, Value(property.Value, memberPath)), _grammar.End(member));

            bool optional = !required.Remove(property.Name);
            int after = _grammar.AddNode();
            _grammar.Link(_grammar.Call(first, member), after);
            if (later is int before)
            {
                _grammar.Link(_grammar.Call(_grammar.Separator(before), member), after);
                if (optional)
                {
                    _grammar.Link(before, after);
                }
            }

            later = after;
            if (!optional)
            {
                // Nobody comes here without having written a property.
                first = _grammar.AddNode();
            }
        }

        if (required.Count > 0)
        {
            throw Refused($"{path}/required", $"names {required.First()}, which is not among the properties");
        }

        int close = _grammar.AddNode();
        _grammar.Link(first, close);
        if (later is int last)
        {
            _grammar.Link(_grammar.Call(last, _grammar.Whitespace), close);
        }

        _grammar.Link(_grammar.Bytes(close, "}"u8), _grammar.End(rule));
    }

    private void Literal(int rule, string[] types, JsonElement value, string path)
    {
        string type = value.ValueKind switch
        {
            JsonValueKind.Object => "object",
            JsonValueKind.Array => "array",
            JsonValueKind.String => "string",
            JsonValueKind.Number => "number",
            JsonValueKind.Null => "null",
            _ => "boolean",
        };
        bool isInteger = type == "number" && value.TryGetDecimal(out decimal number) && number == decimal.Truncate(number);
        if (types.Length > 0 && !types.Contains(type) && !(isInteger && types.Contains("integer")))
        {
            throw Refused(path, $"is not of the type {string.Join(" or ", types)}");
        }

        byte[] literal = Utf8(value.WriteTo);
        RequireSize(path, literal.Length);
        Alternative(rule, literal);
    }

    private static string[] Types(JsonElement schema, string path)
    {
        if (!schema.TryGetProperty("type", out JsonElement type))
        {
            // Keys that only one type has say which one.
            return [.. s_keysOfType.Where(entry => entry.Value.Any(key => schema.TryGetProperty(key, out _))).Select(entry => entry.Key)];
        }

        string[] types = type.ValueKind == JsonValueKind.Array
            ? [.. Items(type, $"{path}/type").Select(item => Text(item.Item, $"{path}/type/{item.Index}")).Distinct()]
            : [Text(type, $"{path}/type")];
        foreach (string unknown in types.Where(name => !s_keysOfType.ContainsKey(name)))
        {
            throw Refused($"{path}/type", $"is {unknown}; it must be one of {string.Join(", ", s_keysOfType.Keys)}");
        }

        return types;
    }

    private static (int Least, int? Most) Bounds(JsonElement schema, string path, string leastKey, string mostKey)
    {
        int least = Count(leastKey) ?? 0;
        int? most = Count(mostKey);
        return most < least
            ? throw Refused($"{path}/{mostKey}", $"is {most}, less than {leastKey} {least}")
            : (least, most);

        int? Count(string key) => !schema.TryGetProperty(key, out JsonElement number) ? null
            : number.ValueKind == JsonValueKind.Number && number.TryGetInt32(out int count) && count >= 0 ? count
            : throw Refused($"{path}/{key}", "must be a whole number, 0 or more");
    }

    private void RequireSize(string path, int more = 0)
    {
        if (_grammar.NodeCount + more > JsonGrammar.MostNodes)
        {
            throw Refused(path, "the schema is too large; ask for fewer or shorter values");
        }
    }

    private static void RequireKeys(JsonElement schema, string path, ReadOnlySpan<string> keys)
    {
        foreach (JsonProperty property in schema.EnumerateObject())
        {
            if (!s_annotations.Contains(property.Name) && !keys.Contains(property.Name))
            {
                throw Refused($"{path}/{property.Name}", keys is ["$ref" or "anyOf"] ? $"is not supported beside {keys[0]}" : "is not supported");
            }
        }
    }

    // A rule that calls itself before it reads a byte stands for no text at all. Rules that none calls so are set aside,
    // and then those that only they called; what is left calls itself.
    private void RefuseEndlessReferences()
    {
        Dictionary<int, int> callers = _paths.Keys.SelectMany(CalledFirst).CountBy(rule => rule).ToDictionary();
        var free = new Stack<int>(_paths.Keys.Where(rule => !callers.ContainsKey(rule)));
        var endless = new SortedSet<int>(_paths.Keys);
        while (free.TryPop(out int rule))
        {
            endless.Remove(rule);
            foreach (int called in CalledFirst(rule))
            {
                if (--callers[called] == 0)
                {
                    free.Push(called);
                }
            }
        }

        foreach (int rule in endless)
        {
            throw Refused(_paths[rule], "refers to itself without a value between");
        }
    }

    private IEnumerable<int> CalledFirst(int rule) =>
        _grammar.Edges(_grammar.Start(rule)).ToArray().Where(edge => edge.Kind == JsonGrammar.EdgeKind.Call).Select(edge => edge.Rule).Where(_paths.ContainsKey);

    private void Alternative(int rule, int called) => _grammar.Link(_grammar.Call(_grammar.Start(rule), called), _grammar.End(rule));

    private void Alternative(int rule, ReadOnlySpan<byte> literal) =>
        _grammar.Link(_grammar.Bytes(_grammar.Start(rule), literal), _grammar.End(rule));

    private static IEnumerable<(JsonElement Item, int Index)> Items(JsonElement array, string path, bool mayBeEmpty = false) =>
        array.ValueKind == JsonValueKind.Array && (mayBeEmpty || array.GetArrayLength() > 0)
            ? array.EnumerateArray().Select((item, index) => (item, index))
            : throw Refused(path, mayBeEmpty ? "must be an array" : "must be an array that is not empty");

    private static string Text(JsonElement element, string path) =>
        element.ValueKind == JsonValueKind.String ? element.GetString()! : throw Refused(path, "must be a string");

    private static byte[] Utf8(Action<Utf8JsonWriter> write)
    {
        using var stream = new MemoryStream();
        using (var writer = new Utf8JsonWriter(stream, s_compact))
        {
            write(writer);
        }

        return stream.ToArray();
    }

    private static UserErrorException Refused(string path, string problem) => new($"JSON schema, {path}: {problem}");
}
