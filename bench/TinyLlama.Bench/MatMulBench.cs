using System.Globalization;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;

namespace TinyLlama.Bench;

/// <summary>
/// The matrix products at the shapes of model S (2,048 tokens), of decoding, and some big ones: GFLOP/s of the best and
/// the median run, and the best's share of the multiply-add ceiling measured just before and after it.
/// </summary>
internal static class MatMulBench
{
    // Tokens, outputs, inputs. Model S: q|k|v, attention output, gate|up, down, head.
    private static readonly (string Name, int Tokens, int Outputs, int Inputs)[] s_shapes =
    [
        ("S q|k|v", 2048, 384, 256),
        ("S attention out", 2048, 256, 256),
        ("S gate|up", 2048, 1408, 256),
        ("S down", 2048, 256, 704),
        ("S head", 2048, 4096, 256),
        ("512 cubed", 512, 512, 512),
        ("2048 cubed", 2048, 2048, 2048),
        ("1.1b gate", 2048, 5632, 2048),
        ("1.1b down", 2048, 2048, 5632),
        ("prompt", 40, 2048, 2048),
        ("decode 8", 8, 2048, 2048),
        ("decode 1", 1, 2048, 2048),
        ("decode 1, S", 1, 1408, 256),
    ];

    public static int Run(string[] args)
    {
        double seconds = 0.5;
        List<int> threadCounts = [1, Environment.ProcessorCount];
        CpuPath path = CpuPaths.Choose();
        string filter = "";
        for (int i = 0; i + 1 < args.Length; i += 2)
        {
            switch (args[i])
            {
                case "--seconds":
                    seconds = double.Parse(args[i + 1], CultureInfo.InvariantCulture);
                    break;
                case "--threads":
                    threadCounts = [.. args[i + 1].Split(',').Select(int.Parse)];
                    break;
                case "--path":
                    path = Enum.Parse<CpuPath>(args[i + 1] == "scalar" ? "Scalar" : "Vector" + args[i + 1]);
                    break;
                case "--shapes":
                    filter = args[i + 1];
                    break;
                default:
                    Console.Error.WriteLine($"no option {args[i]}");
                    return 2;
            }
        }

        foreach (int threads in threadCounts)
        {
            using CpuBackend backend = CpuBackend.Create(threads, path);
            CpuCeiling ceiling = CpuCeiling.Measure(backend);
            double peak = ceiling.AllThreads;
            Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"\n{backend.Description}: ceiling {peak:F1} GFLOP/s, memory read {ceiling.AllThreadsRead:F1} GB/s"));
            Console.WriteLine("GFLOP/s best (median), share of the ceiling   forward              packing each time    dInput               dWeight");
            foreach ((string name, int tokens, int outputs, int inputs) in s_shapes)
            {
                if (name.Contains(filter, StringComparison.Ordinal))
                {
                    Console.WriteLine(Line(backend, name, tokens, outputs, inputs, seconds));
                }
            }
        }

        return 0;
    }

    private static string Line(CpuBackend backend, string name, int tokens, int outputs, int inputs, double seconds)
    {
        long floats = (2L * tokens * (outputs + inputs)) + (5L * (outputs + 32) * (inputs + 32)) + 1024;
        using Arena arena = backend.Allocate("bench", floats * sizeof(float));
        Tensor input = Filled(arena, tokens, inputs, 1);
        Tensor output = arena.Take(tokens, outputs);
        Tensor dOutput = Filled(arena, tokens, outputs, 2);
        Tensor dInput = arena.Take(tokens, inputs);
        Weight bare = new(Filled(arena, outputs, inputs, 3));
        Weight weight = new(bare.Values, arena.Take(outputs, inputs));
        weight.TakePacked(arena, backend, backward: true);
        backend.Pack(weight);
        double operations = 2.0 * tokens * outputs * inputs * 1e-9;
        string Cell(Action action)
        {
            double before = CpuCeiling.Measure(backend).AllThreads;
            (double best, double median) = Timing.Of(seconds, action);
            double peak = Math.Max(before, CpuCeiling.Measure(backend).AllThreads);
            return string.Create(
                CultureInfo.InvariantCulture, $"{operations / best,6:F1} ({operations / median,5:F1}) {operations / best / peak,4:P0}  ");
        }

        return $"{name,-16} {tokens,5} x {outputs,5} x {inputs,5}         "
            + Cell(() => backend.MatMul(output, input, weight))
            + Cell(() => backend.MatMul(output, input, bare))
            + Cell(() => backend.MatMulBackwardInput(dInput, dOutput, weight))
            + Cell(() => backend.MatMulBackwardWeight(weight.Gradient, dOutput, input));
    }

    private static Tensor Filled(Arena arena, int rows, int columns, int seed)
    {
        Random random = new(seed);
        Tensor tensor = arena.Take(rows, columns);
        foreach (ref float value in tensor.HostSpan<float>())
        {
            value = random.NextSingle() - 0.5f;
        }

        return tensor;
    }
}
