using System.Diagnostics;
using System.Security.Cryptography;
using TinyLlama.Tests.Common;
using TinyLlama.Training;

namespace TinyLlama.Tests.Cli;

/// <summary>
/// The whole pipeline as a user runs it, process by process, on generated text. Explicit: `.ci/run` asks for it, because
/// it takes about a minute.
/// </summary>
public sealed class SmokeTests : IDisposable
{
    /// <summary>The validation loss at the end of recipes/smoke.yaml on this text, in nats per token.</summary>
    private const double ExpectedLoss = 1.792;

    private readonly string _folder = Directory.CreateTempSubdirectory("tinyllama-smoke-").FullName;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Fact(Explicit = true)]
    public async Task From_text_to_text_the_loss_is_the_recorded_one_and_the_bits_are_the_same_twice()
    {
        string text = Path.Combine(_folder, "text");
        string tokenizer = Path.Combine(_folder, "tokenizer");
        string data = Path.Combine(_folder, "data");
        WriteText(text);
        await Tinyllama("tokenizer", "train", "--text", text, "--vocab-size", "512", "--out", tokenizer);
        await Tinyllama("data", "prepare", "--text", text, "--tokenizer", tokenizer, "--validation-share", "0.05", "--out", data);

        string first = await Train("first", data, threads: 2);
        string second = await Train("second", data, threads: 1);
        Assert.Equal(HashOfWeights(first), HashOfWeights(second));

        double loss = MetricsLog.Read(Path.Combine(first, MetricsLog.FileName)).OfType<ValidationMetrics>().Last().Loss;
        TestContext.Current.TestOutputHelper?.WriteLine($"validation loss {loss}");
        Assert.Equal(ExpectedLoss, loss, 0.02);

        await Tinyllama("runs", "verify", first);
        await Tinyllama("eval", first, "--tasks", "perplexity", "--data", data, "--json");
        string story = await Tinyllama("generate", first, "-p", "The river", "--max-tokens", "20", "--temperature", "0");
        Assert.True(story.Length > 20, story);
    }

    private async Task<string> Train(string name, string data, int threads)
    {
        string run = Path.Combine(_folder, name);
        string recipe = Path.Combine(Checkout.Root, "recipes", "smoke.yaml");
        await Tinyllama("pretrain", "--recipe", recipe, "--set", $"data.path={data}", "--threads", $"{threads}", "--out", run);
        return run;
    }

    private static void WriteText(string folder)
    {
        Directory.CreateDirectory(folder);
        var source = new SeededText(2026);
        for (int i = 0; i < 1500; i++)
        {
            File.WriteAllText(Path.Combine(folder, $"{i:0000}.txt"), source.Document());
        }
    }

    private static string HashOfWeights(string run)
    {
        string newest = Directory.GetFiles(run, "model.safetensors", SearchOption.AllDirectories).Order(StringComparer.Ordinal).Last();
        return Convert.ToHexStringLower(SHA256.HashData(File.ReadAllBytes(newest)));
    }

    /// <summary>Runs a verb to its end and returns what it wrote to standard output.</summary>
    private static async Task<string> Tinyllama(params string[] words)
    {
        var start = new ProcessStartInfo("dotnet", [Path.Combine(AppContext.BaseDirectory, "TinyLlama.Cli.dll"), .. words])
        {
            UseShellExecute = false,
            RedirectStandardError = true,
            RedirectStandardOutput = true,
        };
        using Process process = Process.Start(start)!;
        Task<string> error = process.StandardError.ReadToEndAsync();
        string output = await process.StandardOutput.ReadToEndAsync();
        await process.WaitForExitAsync();
        Assert.True(process.ExitCode == 0, $"tinyllama {string.Join(' ', words)} ended with {process.ExitCode}: {await error}");
        return output;
    }
}
