using TinyLlama.Bench;

return args switch
{
    ["matmul", .. string[] rest] => MatMulBench.Run(rest),
    ["kernels", .. string[] rest] => KernelBench.Run(rest),
    ["train", .. string[] rest] => TrainBench.Run(rest),
    ["tokenizer", .. string[] rest] => TokenizerBench.Run(rest),
    _ => Usage(),
};

static int Usage()
{
    Console.Error.WriteLine("usage: TinyLlama.Bench matmul [--threads 1,2] [--path 512|256|128|scalar] [--seconds 0.5] [--shapes NAME]");
    Console.Error.WriteLine("       TinyLlama.Bench kernels [--threads 1,2] [--seconds 0.3] [--kernels NAME]");
    Console.Error.WriteLine("       TinyLlama.Bench train …");
    Console.Error.WriteLine("       TinyLlama.Bench tokenizer --model tokenizer.model [--encode FILE] [--train FILE] [--vocab-size 32000] [--runs 3]");
    return 2;
}
