using TinyLlama.Checkpoints;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;
using TinyLlama.Tests.Cli;
using TinyLlama.Tests.Model;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>Models of random weights in files.</summary>
internal static class SmallModel
{
    /// <summary>A tokenizer trained on a seeded text.</summary>
    public static BpeTokenizer Tokenizer(int vocabulary)
    {
        var text = new SeededText(9);
        string[] documents = [.. Enumerable.Range(0, 60).Select(_ => text.Document())];
        return new BpeTokenizer(BpeTrainer.Train(documents, new BpeTrainingOptions { VocabularySize = vocabulary, CharacterCoverage = 1 }));
    }

    /// <summary>Writes a run with one checkpoint; returns its folder.</summary>
    public static string Save(string run, ModelConfig config, BpeTokenizer? tokenizer, Action<ModelRun>? change = null)
    {
        using var model = new ModelRun(config, 1, Keep.Nothing);
        model.Randomize(3);
        change?.Invoke(model);
        TrainingCheckpoint.Save(run, 0, writer => writer.WriteModel(config, model.Backend, model.Model.Parameters, tokenizer));
        return run;
    }

    /// <summary>Writes a checkpoint of a model of 100 thousand weights with a tokenizer; returns its folder.</summary>
    public static string SaveCheckpoint(string run)
    {
        var config = new ModelConfig
        {
            VocabularySize = 400,
            ContextLength = 16,
            Layers = 2,
            Heads = 2,
            KeyValueHeads = 2,
            Channels = 64,
            Hidden = 64,
        };
        return TrainingCheckpoint.List(Save(run, config, Tokenizer(config.VocabularySize)))[^1].Path;
    }
}
