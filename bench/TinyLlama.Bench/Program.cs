using TinyLlama.Bench;

return TrainBench.Run(args[1..]);
