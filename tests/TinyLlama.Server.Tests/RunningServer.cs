using System.ClientModel;
using System.ClientModel.Primitives;
using System.Net;
using System.Net.Http.Json;
using System.Text;
using System.Text.Json.Nodes;
using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Hosting.Server;
using Microsoft.AspNetCore.Hosting.Server.Features;
using Microsoft.Extensions.DependencyInjection;
using OpenAI;

namespace TinyLlama.Server.Tests;

/// <summary>A server on a free port of this machine.</summary>
internal sealed class RunningServer : IAsyncDisposable
{
    private RunningServer(WebApplication app, Uri address)
    {
        (App, Address, Http) = (app, address, new HttpClient { BaseAddress = address });
        Model = app.Services.GetRequiredService<ServedModel>();
    }

    public WebApplication App { get; }

    public Uri Address { get; }

    public HttpClient Http { get; }

    public ServedModel Model { get; }

    public static async Task<RunningServer> StartAsync(Action<ServerOptions>? configure = null)
    {
        var options = new ServerOptions { Model = TestModel.Folder, Threads = 1, Places = 4, ChatTemplate = "zephyr" };
        configure?.Invoke(options);
        WebApplication app = ServerHosting.Create(options, IPAddress.Loopback, 0);
        await app.StartAsync(TestContext.Current.CancellationToken);
        string address = app.Services.GetRequiredService<IServer>().Features.Get<IServerAddressesFeature>()!.Addresses.Single();
        return new RunningServer(app, new Uri(address));
    }

    /// <summary>OpenAI's own client, without its retries.</summary>
    public OpenAIClient Client(string key = "none") => new(
        new ApiKeyCredential(key),
        new OpenAIClientOptions { Endpoint = new Uri(Address, "/v1"), RetryPolicy = new ClientRetryPolicy(maxRetries: 0) });

    public async Task<(HttpStatusCode Status, JsonNode Body)> PostAsync(string route, string json)
    {
        using var content = new StringContent(json, Encoding.UTF8, "application/json");
        using HttpResponseMessage response = await Http.PostAsync(new Uri(route, UriKind.Relative), content, TestContext.Current.CancellationToken);
        return (response.StatusCode, (await response.Content.ReadFromJsonAsync<JsonNode>(TestContext.Current.CancellationToken))!);
    }

    /// <summary>Waits until nothing runs or waits any more.</summary>
    public async Task UntilIdleAsync()
    {
        while (Model.Generator.Waiting + Model.Generator.Running > 0)
        {
            await Task.Delay(5, TestContext.Current.CancellationToken);
        }
    }

    public async ValueTask DisposeAsync()
    {
        Http.Dispose();
        await App.DisposeAsync();
    }
}
