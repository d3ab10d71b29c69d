using TinyLlama.Checkpoints;
using TinyLlama.Cli;
using TinyLlama.Tests.Checkpoints;

namespace TinyLlama.Tests.Cli;

/// <summary>The verbs that write files and folders: where they may, and what is there when they are stopped.</summary>
public sealed class WritingCommandTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    private string Results => _folder["results"];

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData("export", "x.gguf")]
    [InlineData("export", "x.bin")]
    [InlineData("export", "folder")]
    [InlineData("import", "run")]
    [InlineData("quantize", "x.gguf", "--type", "q8_0")]
    public async Task Stopped_it_leaves_nothing(string verb, string name, params string[] options)
    {
        using var stop = new CancellationTokenSource();
        await stop.CancelAsync();
        (int code, string error) = await RunAsync([verb, Model(), "--out", Path.Combine(Results, name), .. options], stop.Token);
        Assert.Equal((130, "stopped\n"), (code, error));
        Assert.Empty(Directory.Exists(Results) ? Directory.GetFiles(Results, "*", SearchOption.AllDirectories) : []);
    }

    [Theory]
    [InlineData("export")]
    [InlineData("quantize")]
    public async Task A_type_may_be_written_as_llama_cpp_writes_it(string verb)
    {
        string path = Path.Combine(Results, "x.gguf");
        (int code, string error) = await RunAsync([verb, Model(), "--out", path, "--type", "Q4_0"], TestContext.Current.CancellationToken);
        Assert.True(code == 0, error);
        using ModelSource written = ModelSource.Open(path, Assert.Fail);
        Assert.Equal(Compute.DType.Q4_0, written.StorageOf("model.layers.0.mlp.up_proj.weight"));
    }

    [Theory]
    [InlineData("a.safetensors: safetensors are written into a Hugging Face folder; name a folder", "export", "a.safetensors")]
    [InlineData("a.GGUF: a GGUF file is known by its ending; name it", "export", "a.GGUF")]
    [InlineData("taken: is not empty; name another folder, or replace files in it with --force", "export", "taken")]
    [InlineData("taken: is not empty; name another folder\n", "import", "taken")]
    public async Task A_place_that_will_not_do_is_refused_in_a_line(string problem, string verb, string name)
    {
        Directory.CreateDirectory(Path.Combine(Results, "taken", "something"));
        (int code, string error) = await RunAsync([verb, Model(), "--out", Path.Combine(Results, name)], TestContext.Current.CancellationToken);
        Assert.Equal(2, code);
        Assert.Contains(problem, error, StringComparison.Ordinal);
        Assert.Single(error.TrimEnd('\n').Split('\n'));
    }

    [Theory]
    [InlineData("export", "x.gguf")]
    [InlineData("export", "x.bin")]
    [InlineData("export", "folder")]
    [InlineData("import", "run")]
    [InlineData("quantize", "x.gguf", "--type", "q8_0")]
    public async Task A_folder_that_takes_no_files_is_named_before_the_work(string verb, string name, params string[] options)
    {
        Assert.SkipUnless(OperatingSystem.IsLinux(), "/proc is of Linux");
        (int code, string error) = await RunAsync([verb, Model(), "--out", $"/proc/new/{name}", .. options], TestContext.Current.CancellationToken);
        Assert.Equal(2, code);
        Assert.Matches($"^error: /proc/new/{name}: cannot be written, /proc takes no new files \\([^)]+\\); name another place\n$", error);
    }

    [Theory]
    [InlineData("tokenizer", "train", "--text", "x")]
    [InlineData("data", "prepare", "--text", "x", "--tokenizer", "bytes")]
    [InlineData("pretrain", "--recipe", "x")]
    [InlineData("quickstart")]
    public async Task A_file_in_the_place_of_a_folder_is_refused_in_a_line(params string[] words)
    {
        string file = _folder["file"];
        await File.WriteAllTextAsync(file, "", TestContext.Current.CancellationToken);
        (int code, string error) = await RunAsync([.. words, "--out", file], TestContext.Current.CancellationToken);
        Assert.Equal(2, code);
        Assert.StartsWith($"error: --out {file}: is a file; name a folder", error, StringComparison.Ordinal);
    }

    private static async Task<(int Code, string Error)> RunAsync(string[] arguments, CancellationToken stop)
    {
        using StringWriter output = new() { NewLine = "\n" };
        using StringWriter error = new() { NewLine = "\n" };
        return (await CommandLine.RunAsync(Program.CreateRoot(), arguments, output, error, stop), error.ToString());
    }

    private string Model() => SmallModel.SaveCheckpoint(_folder["model"]);
}
