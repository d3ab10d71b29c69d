using System.Globalization;
using System.Text;
using TinyLlama.Compute;
using TinyLlama.Data;

namespace TinyLlama.Training;

/// <summary>The text that a key was given, and where; reads itself as the type that the key wants.</summary>
/// <param name="Key">The key, sections joined by dots.</param>
/// <param name="Items">A scalar is one item; a sequence any number.</param>
/// <param name="IsSequence">Whether it was written as a sequence.</param>
/// <param name="Place">Where: <c>file:line:column</c>, or the flag.</param>
internal sealed record RecipeValue(string Key, IReadOnlyList<string> Items, bool IsSequence, string Place)
{
    public string Text() =>
        IsSequence ? throw Refuse("is a list, but one text is wanted") : Items[0];

    public IReadOnlyList<string> Texts() => Items;

    /// <summary>A whole number: 2097152, 2_097_152 or 3e12.</summary>
    public long Integer(long least, long most = long.MaxValue)
    {
        string text = Digits();
        if (!decimal.TryParse(text, NumberStyles.Float, CultureInfo.InvariantCulture, out decimal number)
            || number != decimal.Truncate(number))
        {
            throw Refuse($"is '{Items[0]}', but a whole number is wanted");
        }

        if (number < least || number > most)
        {
            throw Refuse(most == long.MaxValue
                ? $"is {Items[0]}, but must be at least {least:N0}"
                : $"is {Items[0]}, but must be from {least:N0} to {most:N0}");
        }

        return (long)number;
    }

    public int Int32(int least) => (int)Integer(least, int.MaxValue);

    public ulong Unsigned() =>
        ulong.TryParse(Digits(), NumberStyles.None, CultureInfo.InvariantCulture, out ulong number)
            ? number
            : throw Refuse($"is '{Items[0]}', but a whole number from 0 to {ulong.MaxValue} is wanted");

    /// <summary>A finite number that satisfies a condition.</summary>
    public double Number(Func<double, bool> accept, string wanted) =>
        double.TryParse(Digits(), NumberStyles.Float, CultureInfo.InvariantCulture, out double number)
            && double.IsFinite(number) && accept(number)
            ? number
            : throw Refuse($"is '{Items[0]}', but {wanted} is wanted");

    public double AtLeastZero() => Number(x => x >= 0, "a number of at least 0");

    public double Positive() => Number(x => x > 0, "a number above 0");

    public double BelowOne() => Number(x => x is >= 0 and < 1, "a number from 0 to below 1");

    public float PositiveSingle()
    {
        _ = Positive();
        float number = float.Parse(Digits(), NumberStyles.Float, CultureInfo.InvariantCulture);
        return number > 0 && float.IsFinite(number) ? number : throw Refuse($"is {Items[0]}, which is out of range");
    }

    public bool Boolean() => Word(("true", true), ("false", false));

    public Device Device() => Compute.Device.TryParse(Text(), out Device device)
        ? device
        : throw Refuse($"is '{Text()}', but one of these is wanted: cpu, cuda, cuda:N, auto");

    /// <summary>One of a few words.</summary>
    public T Word<T>(params ReadOnlySpan<(string Word, T Value)> choices)
    {
        string text = Text();
        var words = new StringBuilder();
        foreach ((string word, T value) in choices)
        {
            if (word == text)
            {
                return value;
            }

            words.Append(words.Length > 0 ? ", " : "").Append(word);
        }

        throw Refuse($"is '{text}', but one of these is wanted: {words}");
    }

    public UserErrorException Refuse(string why) => new($"{Place}: {Key} {why}");

    private string Digits() => Text().Replace("_", "", StringComparison.Ordinal);
}
