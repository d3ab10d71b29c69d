using System.Diagnostics;
using System.Globalization;
using Spectre.Console;
using Spectre.Console.Rendering;

namespace TinyLlama.Cli;

/// <summary>
/// Shows how far a stage is, how fast it goes and how long it still takes: a bar on a terminal, else a line every few
/// seconds. Nothing is shown of a stage that is over at once. Writes to standard error.
/// </summary>
internal sealed class ProgressDisplay : IDisposable
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(1);
    private static readonly TimeSpan s_lineInterval = TimeSpan.FromSeconds(5);

    private readonly string _stage;
    private readonly string _unit;
    private readonly long _total;
    private readonly IAnsiConsole? _terminal;
    private readonly Stopwatch _clock = Stopwatch.StartNew();
    private readonly TaskCompletionSource _ended = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly Task _display;
    private long _done;
    private volatile string _detail = "";

    private ProgressDisplay(string stage, long total, string unit)
    {
        (_stage, _total, _unit) = (stage, total, unit);
        IAnsiConsole console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(Console.Error) });
        _terminal = !Console.IsErrorRedirected && console.Profile.Capabilities.Ansi ? console : null;
        _display = _terminal is null ? Task.Run(WriteLinesAsync) : Task.Run(() => DrawBarAsync(_terminal));
    }

    /// <summary>Begins a stage; disposing ends it.</summary>
    /// <param name="stage">What is being done, such as <c>encode</c>.</param>
    /// <param name="total">How much there is to do, 0 where that is unknown.</param>
    /// <param name="unit">What is counted: <c>bytes</c> are shown in KB, MB or GB, other units as they are.</param>
    public static ProgressDisplay Start(string stage, long total, string unit) => new(stage, total, unit);

    /// <summary>Says how much is done. Cheap; any thread may call it.</summary>
    /// <param name="done">In the unit of the total, from the beginning.</param>
    /// <param name="detail">A few words more, such as the loss.</param>
    public void Report(long done, string? detail = null)
    {
        Interlocked.Exchange(ref _done, done);
        if (detail is not null)
        {
            _detail = detail;
        }
    }

    /// <summary>Writes a line above the bar.</summary>
    public void WriteLine(string line)
    {
        if (_terminal is null)
        {
            Console.Error.WriteLine(line);
        }
        else
        {
            _terminal.Write(new Text(line + "\n"));
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _ended.TrySetResult();
        _display.GetAwaiter().GetResult();
    }

    /// <summary>One line: stage, share, rate, time left, detail.</summary>
    internal static string Describe(string stage, long done, long total, string unit, TimeSpan elapsed, string detail)
    {
        double rate = elapsed > TimeSpan.Zero ? done / elapsed.TotalSeconds : 0;
        List<string> parts = [];
        if (total > 0)
        {
            parts.Add(string.Create(CultureInfo.InvariantCulture, $"{100.0 * done / total:0} %"));
        }

        parts.Add($"{Quantity(done, unit)}");
        if (rate > 0)
        {
            parts.Add($"{Quantity(rate, unit)}/s");
            if (total > done)
            {
                parts.Add($"{Duration(TimeSpan.FromSeconds(Math.Min((total - done) / rate, 1e9)))} left");
            }
        }

        if (detail.Length > 0)
        {
            parts.Add(detail);
        }

        return $"{stage}: {string.Join(" · ", parts)}";
    }

    /// <summary>A time as people say it: <c>12 s</c>, <c>3:05</c>, <c>2:03:05</c>, <c>4 d 3 h</c>.</summary>
    internal static string Duration(TimeSpan time) => time switch
    {
        { TotalSeconds: < 60 } => $"{time.TotalSeconds:0} s",
        { TotalHours: < 1 } => $"{time.Minutes}:{time.Seconds:00}",
        { TotalDays: < 1 } => $"{time.Hours}:{time.Minutes:00}:{time.Seconds:00}",
        _ => $"{(long)time.TotalDays:N0} d {time.Hours} h",
    };

    /// <summary>A count with its unit; <c>bytes</c> in KB, MB or GB.</summary>
    internal static string Quantity(double count, string unit) => unit switch
    {
        "bytes" when count >= 1e9 => $"{count / 1e9:0.00} GB",
        "bytes" when count >= 1e6 => $"{count / 1e6:0.0} MB",
        "bytes" when count >= 1e3 => $"{count / 1e3:0.0} KB",
        _ when count is > 0 and < 10 => $"{count:0.0} {unit}",
        _ => $"{count:N0} {unit}",
    };

    private string Describe() => Describe(_stage, Interlocked.Read(ref _done), _total, _unit, _clock.Elapsed, _detail);

    private async Task WriteLinesAsync()
    {
        while (await Task.WhenAny(_ended.Task, Task.Delay(s_lineInterval)) != _ended.Task)
        {
            await Console.Error.WriteLineAsync(Describe());
        }
    }

    private async Task DrawBarAsync(IAnsiConsole terminal)
    {
        if (await Task.WhenAny(_ended.Task, Task.Delay(s_patience)) == _ended.Task)
        {
            return;
        }

        await terminal.Progress()
            .AutoClear(true)
            .Columns(new ProgressBarColumn { Width = 24 }, new DescriptionColumn(Describe))
            .StartAsync(async context =>
            {
                ProgressTask bar = context.AddTask(_stage, maxValue: Math.Max(1, _total));
                bar.IsIndeterminate = _total == 0;
                while (await Task.WhenAny(_ended.Task, Task.Delay(100)) != _ended.Task)
                {
                    bar.Value = Interlocked.Read(ref _done);
                }
            });
    }

    /// <summary>The text beside the bar.</summary>
    private sealed class DescriptionColumn(Func<string> describe) : ProgressColumn
    {
        /// <inheritdoc/>
        protected override bool NoWrap => true;

        /// <inheritdoc/>
        public override IRenderable Render(RenderOptions options, ProgressTask task, TimeSpan deltaTime) =>
            new Text(describe()) { Overflow = Overflow.Ellipsis };
    }
}
