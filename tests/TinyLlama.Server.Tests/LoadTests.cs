using System.Diagnostics.Metrics;
using System.Net;
using System.Net.Sockets;
using System.Text;

namespace TinyLlama.Server.Tests;

/// <summary>Many clients, all of them rude. Alone, because memory is measured.</summary>
[Collection(nameof(LoadTests))]
[CollectionDefinition(nameof(LoadTests), DisableParallelization = true)]
public sealed class LoadTests
{
    private static readonly byte[] s_endless = Post("""{"messages":[{"role":"user","content":"x"}],"max_tokens":4000,"temperature":0,"stream":true}"""u8);

    // What a client sends, and how much of the answer it reads before it goes.
    private static readonly (byte[] Request, int Reads)[] s_ways =
    [
        (s_endless[..(s_endless.Length / 2)], 0),
        (s_endless, 0),
        (s_endless, 200),
        (Post(Encoding.UTF8.GetBytes($$"""{"messages":[{"role":"user","content":"{{new string('x', 6_000)}}"}]}""")), 50),
        (Post(new byte[20_000]), 50),
        (Post([.. "{\"messages\":[{\"role\":\"user\",\"content\":\""u8, 0xFF, 0xC0, .. "\"}]}"u8]), 50),
        (Post(Encoding.UTF8.GetBytes(new string('[', 9_000))), 50),
        ("\u0016\u0003\u0001 no HTTP\r\n\r\n"u8.ToArray(), 0),
    ];

    private static CancellationToken Stop => TestContext.Current.CancellationToken;

    [Fact]
    public async Task Clients_that_vanish_or_send_nonsense_leave_nothing_behind()
    {
        int connections = 0;
        using var listener = new MeterListener
        {
            InstrumentPublished = static (instrument, listener) =>
            {
                if (instrument.Name == "kestrel.active_connections")
                {
                    listener.EnableMeasurementEvents(instrument);
                }
            },
        };
        listener.SetMeasurementEventCallback<long>((_, change, _, _) => Interlocked.Add(ref connections, (int)change));
        listener.Start();
        await using RunningServer server = await RunningServer.StartAsync(options =>
            (options.Places, options.Queue, options.ContextLength, options.MaxBodyBytes) = (2, 1000, 4096, 10_000));

        // Pools grow in single steps, a leak with every client.
        var memory = new List<long>();
        for (int i = 0; i < 6; i++)
        {
            await StormAsync(200);
            memory.Add(GC.GetTotalMemory(forceFullCollection: true));
        }

        long[] growth = [.. memory.Zip(memory.Skip(1), static (before, after) => after - before).Order()];
        Assert.InRange(growth[growth.Length / 2], long.MinValue, 100_000);
        Assert.Equal(0, server.Model.Generator.UsedCacheBlocks);
        Assert.Contains("code=\"499\"} ", await server.Http.GetStringAsync(new Uri("/metrics", UriKind.Relative), Stop), StringComparison.Ordinal);
        (HttpStatusCode code, _) = await server.PostAsync("/v1/chat/completions", """{"messages":[{"role":"user","content":"x"}],"max_tokens":2}""");
        Assert.Equal(HttpStatusCode.OK, code);

        async Task StormAsync(int clients)
        {
            for (int i = 0; i < clients; i += 20)
            {
                await Task.WhenAll(Enumerable.Range(i, 20).Select(i => VanishAsync(server.Address.Port, s_ways[i % s_ways.Length], reset: i % 3 == 0)));
            }

            await server.UntilIdleAsync();
            while (Volatile.Read(ref connections) > 0)
            {
                await Task.Delay(5, Stop);
            }
        }
    }

    private static byte[] Post(ReadOnlySpan<byte> body) =>
    [
        .. Encoding.ASCII.GetBytes($"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {body.Length}\r\n\r\n"),
        .. body,
    ];

    private static async Task VanishAsync(int port, (byte[] Request, int Reads) way, bool reset)
    {
        using var client = new TcpClient();
        await client.ConnectAsync("127.0.0.1", port, Stop);
        client.LingerState = new LingerOption(enable: reset, seconds: 0);
        try
        {
            await client.GetStream().WriteAsync(way.Request, Stop);
            await client.GetStream().ReadExactlyAsync(new byte[way.Reads], Stop);
        }
        catch (IOException)
        {
            // The server may refuse before it has read all.
        }
    }
}
