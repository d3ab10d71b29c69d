namespace TinyLlama.Data.Tokenizers;

/// <summary>Finds the longest of a set of symbols at a place in a text.</summary>
internal sealed class SymbolMatcher
{
    private readonly (byte[] Text, int Id)[]?[] _byFirstByte = new (byte[] Text, int Id)[]?[256];

    /// <param name="symbols">The symbols, none of them empty.</param>
    public SymbolMatcher(IEnumerable<(byte[] Text, int Id)> symbols)
    {
        foreach (IGrouping<byte, (byte[] Text, int Id)> group in symbols.GroupBy(symbol => symbol.Text[0]))
        {
            _byFirstByte[group.Key] = [.. group.OrderByDescending(symbol => symbol.Text.Length)];
            Any = true;
        }
    }

    /// <summary>Gets whether there are symbols at all.</summary>
    public bool Any { get; }

    /// <summary>The number of bytes of the longest symbol that the text begins with, and its id; 0 for none.</summary>
    public int Match(ReadOnlySpan<byte> text, out int id)
    {
        id = -1;
        if (_byFirstByte[text[0]] is not { } candidates)
        {
            return 0;
        }

        foreach ((byte[] symbol, int symbolId) in candidates)
        {
            if (text.StartsWith(symbol))
            {
                id = symbolId;
                return symbol.Length;
            }
        }

        return 0;
    }
}
