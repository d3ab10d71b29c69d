namespace TinyLlama.Inference;

/// <summary>
/// Proposes what followed where the text's last tokens stood before: costs nothing, and is good where a text repeats itself or its
/// prompt. Proposes more where all of it came, less where nothing did.
/// </summary>
/// <remarks>
/// Saxena 2023, prompt lookup decoding. What is proposed was not drawn: the model draws as if nothing had been, and goes on where it
/// drew just that. So the text is the same without, at any temperature.
/// </remarks>
/// <param name="tokens">Most tokens that are proposed at a time, 1 to 64.</param>
/// <exception cref="TinyLlama.Data.UserErrorException">The number is out of range.</exception>
public sealed class PromptLookup(int tokens) : Draft(tokens)
{
    // One token has stood before nearly always, and what followed it seldom comes again.
    private const int LongestMatch = 3;
    private const int ShortestMatch = 2;
    private const int FirstTokens = 2;

    private int _next = Math.Min(FirstTokens, tokens);

    internal override void Begin(ReadOnlySpan<int> input, GenerationOptions options, CancellationToken stop) =>
        _next = Math.Min(FirstTokens, Tokens);

    internal override IReadOnlyList<DraftToken> Propose(ReadOnlySpan<int> input, int generated, int most)
    {
        for (int length = Math.Min(LongestMatch, input.Length - 1); length >= ShortestMatch; length--)
        {
            int place = input[..^1].LastIndexOf(input[^length..]);
            if (place >= 0)
            {
                return Repeat(input[(place + length)..], Math.Min(_next, most));
            }
        }

        return [];
    }

    internal override void Learn(int proposed, int accepted) =>
        _next = accepted == proposed ? Math.Min(2 * _next, Tokens) : accepted == 0 ? Math.Max(1, _next / 2) : _next;

    // What followed reaches to the end of the text: beyond that the text repeats itself.
    private static DraftToken[] Repeat(ReadOnlySpan<int> period, int count)
    {
        var proposed = new DraftToken[count];
        for (int i = 0; i < count; i++)
        {
            proposed[i] = new DraftToken(period[i % period.Length], default);
        }

        return proposed;
    }
}
