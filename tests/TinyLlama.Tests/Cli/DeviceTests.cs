using System.Diagnostics;
using System.Text.Json.Nodes;
using TinyLlama.Cli;
using TinyLlama.Compute;
using TinyLlama.Tests.Common;

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
        (int code, string output, string error) = await RunAsync([variable], "pretrain", "--recipe", s_recipe, "--plan", "--device", "cuda");
        Assert.Equal((2, ""), (code, output));
        Assert.StartsWith("error: ", error, StringComparison.Ordinal);
        Assert.Contains(why, Assert.Single(error.TrimEnd().Split('\n')), StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("cuda:1", "there is no cuda:1: this machine has 1 NVIDIA GPU, counted from 0")]
    [InlineData("cuda --set precision=fp32", "--set precision=fp32: precision is fp32, but a GPU computes in bf16; leave it out, or set device: cpu")]
    [InlineData("cuda --set packed_weights=none", "--set packed_weights=none: packed_weights is none, but a GPU multiplies by packed weights; leave it out, or set device: cpu")]
    [InlineData("cuda --set model=smoke --set model.heads=16 --set model.key_value_heads=16", "heads of 16, 32, 64 or 128 channels, and this model's have 4: use --device cpu")]
    public async Task What_a_GPU_has_not_is_refused(string words, string why)
    {
        (int code, string output, string error) = await RunAsync([], ["pretrain", "--recipe", s_recipe, "--plan", "--device", .. words.Split(' ')]);
        Assert.Equal((2, ""), (code, output));
        Assert.Contains(why, Assert.Single(error.TrimEnd().Split('\n')), StringComparison.Ordinal);
    }

    [Fact]
    public async Task Env_shows_the_GPUs_and_their_libraries()
    {
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
