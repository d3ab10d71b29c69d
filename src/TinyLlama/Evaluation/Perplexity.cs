using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;
using TinyLlama.Model;

namespace TinyLlama.Evaluation;

/// <summary>Scores a model on fixed tokens.</summary>
/// <remarks>
/// Windows of the context length T: window i has the inputs iT … iT+T-1 and, one further on, the targets iT+1 … iT+T; the
/// last one is shorter. So each target is scored exactly once, after 1 to T tokens of context, as in training. All
/// targets count alike, BOS and EOS too. The result depends neither on the workspace's capacity nor on the threads.
/// </remarks>
public static class Perplexity
{
    /// <summary>Measures the loss over all targets.</summary>
    /// <param name="model">The model; where it is a stage, or split, all that have parts of it measure.</param>
    /// <param name="backend">The device.</param>
    /// <param name="workspace">A workspace of the model; it holds one window or several.</param>
    /// <param name="tokens">What to score.</param>
    /// <param name="maskDocuments">Whether a token sees only its own document, as in a training that masks documents.</param>
    /// <param name="contextLength">T; by default what the model is trained for.</param>
    /// <param name="progress">Receives the number of targets scored so far.</param>
    /// <param name="ranks">Ranks with the same model, which all measure and divide the windows between them; null for this one alone.</param>
    /// <param name="stop">Ends the measurement between two forwards.</param>
    public static Score Measure(
        LlamaModel model,
        Backend backend,
        Workspace workspace,
        EvaluationTokens tokens,
        bool maskDocuments = false,
        int? contextLength = null,
        Action<long>? progress = null,
        Collective? ranks = null,
        CancellationToken stop = default)
    {
        int context = contextLength ?? model.Config.ContextLength;
        if (workspace.Capacity < context)
        {
            throw new ArgumentException($"the workspace holds {workspace.Capacity} tokens, a window has {context}", nameof(workspace));
        }

        int capacity = Math.Min(workspace.Capacity / context * context, tokens.TargetCount);
        using Arena arena = backend.Allocate("evaluation", checked((capacity * 28L) + (8 * Arena.Alignment)));
        var layout = new TokenLayout(arena, capacity, capacity);
        Tensor inputs = arena.Take(capacity, 1, DType.I32);
        Tensor targets = arena.Take(capacity, 1, DType.I32);
        float[] losses = new float[capacity];
        Segment[] segments = new Segment[capacity];

        // A sum for each window, whoever computes it: the total does not depend on how many do.
        double[] sums = new double[(tokens.TargetCount + context - 1) / context];
        for (int first = capacity * (ranks?.Rank ?? 0); first < tokens.TargetCount; first += capacity * (ranks?.Size ?? 1))
        {
            stop.ThrowIfCancellationRequested();
            int count = Math.Min(capacity, tokens.TargetCount - first);
            backend.Write(inputs.RowRange(0, count), tokens.Tokens.Slice(first, count));
            backend.Write(targets.RowRange(0, count), tokens.Tokens.Slice(first + 1, count));
            int used = Segments(segments, first, count, context, maskDocuments ? tokens.DocumentStarts : []);
            layout.Set(backend, segments.AsSpan(0, used));
            model.Stages?.ReceiveInput(workspace, count);
            model.Forward(workspace, inputs.RowRange(0, count), layout, KeyValueSource.Batch);
            model.Stages?.SendOutput(workspace, count).Wait();
            if (model.Config.HasHead)
            {
                model.Loss(workspace, targets.RowRange(0, count));
                backend.Read(losses.AsSpan(0, count), workspace.Losses(count));
                for (int i = 0; i < count; i++)
                {
                    sums[(first + i) / context] += losses[i];
                }
            }

            progress?.Invoke(first + count);
        }

        double loss = Together(sums, Math.Max(1, capacity / context), ranks).Sum();
        return new Score(tokens.TargetCount, tokens.ByteCount, model.Stages?.OfLast(loss) ?? loss);
    }

    // The sums of all ranks' windows: a rank has every Size-th group of so many.
    private static double[] Together(double[] sums, int group, Collective? ranks)
    {
        if (ranks is null || ranks.Size == 1)
        {
            return sums;
        }

        double[] all = new double[sums.Length * ranks.Size];
        ranks.AllGather<double>(all, sums);
        for (int window = 0; window < sums.Length; window++)
        {
            sums[window] = all[(window / group % ranks.Size * sums.Length) + window];
        }

        return sums;
    }

    /// <summary>The segments of the rows of a forward: cut at every multiple of the context and at document starts.</summary>
    /// <param name="segments">Receives them.</param>
    /// <param name="first">The token in row 0; a window begins with it.</param>
    /// <param name="count">Number of rows.</param>
    /// <param name="context">T.</param>
    /// <param name="documentStarts">Tokens that begin a document, ascending; none where documents are joined.</param>
    private static int Segments(Segment[] segments, int first, int count, int context, ReadOnlySpan<int> documentStarts)
    {
        int used = 0;
        int start = documentStarts.BinarySearch(first + 1);
        start = start < 0 ? ~start : start;
        for (int row = 0; row < count;)
        {
            int end = Math.Min(count, (row / context * context) + context);
            if (start < documentStarts.Length && documentStarts[start] - first <= end)
            {
                end = documentStarts[start++] - first;
            }

            segments[used++] = new Segment(row, end - row, 0, row);
            row = end;
        }

        return used;
    }
}
