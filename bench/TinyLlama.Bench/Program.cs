return TinyLlama.Bench.TokenizerBench.Run(args);
