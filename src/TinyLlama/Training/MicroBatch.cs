using TinyLlama.Compute;
using TinyLlama.Data.Batches;

namespace TinyLlama.Training;

/// <summary>What attention does where one document of a sequence ends and the next begins.</summary>
public enum DocumentAttention
{
    /// <summary>It runs across, as TinyLlama's did.</summary>
    Joined,

    /// <summary>Each document sees only itself; its positions start at 0.</summary>
    Masked,
}

/// <summary>The tokens of one forward and backward on the device, and the host buffers they come through.</summary>
public sealed class MicroBatch
{
    private readonly int _sequences;
    private readonly int _context;
    private readonly int[] _tokens;
    private readonly int[] _targets;
    private readonly int[] _starts;
    private readonly Segment[] _segments;

    /// <summary>Takes the device buffers.</summary>
    /// <param name="arena">Their owner.</param>
    /// <param name="sequences">Sequences of a micro-batch.</param>
    /// <param name="context">Tokens of a sequence.</param>
    public MicroBatch(Arena arena, int sequences, int context)
    {
        (_sequences, _context) = (sequences, context);
        int n = checked(sequences * context);
        (_tokens, _targets, _starts, _segments) = (new int[n], new int[n], new int[context + 1], new Segment[n]);
        Tokens = arena.Take(n, 1, DType.I32);
        Targets = arena.Take(n, 1, DType.I32);
        Layout = new TokenLayout(arena, n, n);
    }

    /// <summary>Gets the number of sequences.</summary>
    public int Sequences => _sequences;

    /// <summary>Gets the tokens, (N, 1) of I32.</summary>
    public Tensor Tokens { get; }

    /// <summary>Gets the targets, (N, 1) of I32; negative ones are ignored.</summary>
    public Tensor Targets { get; }

    /// <summary>Gets which keys each token sees.</summary>
    public TokenLayout Layout { get; }

    /// <summary>Loads given tokens, one segment a sequence.</summary>
    /// <param name="backend">The device.</param>
    /// <param name="tokens">N token ids, sequence after sequence.</param>
    /// <param name="targets">N targets; negative ones are ignored.</param>
    public void Fill(Backend backend, ReadOnlySpan<int> tokens, ReadOnlySpan<int> targets)
    {
        tokens.CopyTo(_tokens);
        targets.CopyTo(_targets);
        int segments = 0;
        for (int s = 0; s < _sequences; s++)
        {
            segments = AddSegments(segments, s * _context, []);
        }

        Upload(backend, segments);
    }

    /// <summary>Loads the micro-batch of consecutive samples.</summary>
    /// <param name="backend">The device.</param>
    /// <param name="loader">The function from samples to tokens; its context is this one's.</param>
    /// <param name="firstSample">The first sequence's sample.</param>
    /// <param name="documents">What attention does between documents.</param>
    public void Fill(Backend backend, TokenLoader loader, long firstSample, DocumentAttention documents)
    {
        int segments = 0;
        for (int s = 0; s < _sequences; s++)
        {
            int row = s * _context;
            long block = loader.BlockOf(firstSample + s);
            loader.ReadBlock(block, _tokens.AsSpan(row, _context), _targets.AsSpan(row, _context));
            int starts = documents == DocumentAttention.Masked ? loader.ReadDocumentStarts(block, _starts) : 0;
            segments = AddSegments(segments, row, _starts.AsSpan(0, starts));
        }

        Upload(backend, segments);
    }

    private void Upload(Backend backend, int segments)
    {
        backend.Write<int>(Tokens, _tokens);
        backend.Write<int>(Targets, _targets);
        Layout.Set(backend, _segments.AsSpan(0, segments));
    }

    // One segment from the row to the first document start after it, one from each start to the next.
    private int AddSegments(int count, int row, ReadOnlySpan<int> starts)
    {
        int first = 0;
        foreach (int start in starts)
        {
            if (start > first && start < _context)
            {
                _segments[count++] = new Segment(row + first, start - first, 0, row + first);
                first = start;
            }
        }

        _segments[count++] = new Segment(row + first, _context - first, 0, row + first);
        return count;
    }
}
