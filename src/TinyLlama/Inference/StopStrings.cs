using System.Text;

namespace TinyLlama.Inference;

/// <summary>
/// Ends a stream of text at the first stop string, wherever the pieces are cut: what might be the beginning of one is
/// held back until it is known.
/// </summary>
/// <remarks>The stop string that is complete first ends the text; of several complete at once, the longest.</remarks>
/// <param name="stops">The strings, none empty; compared ordinally.</param>
internal sealed class StopStrings(IReadOnlyList<string> stops)
{
    private readonly StringBuilder _held = new();

    /// <summary>Gets the stop string that ended the text, or null.</summary>
    public string? Found { get; private set; }

    /// <summary>Takes the next piece and returns the text that is certainly before any stop string.</summary>
    public string Append(string piece)
    {
        if (stops.Count == 0 || Found is not null)
        {
            return Found is null ? piece : "";
        }

        foreach (char c in piece)
        {
            _held.Append(c);
            Found = stops.Where(stop => EndsWith(stop, stop.Length)).MaxBy(stop => stop.Length);
            if (Found is not null)
            {
                _held.Length -= Found.Length;
                return Flush();
            }
        }

        return Take(_held.Length - stops.Max(HeldPrefix));
    }

    /// <summary>The text still held back, at the end of the stream.</summary>
    public string Flush() => Take(_held.Length);

    // Length of the longest beginning of a stop string that the held text ends with.
    private int HeldPrefix(string stop)
    {
        int length = Math.Min(stop.Length - 1, _held.Length);
        while (!EndsWith(stop, length))
        {
            length--;
        }

        return length;
    }

    private bool EndsWith(string stop, int length)
    {
        int first = _held.Length - length;
        if (first < 0)
        {
            return false;
        }

        for (int i = 0; i < length; i++)
        {
            if (_held[first + i] != stop[i])
            {
                return false;
            }
        }

        return true;
    }

    private string Take(int count)
    {
        string text = _held.ToString(0, count);
        _held.Remove(0, count);
        return text;
    }
}
