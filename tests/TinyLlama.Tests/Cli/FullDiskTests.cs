using System.Diagnostics;
using TinyLlama.Tests.Checkpoints;

namespace TinyLlama.Tests.Cli;

/// <summary>Writing where files cannot grow beyond a size, which the system answers as it does where the disk is full.</summary>
public sealed class FullDiskTests : IDisposable
{
    // Less than the weights here, more than a tokenizer.
    private const int LimitKilobytes = 64;

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData("export", "x.gguf")]
    [InlineData("export", "folder")]
    [InlineData("import", "run")]
    [InlineData("quantize", "x.gguf", "--type", "q8_0")]
    public void Nothing_half_written_is_left(string verb, string name, params string[] options)
    {
        const string Shell = "/bin/bash";
        Assert.SkipUnless(OperatingSystem.IsLinux() && File.Exists(Shell), "needs Linux and bash, which limits the size of files");
        string model = SmallModel.SaveCheckpoint(_folder["model"]);
        string results = Directory.CreateDirectory(_folder["results"]).FullName;
        (int code, string error) = Run(
            [Shell, "-c", $"trap '' XFSZ; ulimit -f {LimitKilobytes}; exec \"$0\" \"$@\"", "dotnet"], [verb, model, "--out", Path.Combine(results, name), .. options]);
        Assert.Equal(2, code);
        Assert.Single(error.TrimEnd().Split('\n'), line => line.StartsWith("error: ", StringComparison.Ordinal));
        Assert.DoesNotContain("   at ", error, StringComparison.Ordinal);
        Assert.Empty(Directory.GetFiles(results, "*", SearchOption.AllDirectories));

        (code, error) = Run(["dotnet"], [verb, model, "--out", Path.Combine(results, name), .. options]);
        Assert.True(code == 0, error);
    }

    private static (int Code, string Error) Run(string[] program, string[] arguments)
    {
        var start = new ProcessStartInfo(program[0], [.. program[1..], Path.Combine(AppContext.BaseDirectory, "TinyLlama.Cli.dll"), .. arguments])
        {
            UseShellExecute = false,
            RedirectStandardError = true,
            RedirectStandardOutput = true,
        };

        // Else the runtime keeps its own code in a file in memory, which the limit holds for too.
        start.Environment["DOTNET_EnableWriteXorExecute"] = "0";
        using Process process = Process.Start(start)!;
        Task<string> output = process.StandardOutput.ReadToEndAsync();
        string error = process.StandardError.ReadToEnd();
        process.WaitForExit();
        output.Wait();
        return (process.ExitCode, error);
    }
}
