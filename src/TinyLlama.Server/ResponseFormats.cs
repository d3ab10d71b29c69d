using System.Text.Json;
using TinyLlama.Data;
using TinyLlama.Inference;

namespace TinyLlama.Server;

/// <summary>The forms that replies are held to. The schemas of the last requests are kept: what was computed for one serves the next.</summary>
internal sealed class ResponseFormats
{
    private const string Key = "response_format";
    private const int MostKept = 8;

    private readonly Dictionary<string, JsonConstraint> _schemas = new(StringComparer.Ordinal);
    private readonly Queue<string> _order = new();
    private readonly Lock _lock = new();

    /// <summary>What a reply must be, or null for any text.</summary>
    /// <exception cref="ApiException">The format is unknown, or its schema says what is not supported.</exception>
    public JsonConstraint? Read(ResponseFormat? format) => format?.Type switch
    {
        null when format is null => null,
        "text" => null,
        "json_object" => JsonConstraint.AnyObject,
        "json_schema" => OfSchema(format.JsonSchema?.Schema is { ValueKind: not JsonValueKind.Null } schema
            ? schema.GetRawText()
            : throw ApiException.Invalid($"'{Key}.json_schema.schema' is missing", Key)),
        var type => throw ApiException.Invalid($"'{Key}' of the type '{type}' is not supported; it is text, json_object or json_schema", Key),
    };

    private JsonConstraint OfSchema(string schema)
    {
        lock (_lock)
        {
            if (_schemas.TryGetValue(schema, out JsonConstraint? known))
            {
                return known;
            }
        }

        JsonConstraint constraint;
        try
        {
            constraint = JsonConstraint.FromSchema(schema);
        }
        catch (UserErrorException e)
        {
            throw ApiException.Invalid(e.Message, Key);
        }

        lock (_lock)
        {
            if (_schemas.TryAdd(schema, constraint))
            {
                _order.Enqueue(schema);
            }

            if (_order.Count > MostKept)
            {
                _schemas.Remove(_order.Dequeue());
            }
        }

        return constraint;
    }
}
