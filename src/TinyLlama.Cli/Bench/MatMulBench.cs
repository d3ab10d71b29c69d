using TinyLlama.Compute;

namespace TinyLlama.Cli.Bench;

/// <summary>The matrix products of a model at its micro-batch, of decoding, and square ones, by which libraries are compared.</summary>
internal static class MatMulBench
{
    /// <summary>Measures each product forward, from packed and from unpacked weights, and in both directions of the backward.</summary>
    public static void Run(OperationBench bench, BenchModel model)
    {
        foreach ((string name, int outputs, int inputs) in model.Products)
        {
            Measure(bench, name, model.Tokens, outputs, inputs);
        }

        (string wide, int rows, int columns) = model.Products.First(product => product.Name == "gate|up");
        foreach (int tokens in (ReadOnlySpan<int>)[1, 8, 40])
        {
            Measure(bench, $"{wide} of {tokens}", tokens, rows, columns);
        }

        foreach (int size in (ReadOnlySpan<int>)[512, 2048])
        {
            Measure(bench, "square", size, size, size);
        }
    }

    private static void Measure(OperationBench bench, string name, int tokens, int outputs, int inputs)
    {
        Arena plan = Arena.Plan("bench");
        _ = Calls(bench.Timed, plan, name, tokens, outputs, inputs);
        using Arena arena = bench.Timed.AllocateAs(plan);
        foreach ((string call, Action run) in Calls(bench.Timed, arena, name, tokens, outputs, inputs))
        {
            bench.Measure(call, run);
        }
    }

    private static (string Name, Action Call)[] Calls(Backend b, Arena arena, string name, int tokens, int outputs, int inputs)
    {
        DType type = b.ActivationType;
        Tensor input = arena.TakeRandom(b, tokens, inputs, type), output = arena.Take(tokens, outputs, type);
        Tensor dInput = arena.Take(tokens, inputs, type), dOutput = arena.TakeRandom(b, tokens, outputs, type);
        var weight = new Weight(arena.TakeRandom(b, outputs, inputs), arena.Take(outputs, inputs));
        var unpacked = new Weight(weight.Values);
        weight.TakePacked(arena, b, backward: true);
        if (!arena.IsPlan)
        {
            b.Pack(weight);
        }

        return
        [
            ($"MatMul {name}", () => b.MatMul(output, input, weight)),
            ($"MatMul {name}, unpacked", () => b.MatMul(output, input, unpacked)),
            ($"MatMulBackwardInput {name}", () => b.MatMulBackwardInput(dInput, dOutput, weight)),
            ($"MatMulBackwardWeight {name}", () => b.MatMulBackwardWeight(weight.Gradient, dOutput, input)),
        ];
    }
}
