using TinyLlama.Bench;

return args is ["masks", .. var rest] ? TokenMaskBench.Run(rest) : TokenizerBench.Run(args);
