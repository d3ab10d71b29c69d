using System.Reflection;
using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Http;
using Microsoft.AspNetCore.Routing;

namespace TinyLlama.Server;

/// <summary>The chat page: HTML, CSS and JavaScript modules in this assembly, which need nothing from elsewhere.</summary>
public static class ChatPage
{
    // Nothing but the page's own files and the API of its own server.
    private const string Policy =
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

    private static readonly (string Name, string Type)[] s_files =
    [
        ("index.html", "text/html; charset=utf-8"),
        ("chat.css", "text/css; charset=utf-8"),
        ("chat.js", "text/javascript; charset=utf-8"),
        ("api.js", "text/javascript; charset=utf-8"),
        ("store.js", "text/javascript; charset=utf-8"),
        ("view.js", "text/javascript; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
    ];

    /// <summary>Maps the page to <c>/</c> and its files beside it; it talks to what <see cref="ServerHosting.MapOpenAI"/> maps.</summary>
    public static void MapChatPage(this IEndpointRouteBuilder endpoints)
    {
        ArgumentNullException.ThrowIfNull(endpoints);
        foreach ((string name, string type) in s_files)
        {
            byte[] content = Read(name);
            endpoints.MapMethods(
                name == "index.html" ? "/" : "/" + name, [HttpMethods.Get, HttpMethods.Head], (RequestDelegate)(context => WriteAsync(context.Response, content, type)));
        }
    }

    private static async Task WriteAsync(HttpResponse response, byte[] content, string type)
    {
        response.ContentType = type;
        response.ContentLength = content.Length;
        response.Headers.ContentSecurityPolicy = Policy;
        response.Headers.XContentTypeOptions = "nosniff";
        response.Headers.CacheControl = "no-cache";
        await response.Body.WriteAsync(content);
    }

    private static byte[] Read(string name)
    {
        using Stream stream = Assembly.GetExecutingAssembly().GetManifestResourceStream(name)!;
        byte[] content = new byte[stream.Length];
        stream.ReadExactly(content);
        return content;
    }
}
