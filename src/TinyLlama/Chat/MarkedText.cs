using System.Text;

namespace TinyLlama.Chat;

/// <summary>
/// A text that remembers of each character whether it comes from outside the template. Every operation of a template
/// keeps the marks, so that what a stranger wrote never becomes a control symbol.
/// </summary>
/// <param name="Text">The characters.</param>
/// <param name="IsForeign">As many marks.</param>
internal sealed record MarkedText(string Text, bool[] IsForeign)
{
    /// <summary>A text of the template itself.</summary>
    public static MarkedText Own(string text) => new(text, new bool[text.Length]);

    /// <summary>A text that the template was given.</summary>
    public static MarkedText Foreign(string text)
    {
        bool[] marks = new bool[text.Length];
        Array.Fill(marks, true);
        return new(text, marks);
    }

    /// <summary>All of a text where any of it is foreign: for what does not keep characters in their places.</summary>
    public MarkedText With(string text) => Array.IndexOf(IsForeign, true) < 0 ? Own(text) : Foreign(text);

    public MarkedText Add(MarkedText other) => new(Text + other.Text, [.. IsForeign, .. other.IsForeign]);

    public MarkedText Slice(int start, int length) => new(Text.Substring(start, length), IsForeign[start..(start + length)]);

    /// <summary>Without characters of a set at the ends; white space where the set is empty.</summary>
    public MarkedText Trim(bool start, bool end, string set = "")
    {
        bool Drops(char c) => set.Length == 0 ? char.IsWhiteSpace(c) : set.Contains(c);
        (int from, int to) = (0, Text.Length);
        while (start && from < to && Drops(Text[from]))
        {
            from++;
        }

        while (end && to > from && Drops(Text[to - 1]))
        {
            to--;
        }

        return Slice(from, to - from);
    }

    /// <summary>The parts between a separator, or between runs of white space where it is null.</summary>
    public List<object?> Split(string? separator)
    {
        var parts = new List<object?>();
        int start = 0;
        for (int i = 0; i < Text.Length;)
        {
            int matched = separator is null ? (char.IsWhiteSpace(Text[i]) ? 1 : 0)
                : string.CompareOrdinal(Text, i, separator, 0, separator.Length) == 0 ? separator.Length : 0;
            if (matched == 0)
            {
                i++;
                continue;
            }

            if (separator is not null || i > start)
            {
                parts.Add(Slice(start, i - start));
            }

            i += matched;
            start = i;
        }

        if (separator is not null || start < Text.Length)
        {
            parts.Add(Slice(start, Text.Length - start));
        }

        return parts;
    }

    /// <inheritdoc/>
    public override string ToString() => Text;

    /// <summary>Collects marked texts.</summary>
    internal sealed class Builder
    {
        private readonly StringBuilder _text = new();
        private readonly List<bool> _marks = [];

        public int Length => _text.Length;

        public void Append(MarkedText text)
        {
            _text.Append(text.Text);
            _marks.AddRange(text.IsForeign);
        }

        public MarkedText Build() => new(_text.ToString(), [.. _marks]);
    }
}
