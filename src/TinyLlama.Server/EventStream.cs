using System.Buffers;
using System.Text.Json;
using System.Text.Json.Serialization.Metadata;
using Microsoft.AspNetCore.Http;

namespace TinyLlama.Server;

/// <summary>A reply as server-sent events, each a line of JSON, sent at once.</summary>
internal sealed class EventStream : IDisposable
{
    private readonly HttpResponse _response;
    private readonly Utf8JsonWriter _json;
    private readonly SemaphoreSlim _turn = new(1);

    /// <summary>Begins the reply.</summary>
    public EventStream(HttpResponse response)
    {
        _response = response;
        response.ContentType = "text/event-stream";
        response.Headers.CacheControl = "no-store";
        response.Headers["X-Accel-Buffering"] = "no";
        _json = new Utf8JsonWriter(response.BodyWriter);
    }

    /// <summary>Sends an event; several may be sent at once, they wait for each other and for a slow reader.</summary>
    public async Task SendAsync<T>(T value, JsonTypeInfo<T> type, CancellationToken stop)
    {
        await _turn.WaitAsync(stop);
        try
        {
            _response.BodyWriter.Write("data: "u8);
            _json.Reset();
            JsonSerializer.Serialize(_json, value, type);
            _response.BodyWriter.Write("\n\n"u8);
            await _response.BodyWriter.FlushAsync(stop);
        }
        finally
        {
            _turn.Release();
        }
    }

    /// <summary>Sends the last event.</summary>
    public async Task EndAsync(CancellationToken stop)
    {
        _response.BodyWriter.Write("data: [DONE]\n\n"u8);
        await _response.BodyWriter.FlushAsync(stop);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _json.Dispose();
        _turn.Dispose();
    }
}
