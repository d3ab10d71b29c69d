using System.IO.Compression;
using System.Text;
using System.Text.Json.Nodes;
using TinyLlama.Cli;
using TinyLlama.Compute;
using TinyLlama.Compute.Native;
using TinyLlama.Data.Shards;

namespace TinyLlama.Tests.Cli;

public sealed class DataCommandTests : IDisposable
{
    private readonly string _folder = Directory.CreateTempSubdirectory("tinyllama-test-").FullName;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Fact]
    public async Task Mixed_files_become_shards_and_running_again_changes_nothing()
    {
        RequireZstandard();
        Write("text/a.txt", "first\n\nsecond\n"u8);
        Write("text/b/c.jsonl", "{\"body\": \"third\"}\n"u8);
        using (MemoryStream packed = new())
        {
            using (GZipStream gzip = new(packed, CompressionMode.Compress))
            {
                gzip.Write("fourth\nfifth"u8);
            }

            Write("text/d.txt.gz", packed.ToArray());
        }

        byte[] line = Encoding.UTF8.GetBytes("{\"body\": \"sixth\"}");

        // One frame of one raw block: magic, a single segment of n bytes, the block's header, the bytes.
        Write("text/e.jsonl.zst", [0x28, 0xB5, 0x2F, 0xFD, 0x20, (byte)line.Length, (byte)((line.Length << 3) | 1), 0, 0, .. line]);
        Write("text/notes.md", "no"u8);
        string[] command =
        [
            "data", "prepare", "--text", At("text"), "--tokenizer", "bytes", "--out", At("out"), "--field", "body", "--lines", "--validation-share", "0", "--threads", "2", "--json",
        ];
        (int code, string output, string error) = await Run(command);
        Assert.Equal((ExitCode.Success, ""), (code, error));
        JsonNode summary = JsonNode.Parse(output)!;
        Assert.Equal(6, (int)summary["train"]!["documents"]!);
        Assert.Equal("firstsecondthirdfourthfifthsixth".Length, (int)summary["train"]!["text_bytes"]!);
        Assert.Equal(32 + (2 * 6), (int)summary["train"]!["tokens"]!);
        Assert.Equal(1, (int)summary["files_passed_over"]!);

        Assert.Equal(output, (await Run(command)).Output);
        Assert.Equal(ExitCode.Success, (await Run("data", "verify", At("out"))).Code);
        string shard = At("out/train-00000.tokens");
        byte[] bytes = await File.ReadAllBytesAsync(shard);
        bytes[40] ^= 1;
        await File.WriteAllBytesAsync(shard, bytes);
        (code, output, _) = await Run("data", "verify", At("out"));
        Assert.Equal(ExitCode.Failure, code);
        Assert.Contains(shard, output, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("either --text", "data", "prepare", "--tokenizer", "bytes", "--out", "OUT")]
    [InlineData("missing.txt does not exist", "data", "prepare", "--text", "missing.txt", "--tokenizer", "bytes", "--out", "OUT")]
    [InlineData("nothing is left to train on", "data", "prepare", "--text", "TEXT", "--tokenizer", "bytes", "--out", "OUT", "--validation-share", "0.9999999999999")]
    [InlineData("it must be at least 0", "data", "prepare", "--text", "TEXT", "--tokenizer", "bytes", "--out", "OUT", "--validation-share", "1")]
    [InlineData("holds no token shards", "data", "verify", "TEXT")]
    public async Task A_mistake_is_one_line_and_exit_code_2(string message, params string[] command)
    {
        Write("text/a.txt", "text"u8);
        (int code, _, string error) = await Run([.. command.Select(w => w == "OUT" ? At("out") : w == "TEXT" ? At("text") : w)]);
        Assert.Equal(ExitCode.UserError, code);
        Assert.Contains(message, error, StringComparison.Ordinal);
        Assert.Single(error.TrimEnd().Split('\n'));
    }

    [Fact]
    public async Task Damaged_zstandard_is_told_by_file()
    {
        RequireZstandard();
        Write("text/a.txt.zst", "this is not Zstandard"u8);
        (int code, _, string error) = await Run("data", "prepare", "--text", At("text"), "--tokenizer", "bytes", "--out", At("out"));
        Assert.Equal(ExitCode.UserError, code);
        Assert.Contains("a.txt.zst: the Zstandard content is damaged", error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_stopped_preparation_is_left_to_be_continued()
    {
        Write("text/a.txt", "text"u8);
        using CancellationTokenSource stop = new();
        await stop.CancelAsync();
        StringWriter error = new();
        int code = await CommandLine.RunAsync(
            Program.CreateRoot(), ["data", "prepare", "--text", At("text"), "--tokenizer", "bytes", "--out", At("out")], new StringWriter(), error, stop.Token);
        Assert.Equal((ExitCode.Stopped, "stopped\n"), (code, error.ToString()));
        Assert.Equal(ExitCode.Success, (await Run("data", "prepare", "--text", At("text"), "--tokenizer", "bytes", "--out", At("out"))).Code);
        using TokenShards shards = TokenShards.Open(At("out"));
        Assert.Equal(6, shards.TokenCount(Split.Train));
    }

    private static void RequireZstandard()
    {
        try
        {
            new ZstdStream(new MemoryStream()).Dispose();
        }
        catch (DeviceException e)
        {
            Assert.Skip(e.Message);
        }
    }

    private static async Task<(int Code, string Output, string Error)> Run(params string[] command)
    {
        StringWriter output = new();
        StringWriter error = new();
        int code = await CommandLine.RunAsync(Program.CreateRoot(), command, output, error, TestContext.Current.CancellationToken);
        return (code, output.ToString(), error.ToString());
    }

    private string At(string name) => Path.Combine(_folder, name);

    private void Write(string name, ReadOnlySpan<byte> content)
    {
        Directory.CreateDirectory(Path.GetDirectoryName(At(name))!);
        File.WriteAllBytes(At(name), content);
    }
}
