using System.Net;
using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Hosting;
using Microsoft.AspNetCore.Http;
using Microsoft.AspNetCore.Routing;
using Microsoft.Extensions.AI;
using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Hosting;
using Microsoft.Extensions.Logging;

namespace TinyLlama.Server;

/// <summary>Puts a model into a host, or makes a host of its own.</summary>
public static class ServerHosting
{
    /// <summary>Adds a model, also as an <see cref="IChatClient"/>. It is loaded when the endpoints are mapped, or the client is asked for.</summary>
    /// <param name="services">The host's services.</param>
    /// <param name="configure">Says what is served and how; at least <see cref="ServerOptions.Model"/>.</param>
    public static IServiceCollection AddTinyLlama(this IServiceCollection services, Action<ServerOptions> configure)
    {
        ArgumentNullException.ThrowIfNull(configure);
        var options = new ServerOptions();
        configure(options);
        return Add(services, options);
    }

    /// <summary>
    /// Maps <c>/v1/models</c>, <c>/v1/chat/completions</c>, <c>/v1/completions</c> and <c>/v1/embeddings</c> of OpenAI's API,
    /// <c>/tokenize</c>, <c>/detokenize</c>, <c>/health</c> and <c>/metrics</c>.
    /// </summary>
    /// <exception cref="TinyLlama.Data.UserErrorException">The model of <see cref="AddTinyLlama"/> cannot be loaded.</exception>
    public static IEndpointConventionBuilder MapOpenAI(this IEndpointRouteBuilder endpoints)
    {
        ArgumentNullException.ThrowIfNull(endpoints);
        OpenAiApi api = endpoints.ServiceProvider.GetRequiredService<OpenAiApi>();
        RouteGroupBuilder group = endpoints.MapGroup("");
        Get("/v1/models", api.ModelsAsync);
        Get("/v1/models/{**id}", api.ModelAsync);
        Post("/v1/chat/completions", api.ChatAsync);
        Post("/v1/completions", api.CompleteAsync);
        Post("/v1/embeddings", api.EmbedAsync);
        Post("/tokenize", api.TokenizeAsync);
        Post("/detokenize", api.DetokenizeAsync);
        Get("/health", api.HealthAsync, open: true);
        Get("/metrics", api.MetricsAsync);
        return group;

        void Get(string route, RequestDelegate handler, bool open = false) => group.Map(route, api.Guard(route, handler, open, HttpMethods.Get));
        void Post(string route, RequestDelegate handler) => group.Map(route, api.Guard(route, handler, method: HttpMethods.Post));
    }

    /// <summary>Makes a host that serves a model and the chat page, and nothing else.</summary>
    /// <param name="options">What is served and how.</param>
    /// <param name="address">Where it listens.</param>
    /// <param name="port">The port; 0 for any that is free.</param>
    /// <exception cref="TinyLlama.Data.UserErrorException">An option is out of range, or the model cannot be loaded.</exception>
    public static WebApplication Create(ServerOptions options, IPAddress address, int port)
    {
        ArgumentNullException.ThrowIfNull(options);
        WebApplicationBuilder builder = WebApplication.CreateSlimBuilder();
        builder.WebHost.ConfigureKestrel(kestrel =>
        {
            kestrel.Listen(address, port);
            kestrel.AddServerHeader = false;
        });
        builder.Logging.SetMinimumLevel(LogLevel.Warning);

        // Who starts the host is told by an exception why it does not.
        builder.Logging.AddFilter("Microsoft.Extensions.Hosting.Internal.Host", LogLevel.None);
        builder.Logging.AddSimpleConsole();
        builder.Services.Configure<Microsoft.Extensions.Logging.Console.ConsoleLoggerOptions>(console => console.LogToStandardErrorThreshold = LogLevel.Trace);
        builder.Services.Configure<HostOptions>(host => host.ShutdownTimeout = options.Timeout);
        builder.Services.AddSingleton<IHostLifetime, CallerLifetime>();
        builder.Services.AddCors();
        Add(builder.Services, options);
        WebApplication app = builder.Build();
        if (options.CorsOrigins.Count > 0)
        {
            app.UseCors(policy => policy.WithOrigins([.. options.CorsOrigins]).AllowAnyHeader().AllowAnyMethod());
        }

        if (IPAddress.IsLoopback(address))
        {
            app.Use(RequireLocalHost);
        }

        app.MapOpenAI();
        app.MapChatPage();
        app.MapFallback("{**path}", app.Services.GetRequiredService<OpenAiApi>().Guard("", OpenAiApi.NothingAsync, open: true));
        return app;
    }

    private static IServiceCollection Add(IServiceCollection services, ServerOptions options) =>
        services.AddSingleton(options)
            .AddSingleton<ServedModel>()
            .AddSingleton<IChatClient>(static provider => provider.GetRequiredService<ServedModel>().CreateClient())
            .AddSingleton<ServerMetrics>()
            .AddSingleton<ApiKeys>()
            .AddSingleton<OpenAiApi>();

    // A name that an attacker's page made point here is not one of these.
    private static Task RequireLocalHost(HttpContext context, RequestDelegate next)
    {
        string host = context.Request.Host.Host;
        return host is "localhost" || (IPAddress.TryParse(host.Trim('[', ']'), out IPAddress? address) && IPAddress.IsLoopback(address))
            ? next(context)
            : ApiException.Invalid($"this server is for its own machine; '{host}' is no name of it").WriteAsync(context.Response);
    }

    /// <summary>Who started the host ends it: it listens to no signals of its own.</summary>
    private sealed class CallerLifetime : IHostLifetime
    {
        public Task WaitForStartAsync(CancellationToken cancellationToken) => Task.CompletedTask;

        public Task StopAsync(CancellationToken cancellationToken) => Task.CompletedTask;
    }
}
