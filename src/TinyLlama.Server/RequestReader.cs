using System.Text.Json;
using System.Text.Json.Serialization.Metadata;
using Microsoft.AspNetCore.Http;

namespace TinyLlama.Server;

/// <summary>Reads the bodies of requests; every mistake is told with the key where it is.</summary>
internal static class RequestReader
{
    /// <summary>The body as a request.</summary>
    /// <param name="request">The HTTP request.</param>
    /// <param name="type">What the body must be.</param>
    /// <param name="mostBytes">The most bytes that a body may have.</param>
    /// <exception cref="ApiException">It is too large, no JSON, or a value is of the wrong type.</exception>
    public static async Task<T> ReadAsync<T>(HttpRequest request, JsonTypeInfo<T> type, long mostBytes)
    {
        // A web page of another origin can send other types than this one without being allowed to.
        if (!request.HasJsonContentType())
        {
            throw ApiException.Invalid("the body must be JSON: send 'Content-Type: application/json'");
        }

        try
        {
            return await JsonSerializer.DeserializeAsync(request.Body, type, request.HttpContext.RequestAborted)
                ?? throw ApiException.Invalid("the body is null, a JSON object is needed");
        }
        catch (JsonException e)
        {
            string? key = e.Path is { Length: > 2 } path && path.StartsWith("$.", StringComparison.Ordinal) ? path[2..] : null;
            throw key is null || e.InnerException is JsonException
                ? ApiException.Invalid($"the body is no JSON object that can be read: line {e.LineNumber + 1}, byte {e.BytePositionInLine}")
                : ApiException.Invalid($"'{key}' is of the wrong type", key);
        }
        catch (BadHttpRequestException e) when (e.StatusCode == StatusCodes.Status413PayloadTooLarge)
        {
            throw ApiException.TooLarge(mostBytes);
        }
    }

    /// <summary>A string, or an array of strings; empty where it is absent.</summary>
    public static IReadOnlyList<string> Strings(JsonElement? value, string key) => value switch
    {
        null or { ValueKind: JsonValueKind.Null } => [],
        { ValueKind: JsonValueKind.String } text => [Text(text, key)],
        { ValueKind: JsonValueKind.Array } list => [.. list.EnumerateArray().Select(item => item.ValueKind == JsonValueKind.String
            ? Text(item, key)
            : throw ApiException.Invalid($"'{key}' must be a string or an array of strings", key))],
        _ => throw ApiException.Invalid($"'{key}' must be a string or an array of strings", key),
    };

    /// <summary>The text of a JSON string.</summary>
    public static string Text(JsonElement value, string key)
    {
        try
        {
            return value.GetString()!;
        }
        catch (InvalidOperationException)
        {
            throw ApiException.Invalid($"'{key}' is not sound Unicode", key);
        }
    }
}
