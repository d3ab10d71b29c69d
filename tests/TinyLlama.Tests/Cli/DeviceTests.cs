using System.Diagnostics;
using System.Text.Json.Nodes;
using TinyLlama.Cli;
using TinyLlama.Compute;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Tests.Common;
using TinyLlama.Tests.Training;
using TinyLlama.Training;

namespace TinyLlama.Tests.Cli;

/// <summary>What the command says of GPUs: those that are there, those that are not, and those that fail. Each in a process of its own, which looks for NVIDIA's libraries once.</summary>
public sealed class DeviceTests
{
    private static readonly string s_recipe = Path.Combine(Checkout.Root, "recipes", "tinyllama-1.1b.yaml");

    private static CancellationToken Stop => TestContext.Current.CancellationToken;

    [Theory]
    [InlineData("cpu", DeviceKind.Cpu, 0)]
    [InlineData("auto", DeviceKind.Auto, 0)]
    [InlineData("cuda", DeviceKind.Cuda, 0)]
    [InlineData("cuda:3", DeviceKind.Cuda, 3)]
    public void A_device_is_its_name(string name, DeviceKind kind, int ordinal)
    {
        Assert.True(Device.TryParse(name, out Device device));
        Assert.Equal(new Device(kind, ordinal), device);
        Assert.Equal(name, device.ToString());
    }

    [Theory]
    [InlineData("")]
    [InlineData("CPU")]
    [InlineData("cuda:")]
    [InlineData("cuda:-1")]
    [InlineData("cuda:1x")]
    [InlineData("cpu:0")]
    public void Any_other_name_is_none(string name) => Assert.False(Device.TryParse(name, out _));

    [Theory]
    [InlineData("TINYLLAMA_CUDA_DRIVER=/nowhere.so", "there is no NVIDIA driver (libcuda.so.1) on this machine; install it, or use --device cpu")]
    [InlineData("TINYLLAMA_CUDA_VERSION=11080", "the NVIDIA driver is for CUDA 11.8 and CUDA 12 is needed: install a newer driver, or use --device cpu")]
    [InlineData("TINYLLAMA_NVRTC=/nowhere.so", "install the CUDA toolkit or name the files in TINYLLAMA_NVRTC and TINYLLAMA_CUBLASLT, or use --device cpu")]
    [InlineData("TINYLLAMA_CUDA_FAIL=cuInit 0 100", "the NVIDIA driver finds no GPU on this machine; use --device cpu")]
    [InlineData("TINYLLAMA_CUDA_FAIL=cuInit 0 999", "the NVIDIA driver could not begin (CUDA_ERROR_UNKNOWN): see what nvidia-smi says, or use --device cpu")]
    [InlineData("TINYLLAMA_CUDA_CAPABILITY=75", "CUDA emulator, sm_75, 4.0 GiB has tensor cores that know no bf16: compute capability 8.0 (Ampere, 2020) or newer is needed; use --device cpu")]
    [InlineData("TINYLLAMA_CUDA_FAIL=cuModuleLoadData 0 209", "as NVRTC 0.0 compiled it (CUDA_ERROR_NO_BINARY_FOR_GPU): install a newer driver, or use --device cpu")]
    public async Task A_GPU_that_cannot_be_used_is_one_line_that_says_why(string variable, string why)
    {
        CudaEmulator.RequireEmulated();
        (int code, string output, string error) = await RunAsync([variable], "pretrain", "--recipe", s_recipe, "--plan", "--device", "cuda");
        Assert.Equal((2, ""), (code, output));
        Assert.StartsWith("error: ", error, StringComparison.Ordinal);
        Assert.Contains(why, Assert.Single(error.TrimEnd().Split('\n')), StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("cuda:1", "there is no cuda:1: this machine has 1 NVIDIA GPU, counted from 0")]
    [InlineData("cuda --set precision=fp32", "--set precision=fp32: precision is fp32, but a GPU computes in bf16; leave it out, or set device: cpu")]
    [InlineData("cuda --set model=smoke --set model.heads=16 --set model.key_value_heads=16", "heads of 16, 32, … 128 channels, and this model's have 4: use --device cpu")]
    public async Task What_a_GPU_has_not_is_refused(string words, string why)
    {
        CudaEmulator.RequireEmulated();
        (int code, string output, string error) = await RunAsync([], ["pretrain", "--recipe", s_recipe, "--plan", "--device", .. words.Split(' ')]);
        Assert.Equal((2, ""), (code, output));
        Assert.Contains(why, Assert.Single(error.TrimEnd().Split('\n')), StringComparison.Ordinal);
    }

    [Fact]
    public async Task Auto_is_the_CPU_where_no_GPU_can_be_used_and_the_GPU_where_one_can()
    {
        CudaEmulator.RequireEmulated();
        foreach ((string variable, string device) in ((string, string)[])[("TINYLLAMA_CUDA_CAPABILITY=75", "cpu, "), ("TINYLLAMA_CUDA_CAPABILITY=80", "cuda:0, ")])
        {
            (int code, string output, string error) = await RunAsync([variable], "pretrain", "--recipe", Path.Combine(Checkout.Root, "recipes", "quickstart.yaml"), "--plan", "--device", "auto", "--json");
            Assert.Equal((0, ""), (code, error));
            Assert.StartsWith(device, JsonNode.Parse(output)!["device"]!.GetValue<string>(), StringComparison.Ordinal);
        }

        // A plan says what it is for; a text would not.
        using var folder = new TemporaryFolder();
        ModelConfig config = new() { VocabularySize = 320, ContextLength = 64, Layers = 1, Heads = 1, KeyValueHeads = 1, Channels = 16, Hidden = 16 };
        string run = SmallModel.Save(folder["run"], config, SmallModel.Tokenizer(320));
        (int generated, _, string said) = await RunAsync(["TINYLLAMA_CUDA_CAPABILITY=75"], "generate", run, "-p", "the", "--max-tokens", "2", "--device", "auto");
        Assert.Equal(0, generated);
        Assert.StartsWith("warning: no GPU can be used, so the CPU computes; 'tinyllama env' says why\n", said, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_run_that_does_not_fit_is_refused_before_it_begins_with_numbers_and_a_remedy()
    {
        CudaEmulator.RequireEmulated();
        (int code, _, string error) = await RunAsync(["TINYLLAMA_CUDA_MEMORY=520000000"], "pretrain", "--recipe", s_recipe, "--plan", "--device", "cuda", "--set", "model=quickstart");
        Assert.Equal(2, code);
        Assert.Matches(@"^error: the run needs \d+\.\d\d GiB \(weights .*\), but the device has \d\.\d\d GiB; try .*batch\.micro_sequences \d+, which takes \d\.\d\d GiB$", error.TrimEnd());
    }

    [Fact]
    public async Task A_plan_is_for_any_card()
    {
        async Task<JsonNode> PlanAsync(string memory, string recompute, int code)
        {
            (int actual, string output, _) = await RunAsync([], "pretrain", "--recipe", s_recipe, "--plan", "--json", "--device-memory", memory, "--set", $"recompute={recompute}");
            Assert.Equal(code, actual);
            return JsonNode.Parse(output)!;
        }

        // TinyLlama's own cards and micro-batch: 16,384 tokens.
        JsonNode large = await PlanAsync("40536MiB", "elementwise", 0);
        Assert.Equal(16_384, large["context"]!.GetValue<int>() * large["sequences_per_micro_batch"]!.GetValue<int>());
        Assert.InRange(large["memory_bytes"]!.GetValue<long>() / (double)(1L << 30), 33, 33.5);

        JsonNode small = await PlanAsync("24564MiB", "none", 2);
        Assert.Equal(
            ["none 1", "elementwise 2", "blocks 8"],
            small["largest_micro_batches"]!.AsArray().Select(choice => $"{choice!["recompute"]} {choice["sequences"]}"));
        Assert.All(small["largest_micro_batches"]!.AsArray(), choice => Assert.True(choice!["memory_bytes"]!.GetValue<long>() <= small["available_bytes"]!.GetValue<long>()));
    }

    [Theory]
    [InlineData("--device-memory 40GiB", "error: --device-memory is for --plan")]
    [InlineData("--plan --device cpu --device-memory 40GiB", "error: --device-memory is of a GPU, and --device is cpu; leave one of them out")]
    [InlineData("--plan --device-memory 40", "error: --device-memory 40 is no size; write one such as 24564MiB, 40GiB or 80GB")]
    public async Task A_plan_for_no_card_is_refused(string words, string line)
    {
        (int code, string output, string error) = await RunAsync([], ["pretrain", "--recipe", s_recipe, .. words.Split(' ')]);
        Assert.Equal((2, ""), (code, output));
        Assert.StartsWith(line, Assert.Single(error.TrimEnd().Split('\n')), StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_run_moves_between_devices_and_survives_a_GPU_that_fails()
    {
        CudaEmulator.RequireEmulated();
        using var folder = new TemporaryFolder();
        string[] pretrain = ["pretrain", "--recipe", TinyRun.Prepare(folder, steps: 40), "--out", folder["run"], "--set", "batch.global_tokens=128", "--set", "batch.micro_sequences=1"];

        // 20 steps on the CPU, then on a GPU that fails after some steps: each replays the graph of its micro-batches.
        Assert.Equal(0, (await RunAsync([], [.. pretrain, "--max-steps", "20"])).Code);
        (int code, _, string error) = await RunAsync(["TINYLLAMA_CUDA_FAIL=cuGraphLaunch 15 719"], [.. pretrain, "--device", "cuda"]);
        Assert.Equal(2, code);
        Assert.Matches(@"error: step \d\d: cuda:0 \(CUDA emulator\): a graph of operations: CUDA_ERROR_LAUNCH_FAILED; the checkpoint of step 20 is whole: the same command goes on from there$", error.TrimEnd());
        Assert.Contains("the run goes on with 'cuda CUDA emulator, sm_90", error, StringComparison.Ordinal);

        // Another GPU goes on from there, and the CPU from its checkpoint. The loss falls all the way.
        Assert.Equal(0, (await RunAsync([], [.. pretrain, "--device", "cuda", "--max-steps", "30"])).Code);
        Assert.Equal(0, (await RunAsync([], [.. pretrain, "--device", "cpu"])).Code);
        StepMetrics[] steps = [.. MetricsLog.Read(Path.Combine(folder["run"], MetricsLog.FileName)).OfType<StepMetrics>()];
        Assert.Equal(Enumerable.Range(0, 40).Select(step => (long)step), steps.Select(step => step.Step));
        double Mean(int first) => steps[first..(first + 10)].Average(step => step.Loss);
        Assert.True(Mean(0) > Mean(10) && Mean(10) > Mean(20) && Mean(20) > Mean(30), string.Join(' ', steps.Select(step => step.Loss)));
    }

    [Theory]
    [InlineData("f16")]
    [InlineData("q8_0")]
    [InlineData("q4_0")]
    [InlineData("q4_k_m")]
    public async Task A_model_from_files_says_the_same_on_both_devices(string type)
    {
        using var folder = new TemporaryFolder();
        BpeTokenizer tokenizer = SmallModel.Tokenizer(320);
        ModelConfig config = new()
        {
            VocabularySize = 320,
            ContextLength = 64,
            Layers = 2,
            Heads = 4,
            KeyValueHeads = 2,
            Channels = 256,
            Hidden = 256,
        };
        string run = SmallModel.Save(folder["run"], config, tokenizer);
        string file = folder["model.gguf"];
        Assert.Equal(0, (await RunAsync([], "export", run, "--format", "gguf", "--type", type, "--out", file)).Code);
        File.WriteAllText(folder["text.txt"], new SeededText(4).Document());
        List<double> losses = [];
        foreach (string device in (string[])["cpu", "cuda"])
        {
            (int code, string output, string error) = await RunAsync([], "eval", file, "--text", folder["text.txt"], "--max-tokens", "100", "--device", device, "--json");
            Assert.Equal((0, ""), (code, error));
            losses.Add(JsonNode.Parse(output)!["loss"]!.GetValue<double>());
            (code, output, _) = await RunAsync([], "generate", file, "-p", "the", "--max-tokens", "10", "--temperature", "0", "--device", device);
            Assert.Equal(0, code);
            Assert.StartsWith("the", output, StringComparison.Ordinal);
        }

        // The CPU rounds activations to 8 bits for quantized weights, the GPU to bfloat16.
        Assert.Equal(losses[0], losses[1], 0.005 * losses[0]);
    }

    [Theory]
    [InlineData("cpu", "bf16", "error: the CPU keeps keys and values in F32, F16 or Q8_0, not in BF16: choose another cache type")]
    [InlineData("cuda", "f16", "error: a GPU keeps keys and values in BF16 or Q8_0, not in F16: choose another cache type")]
    public async Task A_cache_type_that_a_device_has_not_is_refused(string device, string type, string line)
    {
        using var folder = new TemporaryFolder();
        ModelConfig config = new() { VocabularySize = 320, ContextLength = 64, Layers = 1, Heads = 1, KeyValueHeads = 1, Channels = 16, Hidden = 16 };
        string run = SmallModel.Save(folder["run"], config, SmallModel.Tokenizer(320));
        (int code, _, string error) = await RunAsync([], "generate", run, "-p", "the", "--cache-type", type, "--device", device);
        Assert.Equal((2, line), (code, error.TrimEnd()));
    }

    [Fact]
    public async Task Env_shows_the_GPUs_and_their_libraries()
    {
        CudaEmulator.RequireEmulated();
        (int code, string output, _) = await RunAsync(["TINYLLAMA_CUDA_CAPABILITY=86"], "env", "--json");
        Assert.Equal(0, code);
        JsonNode env = JsonNode.Parse(output)!;
        Assert.Null(env["cuda_fault"]);
        Assert.Equal(8.6, env["gpus"]!.AsArray().Single()!["compute_capability"]!.GetValue<double>());
        Assert.Equal(3, env["cuda_libraries"]!.AsArray().Count);

        (code, output, _) = await RunAsync(["TINYLLAMA_CUDA_DRIVER=/nowhere.so"], "env");
        Assert.Equal(0, code);
        Assert.Contains("there is no NVIDIA driver", output, StringComparison.Ordinal);
    }

    private static async Task<(int Code, string Output, string Error)> RunAsync(string[] variables, params string[] arguments)
    {
        CudaEmulator.Require();
        var start = new ProcessStartInfo("dotnet", [typeof(CommandLine).Assembly.Location, .. arguments])
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            UseShellExecute = false,
        };
        foreach (string variable in variables)
        {
            int equals = variable.IndexOf('=', StringComparison.Ordinal);
            start.Environment[variable[..equals]] = variable[(equals + 1)..];
        }

        using Process process = Process.Start(start)!;
        Task<string> error = process.StandardError.ReadToEndAsync(Stop);
        string output = await process.StandardOutput.ReadToEndAsync(Stop);
        await process.WaitForExitAsync(Stop);
        return (process.ExitCode, output, await error);
    }
}
