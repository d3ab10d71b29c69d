using System.Text.Json;
using System.Text.Unicode;
using TinyLlama.Data;

namespace TinyLlama.Checkpoints;

/// <summary>The keys of a JSON object that a user's file holds; every complaint names the file and the key.</summary>
internal sealed class JsonKeys
{
    private const int MaximumBytes = 64 << 20;

    private readonly string _prefix;
    private readonly JsonElement _object;

    private JsonKeys(string path, string prefix, JsonElement element) => (Path, _prefix, _object) = (path, prefix, element);

    /// <summary>Gets the file.</summary>
    public string Path { get; }

    /// <summary>Gets the keys, in their order.</summary>
    /// <exception cref="UserErrorException">A key is an escaped half of a character.</exception>
    public IReadOnlyList<string> Names
    {
        get
        {
            try
            {
                return [.. _object.EnumerateObject().Select(static property => property.Name)];
            }
            catch (InvalidOperationException e)
            {
                throw new UserErrorException($"{Path}: a key under '{_prefix}' is not sound UTF-8", e);
            }
        }
    }

    /// <summary>Reads a file that holds one object.</summary>
    /// <exception cref="UserErrorException">The file cannot be read, is too long, or holds something else.</exception>
    public static JsonKeys Read(string path)
    {
        try
        {
            long length = new FileInfo(path).Length;
            if (length > MaximumBytes)
            {
                throw new UserErrorException($"{path}: {length} bytes are too many, {MaximumBytes} are read at most");
            }

            // A key that appears twice means one thing to one program and another to the next.
            var options = new JsonDocumentOptions { AllowDuplicateProperties = false };
            ReadOnlyMemory<byte> text = File.ReadAllBytes(path);
            text = text.Span.StartsWith("\uFEFF"u8) ? text[3..] : text;
            if (!Utf8.IsValid(text.Span))
            {
                throw new UserErrorException($"{path}: not sound UTF-8");
            }

            using JsonDocument document = JsonDocument.Parse(text, options);
            return document.RootElement.ValueKind == JsonValueKind.Object
                ? new JsonKeys(path, "", document.RootElement.Clone())
                : throw new UserErrorException($"{path}: holds no JSON object");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserErrorException($"{path}: cannot be read: {e.Message}", e);
        }
        catch (Exception e) when (e is JsonException or InvalidOperationException)
        {
            throw new UserErrorException($"{path}: not the JSON it must be: {e.Message}", e);
        }
    }

    /// <summary>Whether the key is there with a value other than null.</summary>
    public bool Has(string key) => _object.TryGetProperty(key, out JsonElement value) && value.ValueKind != JsonValueKind.Null;

    /// <summary>A whole number.</summary>
    /// <param name="key">The key.</param>
    /// <param name="least">The least that is allowed.</param>
    /// <param name="most">The most that is allowed.</param>
    /// <param name="absent">What its absence means; null where it must be there.</param>
    public long Integer(string key, long least, long most, long? absent = null)
    {
        JsonElement? value = Find(key);
        if (value is null)
        {
            return absent ?? throw Missing(key);
        }

        return value.Value.ValueKind == JsonValueKind.Number && value.Value.TryGetInt64(out long number) && number >= least && number <= most
            ? number
            : throw Wrong(key, value.Value, $"a whole number from {least} to {most}");
    }

    /// <summary>A finite number.</summary>
    /// <param name="key">The key.</param>
    /// <param name="least">The least that is allowed.</param>
    /// <param name="most">The most that is allowed.</param>
    /// <param name="absent">What its absence means; null where it must be there.</param>
    public float Number(string key, float least, float most, float? absent = null)
    {
        JsonElement? value = Find(key);
        if (value is null)
        {
            return absent ?? throw Missing(key);
        }

        return value.Value.ValueKind == JsonValueKind.Number && value.Value.TryGetSingle(out float number) && number >= least && number <= most
            ? number
            : throw Wrong(key, value.Value, $"a number from {least:R} to {most:R}");
    }

    /// <summary>True or false.</summary>
    public bool Boolean(string key, bool absent) => Find(key) switch
    {
        null => absent,
        { ValueKind: JsonValueKind.True } => true,
        { ValueKind: JsonValueKind.False } => false,
        { } value => throw Wrong(key, value, "true or false"),
    };

    /// <summary>Whether the key is there with a text.</summary>
    public bool IsText(string key) => Find(key) is { ValueKind: JsonValueKind.String };

    /// <summary>A text, or null where the key is absent.</summary>
    public string? Text(string key) => Find(key) switch
    {
        null => null,
        { ValueKind: JsonValueKind.String } value => Text(key, value),
        { } value => throw Wrong(key, value, "a text"),
    };

    /// <summary>An object, or null where the key is absent.</summary>
    public JsonKeys? Object(string key) => Find(key) switch
    {
        null => null,
        { ValueKind: JsonValueKind.Object } value => new JsonKeys(Path, $"{_prefix}{key}.", value),
        { } value => throw Wrong(key, value, "an object"),
    };

    /// <summary>An array of objects, or null where the key is absent or holds something else than an array.</summary>
    public IReadOnlyList<JsonKeys>? Objects(string key) => Find(key) is { ValueKind: JsonValueKind.Array } array
        ? [.. array.EnumerateArray().Select((item, i) => item.ValueKind == JsonValueKind.Object
            ? new JsonKeys(Path, $"{_prefix}{key}[{i}].", item)
            : throw Wrong($"{key}[{i}]", item, "an object"))]
        : null;

    /// <summary>An array of texts, or null where the key is absent.</summary>
    public IReadOnlyList<string>? Texts(string key) => Find(key) switch
    {
        null => null,
        { ValueKind: JsonValueKind.Array } value when value.EnumerateArray().All(item => item.ValueKind == JsonValueKind.String) =>
            [.. value.EnumerateArray().Select(item => Text(key, item))],
        { } value => throw Wrong(key, value, "a list of texts"),
    };

    /// <summary>A complaint about a key.</summary>
    public UserErrorException Error(string key, string complaint) => new($"{Path}: '{_prefix}{key}' {complaint}");

    private UserErrorException Missing(string key) => Error(key, "is missing");

    private UserErrorException Wrong(string key, JsonElement value, string needed)
    {
        string raw = value.GetRawText();
        return Error(key, $"is {(raw.Length <= 40 ? raw : raw[..40] + "…")}, {needed} is needed");
    }

    private string Text(string key, JsonElement value)
    {
        try
        {
            return value.GetString()!;
        }
        catch (InvalidOperationException e)
        {
            throw new UserErrorException($"{Path}: '{_prefix}{key}' is not sound UTF-8", e);
        }
    }

    private JsonElement? Find(string key) =>
        _object.TryGetProperty(key, out JsonElement value) && value.ValueKind != JsonValueKind.Null ? value : null;
}
