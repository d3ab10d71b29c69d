namespace TinyLlama.Inference;

/// <summary>
/// Proposes what followed where the text's last tokens stood before: costs nothing, and is good where a text repeats parts of
/// its prompt.
/// </summary>
/// <remarks>
/// Saxena 2023, prompt lookup decoding. What is proposed was not drawn: the model draws as if nothing had been, and goes on where it
/// drew just that. So the text is the same without, at any temperature.
/// </remarks>
/// <param name="tokens">Most tokens that are proposed at a time, 1 to 64.</param>
/// <exception cref="TinyLlama.Data.UserErrorException">The number is out of range.</exception>
public sealed class PromptLookup(int tokens) : Draft(tokens)
{
    /// <summary>The most last tokens that are looked for.</summary>
    internal const int LongestMatch = 3;

    internal override void Begin(ReadOnlySpan<int> input, GenerationOptions options, CancellationToken stop)
    {
    }

    internal override IReadOnlyList<DraftToken> Propose(ReadOnlySpan<int> input, int generated, int most) =>
        Array.ConvertAll(Find(input, most, shortestMatch: 1), token => new DraftToken(token, default));

    /// <summary>
    /// What followed where the last tokens stood before: as many of them as can be, the last such place. Where that reaches the end of
    /// the text, the text repeats itself, and goes on so.
    /// </summary>
    /// <param name="text">The tokens.</param>
    /// <param name="count">The number of tokens that follow.</param>
    /// <param name="shortestMatch">The fewest last tokens that must have stood there, at least one.</param>
    /// <returns>The tokens; none where there is no such place.</returns>
    internal static int[] Find(ReadOnlySpan<int> text, int count, int shortestMatch)
    {
        for (int length = Math.Min(LongestMatch, text.Length - 1); length >= shortestMatch; length--)
        {
            int place = text[..^1].LastIndexOf(text[^length..]);
            if (place >= 0)
            {
                ReadOnlySpan<int> period = text[(place + length)..];
                int[] next = new int[count];
                for (int i = 0; i < count; i++)
                {
                    next[i] = period[i % period.Length];
                }

                return next;
            }
        }

        return [];
    }
}
