using System.Collections.Concurrent;
using System.Globalization;
using System.Text;
using TinyLlama.Inference;

namespace TinyLlama.Server;

/// <summary>What the server counts, in the text format of Prometheus.</summary>
internal sealed class ServerMetrics : IDisposable
{
    private const int RateSeconds = 10;

    private static readonly double[] s_bounds = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60];

    private readonly BatchGenerator _generator;
    private readonly ConcurrentDictionary<(string Route, int Status), long> _requests = new();
    private readonly long[] _firstTokens = new long[s_bounds.Length + 1];
    private readonly Queue<long> _newTokens = new();
    private readonly Lock _lock = new();
    private readonly Timer _timer;
    private double _firstTokenSeconds;

    /// <summary>Begins to count.</summary>
    public ServerMetrics(ServedModel model)
    {
        _generator = model.Generator;
        _timer = new Timer(_ => Sample(), null, TimeSpan.Zero, TimeSpan.FromSeconds(1));
    }

    /// <summary>Counts a request that was answered.</summary>
    public void CountRequest(string route, int status) => _requests.AddOrUpdate((route, status), 1, static (_, count) => count + 1);

    /// <summary>Counts a reply that has begun, by the time since its submission.</summary>
    public void ObserveFirstToken(TimeSpan time)
    {
        int bucket = Array.FindIndex(s_bounds, bound => time.TotalSeconds <= bound);
        lock (_lock)
        {
            _firstTokens[bucket < 0 ? s_bounds.Length : bucket]++;
            _firstTokenSeconds += time.TotalSeconds;
        }
    }

    /// <summary>All values, in the text format of Prometheus.</summary>
    public string Write()
    {
        var text = new StringBuilder();
        Begin(text, "tinyllama_requests_total", "counter", "Requests answered, by route and HTTP status.");
        foreach (((string route, int status), long count) in _requests.OrderBy(static pair => pair.Key))
        {
            Add(text, $"tinyllama_requests_total{{route=\"{route}\",code=\"{status}\"}}", count);
        }

        One(text, "tinyllama_requests_running", "gauge", "Replies that are being computed.", _generator.Running);
        One(text, "tinyllama_requests_waiting", "gauge", "Replies that wait for a place.", _generator.Waiting);
        One(text, "tinyllama_prompt_tokens_total", "counter", "Prompt tokens computed.", _generator.PromptTokens);
        One(text, "tinyllama_generated_tokens_total", "counter", "Tokens generated.", _generator.NewTokens);
        One(text, "tinyllama_cached_prompt_tokens_total", "counter", "Prompt tokens whose keys and values were in the cache already.", _generator.CachedPromptTokens);
        One(text, "tinyllama_preemptions_total", "counter", "Replies that lost their place because the cache was full, and began again.", _generator.Preemptions);
        One(text, "tinyllama_proposed_tokens_total", "counter", "Tokens tried because they had followed before.", _generator.ProposedTokens);
        One(text, "tinyllama_accepted_tokens_total", "counter", "Tokens tried that came.", _generator.AcceptedTokens);
        One(text, "tinyllama_cache_usage_ratio", "gauge", "Share of the key-value cache that running replies hold.", _generator.UsedCacheBlocks / (double)_generator.CacheBlocks);
        lock (_lock)
        {
            double rate = _newTokens.Count < 2 ? 0 : (_newTokens.Last() - _newTokens.Peek()) / (_newTokens.Count - 1.0);
            One(text, "tinyllama_generated_tokens_per_second", "gauge", $"Tokens generated a second, over the last {RateSeconds} seconds.", rate);
            Histogram(text);
        }

        return text.ToString();
    }

    /// <inheritdoc/>
    public void Dispose() => _timer.Dispose();

    private static void Begin(StringBuilder text, string name, string type, string help) =>
        text.Append(CultureInfo.InvariantCulture, $"# HELP {name} {help}\n# TYPE {name} {type}\n");

    private static void Add(StringBuilder text, string name, double value) =>
        text.Append(CultureInfo.InvariantCulture, $"{name} {value}\n");

    private static void One(StringBuilder text, string name, string type, string help, double value)
    {
        Begin(text, name, type, help);
        Add(text, name, value);
    }

    private void Histogram(StringBuilder text)
    {
        const string Name = "tinyllama_time_to_first_token_seconds";
        Begin(text, Name, "histogram", "Time from a request's submission to its first token.");
        long count = 0;
        for (int i = 0; i < _firstTokens.Length; i++)
        {
            count += _firstTokens[i];
            string bound = i < s_bounds.Length ? s_bounds[i].ToString(CultureInfo.InvariantCulture) : "+Inf";
            Add(text, $"{Name}_bucket{{le=\"{bound}\"}}", count);
        }

        Add(text, $"{Name}_sum", _firstTokenSeconds);
        Add(text, $"{Name}_count", count);
    }

    private void Sample()
    {
        lock (_lock)
        {
            _newTokens.Enqueue(_generator.NewTokens);
            if (_newTokens.Count > RateSeconds + 1)
            {
                _newTokens.Dequeue();
            }
        }
    }
}
