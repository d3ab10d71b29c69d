using System.Text;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Evaluation;
using TinyLlama.Model;
using TinyLlama.Tests.Common;
using TinyLlama.Tests.Model;

namespace TinyLlama.Tests.Evaluation;

public sealed class PerplexityTests : IDisposable
{
    private const int Context = 16;

    private readonly ModelRun _run = new(
        ModelRun.TinyConfig() with { VocabularySize = 258, ContextLength = Context }, 3 * Context, Keep.Nothing);

    public PerplexityTests() => _run.Randomize(3);

    [Theory]
    [InlineData(2)]
    [InlineData(16)]
    [InlineData(17)]
    [InlineData(18)]
    [InlineData(100)]
    public void Each_target_is_scored_once_after_the_tokens_of_its_window(int count)
    {
        int[] tokens = Tokens(count);
        double expected = 0;
        for (int first = 0; first < count - 1; first += Context)
        {
            expected += WindowNats(tokens[first..Math.Min(first + Context, count - 1)], tokens[(first + 1)..Math.Min(first + Context + 1, count)]);
        }

        Score score = Measure(Over(tokens, [0]));
        Assert.Equal(count - 1, score.TargetCount);
        Assert.Equal(expected, score.TotalNats, 1e-5 * expected);
        Assert.Equal(expected / (count - 1), score.Loss, 1e-5);
        Assert.Equal(Math.Exp(score.Loss), score.Perplexity);
        Assert.Equal(score.TotalNats / Math.Log(2) / (count - 1), score.BitsPerByte, 1e-12);
    }

    [Fact]
    public void Masked_documents_see_only_themselves()
    {
        // A document within a window, one across windows, and one that begins with a window.
        int[] tokens = Tokens(60);
        int[] starts = [0, 5, 7, 32, 50];
        int[] cuts = [0, 5, 7, 16, 32, 48, 50, 59];
        double expected = 0;
        for (int i = 0; i + 1 < cuts.Length; i++)
        {
            expected += WindowNats(tokens[cuts[i]..cuts[i + 1]], tokens[(cuts[i] + 1)..(cuts[i + 1] + 1)]);
        }

        Score masked = Measure(Over(tokens, starts), maskDocuments: true);
        Assert.Equal(expected, masked.TotalNats, 1e-5 * expected);
        Assert.NotEqual(masked.TotalNats, Measure(Over(tokens, starts)).TotalNats, 1e-3);
    }

    [Fact]
    public void The_workspace_and_the_threads_change_no_bit()
    {
        EvaluationTokens tokens = Over(Tokens(123), [0]);
        double expected = Measure(tokens).TotalNats;
        foreach (int capacity in (int[])[Context, 40, 200])
        {
            using Workspace workspace = Workspace.Allocate(_run.Model, _run.Backend, capacity, Keep.Nothing);
            Assert.Equal(expected, Perplexity.Measure(_run.Model, _run.Backend, workspace, tokens).TotalNats);
        }

        using var other = new ModelRun(_run.Model.Config, 3 * Context, Keep.BlockInputs, threads: 3);
        other.Randomize(3);
        Assert.Equal(expected, Perplexity.Measure(other.Model, other.Backend, other.Workspace, tokens).TotalNats);
    }

    [Fact]
    public void Progress_ends_with_all_targets()
    {
        List<long> reports = [];
        Perplexity.Measure(_run.Model, _run.Backend, _run.Workspace, Over(Tokens(100), [0]), progress: reports.Add);
        Assert.Equal([48, 96, 99], reports);
    }

    [Fact]
    public void A_text_is_scored_from_its_first_byte_to_its_last()
    {
        const string Text = "Grüße, 世界 😀\n";
        EvaluationTokens tokens = EvaluationTokens.FromText(Text, new ByteTokenizer(), "a text");
        Assert.Equal(Encoding.UTF8.GetByteCount(Text), tokens.TargetCount);
        Assert.Equal(Encoding.UTF8.GetByteCount(Text), tokens.ByteCount);
        Assert.Equal(256, tokens.Tokens[0]);
    }

    [Fact]
    public void Bytes_are_those_of_the_text_whatever_the_tokenizer_puts_before_it()
    {
        BpeTokenizer tokenizer = Tokenizer.Load(SharedFiles.Require("oracles/llama2-tokenizer/tokenizer.model"));
        foreach (string text in (string[])["Once upon a time", " two spaces before", "世界 😀 \u0001", "\nline"])
        {
            EvaluationTokens tokens = EvaluationTokens.FromText(text, tokenizer, "a text");
            Assert.Equal(Encoding.UTF8.GetByteCount(text), tokens.ByteCount);

            // Two documents as shards hold them: BOS text EOS BOS text EOS. The first token is context only.
            List<int> document = [tokenizer.Bos!.Value];
            tokenizer.Encode(text, document);
            document.Add(tokenizer.Eos!.Value);
            tokens = new EvaluationTokens([.. document, .. document], [0, document.Count], tokenizer, "documents");
            Assert.Equal(2 * Encoding.UTF8.GetByteCount(text), tokens.ByteCount);
            Assert.Equal((2 * document.Count) - 1, tokens.TargetCount);
        }
    }

    [Fact]
    public void A_text_of_no_token_is_refused()
    {
        var error = Assert.Throws<UserErrorException>(() => EvaluationTokens.FromText("", new ByteTokenizer(), "empty.txt"));
        Assert.StartsWith("empty.txt has 1 tokens", error.Message, StringComparison.Ordinal);
    }

    public void Dispose() => _run.Dispose();

    private static EvaluationTokens Over(int[] tokens, int[] starts) => new(tokens, starts, new ByteTokenizer(), "tokens");

    private static int[] Tokens(int count)
    {
        var random = new Random(count);
        return [.. Enumerable.Range(0, count).Select(_ => random.Next(256))];
    }

    private Score Measure(EvaluationTokens tokens, bool maskDocuments = false) =>
        Perplexity.Measure(_run.Model, _run.Backend, _run.Workspace, tokens, maskDocuments);

    // By the definition: the softmax of all logits of one forward, in double.
    private double WindowNats(int[] inputs, int[] targets)
    {
        _run.Forward(inputs);
        float[][] rows = [.. _run.Logits().Chunk(258)];
        return rows.Zip(targets, (row, target) => Math.Log(row.Sum(logit => Math.Exp(logit - row[target])))).Sum();
    }
}
