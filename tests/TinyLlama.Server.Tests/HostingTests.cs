using System.Net;
using System.Net.Http.Json;
using System.Text.Json.Nodes;
using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Hosting;
using Microsoft.AspNetCore.Http;
using Microsoft.Extensions.AI;
using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Logging;
using TinyLlama.Data;

namespace TinyLlama.Server.Tests;

public sealed class HostingTests
{
    private static CancellationToken Stop => TestContext.Current.CancellationToken;

    [Fact]
    public async Task Another_host_takes_a_model_in()
    {
        WebApplicationBuilder builder = WebApplication.CreateSlimBuilder();
        builder.WebHost.UseUrls("http://127.0.0.1:0");
        builder.Logging.ClearProviders();
        builder.Services.AddTinyLlama(options => (options.Model, options.Name, options.Threads) = (TestModel.Folder, "mine", 1));
        await using WebApplication app = builder.Build();
        app.MapOpenAI();
        app.MapGet("/talk", (RequestDelegate)(async context =>
        {
            IChatClient chat = context.RequestServices.GetRequiredService<IChatClient>();
            await context.Response.WriteAsync((await chat.GetResponseAsync("hello", new ChatOptions { MaxOutputTokens = 5, Temperature = 0 }, Stop)).Text, Stop);
        }));
        await app.StartAsync(Stop);
        using var http = new HttpClient { BaseAddress = new Uri(app.Urls.Single()) };
        Assert.Equal("mine", (string)(await http.GetFromJsonAsync<JsonNode>("/v1/models", Stop))!["data"]![0]!["id"]!);
        Assert.NotEmpty(await http.GetStringAsync(new Uri("/talk", UriKind.Relative), Stop));
        Assert.Equal(HttpStatusCode.NotFound, (await http.GetAsync(new Uri("/chat.js", UriKind.Relative), Stop)).StatusCode);
    }

    [Fact]
    public void What_cannot_be_served_is_told_when_the_host_is_made()
    {
        string Refusal(Action<ServerOptions> configure)
        {
            var options = new ServerOptions { Model = TestModel.Folder };
            configure(options);
            return Assert.Throws<UserErrorException>(() => ServerHosting.Create(options, IPAddress.Loopback, 0)).Message;
        }

        Assert.Contains("no model is named", Refusal(options => options.Model = ""), StringComparison.Ordinal);
        Assert.Contains("not found", Refusal(options => options.Model = "/nowhere"), StringComparison.Ordinal);
        Assert.Contains("no chat template has this name", Refusal(options => options.ChatTemplate = "alpaca"), StringComparison.Ordinal);
        Assert.Contains("places is 0", Refusal(options => options.Places = 0), StringComparison.Ordinal);
        Assert.Contains("lookup is -1", Refusal(options => options.Lookup = -1), StringComparison.Ordinal);
        Assert.Contains("an API key is empty", Refusal(options => options.ApiKeys.Add("")), StringComparison.Ordinal);
    }
}
