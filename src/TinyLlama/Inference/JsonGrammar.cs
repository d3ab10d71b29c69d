using System.Runtime.InteropServices;
using System.Text;

namespace TinyLlama.Inference;

/// <summary>
/// A language of bytes as rules that call each other: a pushdown automaton. Nodes have edges that read a byte of a range,
/// read nothing, or call a rule and go on where it ends.
/// </summary>
internal sealed class JsonGrammar
{
    /// <summary>Most nodes: what a schema may grow to.</summary>
    public const int MostNodes = 50_000;

    private readonly List<List<Edge>> _nodes = [];
    private readonly List<Rule> _rules = [];
    private readonly HashSet<int> _ends = [];

    public JsonGrammar()
    {
        Whitespace = AddRule();
        String = AddRule();
        Integer = AddRule();
        Number = AddRule();
        Character = AddRule();
        Any = AddRule();
        AnyObject = AddRule();
        AnyArray = AddRule();
        BuildWhitespace();
        BuildCharacter();
        BuildNumbers();
        Repeat(String, '"', '"', 0, null, separated: false, node => Call(node, Character));
        Repeat(AnyArray, '[', ']', 0, null, separated: true, node => Call(node, Any));
        Repeat(AnyObject, '{', '}', 0, null, separated: true, node =>
            Call(Call(Bytes(Call(node, String), ":"u8), Whitespace), Any));
        foreach (int rule in (ReadOnlySpan<int>)[String, Number, AnyObject, AnyArray])
        {
            Link(Call(Start(Any), rule), End(Any));
        }

        foreach (string literal in (ReadOnlySpan<string>)["true", "false", "null"])
        {
            Link(Bytes(Start(Any), Encoding.UTF8.GetBytes(literal)), End(Any));
        }
    }

    /// <summary>Gets nothing, a space, or a line feed with at most 20 spaces and tabs: not room enough to loop in.</summary>
    public int Whitespace { get; }

    public int String { get; }

    /// <summary>Gets integers of up to 18 digits, which fit 64 bits.</summary>
    public int Integer { get; }

    /// <summary>Gets numbers of up to 18 digits before and after the point and an exponent of up to two, which are finite.</summary>
    public int Number { get; }

    /// <summary>Gets one code point of a string: well-formed UTF-8 or an escape, no half of a surrogate pair.</summary>
    public int Character { get; }

    /// <summary>Gets any JSON value.</summary>
    public int Any { get; }

    public int AnyObject { get; }

    public int AnyArray { get; }

    public int RuleCount => _rules.Count;

    public int NodeCount => _nodes.Count;

    public int Start(int rule) => _rules[rule].Start;

    public int End(int rule) => _rules[rule].End;

    public bool IsEnd(int node) => _ends.Contains(node);

    public ReadOnlySpan<Edge> Edges(int node) => CollectionsMarshal.AsSpan(_nodes[node]);

    /// <summary>Adds a rule without a body.</summary>
    public int AddRule()
    {
        var rule = new Rule(AddNode(), AddNode());
        _ends.Add(rule.End);
        _rules.Add(rule);
        return _rules.Count - 1;
    }

    public int AddNode()
    {
        _nodes.Add([]);
        return _nodes.Count - 1;
    }

    public void Link(int from, int to) => _nodes[from].Add(new Edge(EdgeKind.Nothing, 0, 0, 0, to));

    public int Call(int from, int rule)
    {
        int to = AddNode();
        _nodes[from].Add(new Edge(EdgeKind.Call, 0, 0, rule, to));
        return to;
    }

    public int Range(int from, int first, int last)
    {
        int to = AddNode();
        Range(from, first, last, to);
        return to;
    }

    public int Bytes(int from, ReadOnlySpan<byte> bytes)
    {
        foreach (byte b in bytes)
        {
            from = Range(from, b, b);
        }

        return from;
    }

    /// <summary>Builds a rule of items between two brackets, at least least and at most most (null for any number).</summary>
    public void Repeat(int rule, char open, char close, int least, int? most, bool separated, Func<int, int> item)
    {
        int Space(int node) => separated ? Call(node, Whitespace) : node;
        int closing = AddNode();
        Range(closing, close, close, End(rule));
        int unroll = most ?? Math.Max(least, 1);
        int node = Space(Range(Start(rule), open, open));
        for (int count = 0; ; count++)
        {
            if (count >= least)
            {
                Link(count > 0 ? Space(node) : node, closing);
            }

            if (count == unroll || _nodes.Count > MostNodes)
            {
                break;
            }

            int next = item(count > 0 && separated ? Separator(node) : node);
            node = AddNode();
            Link(next, node);
        }

        if (most is null)
        {
            Link(item(separated ? Separator(node) : node), node);
        }
    }

    /// <summary>A comma between items, with the whitespace after it.</summary>
    public int Separator(int from) => Call(Bytes(from, ","u8), Whitespace);

    private void Range(int from, int first, int last, int to) =>
        _nodes[from].Add(new Edge(EdgeKind.Byte, (byte)first, (byte)last, 0, to));

    private void BuildWhitespace()
    {
        (int start, int end) = (Start(Whitespace), End(Whitespace));
        Link(start, end);
        Range(start, ' ', ' ', end);
        int node = Range(start, '\n', '\n');
        for (int i = 0; i < 20; i++)
        {
            Link(node, end);
            int next = Range(node, ' ', ' ');
            Range(node, '\t', '\t', next);
            node = next;
        }

        Link(node, end);
    }

    private void BuildNumbers()
    {
        int zero = AddNode();
        Sign(Start(Integer), zero);
        Range(zero, '0', '0', End(Integer));
        Digits(Range(zero, '1', '9'), 0, 17, End(Integer));

        int whole = Call(Start(Number), Integer);
        int point = Range(whole, '.', '.');
        int fraction = AddNode();
        Digits(point, 1, 18, fraction);
        Link(whole, fraction);
        Link(fraction, End(Number));
        int exponent = Range(fraction, 'e', 'e');
        Range(fraction, 'E', 'E', exponent);
        int digits = AddNode();
        Sign(exponent, digits);
        Range(exponent, '+', '+', digits);
        Digits(digits, 1, 2, End(Number));
    }

    private void Sign(int from, int to)
    {
        Link(from, to);
        Range(from, '-', '-', to);
    }

    private void Digits(int from, int least, int most, int to)
    {
        for (int count = 0; count <= most; count++)
        {
            if (count >= least)
            {
                Link(from, to);
            }

            from = count < most ? Range(from, '0', '9') : from;
        }
    }

    private void BuildCharacter()
    {
        (int start, int end) = (Start(Character), End(Character));
        Range(start, 0x20, '!', end);
        Range(start, '#', '[', end);
        Range(start, ']', 0x7F, end);

        // Well-formed UTF-8 (Unicode 15, table 3-7).
        int[] tails = [end, AddNode(), AddNode()];
        Range(tails[1], 0x80, 0xBF, end);
        Range(tails[2], 0x80, 0xBF, tails[1]);
        Range(start, 0xC2, 0xDF, tails[1]);
        Range(Range(start, 0xE0, 0xE0), 0xA0, 0xBF, tails[1]);
        Range(start, 0xE1, 0xEC, tails[2]);
        Range(Range(start, 0xED, 0xED), 0x80, 0x9F, tails[1]);
        Range(start, 0xEE, 0xEF, tails[2]);
        Range(Range(start, 0xF0, 0xF0), 0x90, 0xBF, tails[2]);
        Range(Range(start, 0xF1, 0xF3), 0x80, 0xBF, tails[2]);
        Range(Range(start, 0xF4, 0xF4), 0x80, 0x8F, tails[2]);

        int escape = Range(start, '\\', '\\');
        foreach (char c in "\"\\/bfnrt")
        {
            Range(escape, c, c, end);
        }

        // uXXXX outside the surrogates, or a pair of them.
        int unit = Range(escape, 'u', 'u');
        int three = AddNode(), two = AddNode();
        Hex("0123456789abcefABCEF", unit, three);
        Hex("0123456789abcdefABCDEF", three, two);
        int surrogate = AddNode();
        Hex("dD", unit, surrogate);
        Hex("01234567", surrogate, two);
        HexPair(two, end);
        int high = AddNode(), afterHigh = AddNode(), low = AddNode(), lowRest = AddNode();
        Hex("89abAB", surrogate, high);
        HexPair(high, afterHigh);
        Hex("dD", Bytes(afterHigh, "\\u"u8), low);
        Hex("cdefCDEF", low, lowRest);
        HexPair(lowRest, end);
    }

    private void HexPair(int from, int to)
    {
        int middle = AddNode();
        Hex("0123456789abcdefABCDEF", from, middle);
        Hex("0123456789abcdefABCDEF", middle, to);
    }

    private void Hex(string digits, int from, int to)
    {
        foreach (char digit in digits)
        {
            Range(from, digit, digit, to);
        }
    }

    /// <summary>What an edge does on its way to its target.</summary>
    public enum EdgeKind
    {
        Nothing,
        Byte,
        Call,
    }

    public readonly record struct Edge(EdgeKind Kind, byte First, byte Last, int Rule, int Target);

    private readonly record struct Rule(int Start, int End);
}
