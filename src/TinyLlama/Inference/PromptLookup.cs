namespace TinyLlama.Inference;

/// <summary>
/// Proposes what followed where the text's last tokens stood before: costs nothing, and is good where a text repeats parts of
/// its prompt.
/// </summary>
/// <remarks>Saxena 2023, prompt lookup decoding.</remarks>
/// <param name="tokens">Most tokens that are proposed at a time, 1 to 64.</param>
/// <exception cref="TinyLlama.Data.UserErrorException">The number is out of range.</exception>
public sealed class PromptLookup(int tokens) : Draft(tokens)
{
    private const int LongestMatch = 3;

    internal override void Begin(ReadOnlySpan<int> input, GenerationOptions options, CancellationToken stop)
    {
    }

    internal override IReadOnlyList<DraftToken> Propose(ReadOnlySpan<int> input, int generated, int most)
    {
        for (int length = Math.Min(LongestMatch, input.Length - 1); length > 0; length--)
        {
            int place = input[..^1].LastIndexOf(input[^length..]);
            if (place >= 0)
            {
                ReadOnlySpan<int> next = input[(place + length)..];
                return Array.ConvertAll(next[..Math.Min(most, next.Length)].ToArray(), token => new DraftToken(token, default));
            }
        }

        return [];
    }
}
