using System.Globalization;
using System.Text;

namespace TinyLlama.Chat;

/// <summary>What a token of a template is.</summary>
internal enum JinjaTokenKind
{
    /// <summary>Text outside of tags.</summary>
    Text,

    /// <summary><c>{{</c>, <c>}}</c>, <c>{%</c>, <c>%}</c>, an operator or a bracket.</summary>
    Symbol,

    /// <summary>A name or a keyword.</summary>
    Name,

    /// <summary>A text in quotes, unescaped.</summary>
    String,

    /// <summary>A whole number.</summary>
    Number,

    /// <summary>The end of the template.</summary>
    End,
}

/// <summary>A token of a template.</summary>
internal readonly record struct JinjaToken(JinjaTokenKind Kind, string Text, int Line);

/// <summary>
/// Cuts a template into tokens, with the white space rules that Hugging Face renders chat templates by: a line's white
/// space before a tag and the line feed after it go (<c>lstrip_blocks</c>, <c>trim_blocks</c>), and so does the template's last
/// line feed.
/// </summary>
internal sealed class JinjaLexer
{
    private static readonly string[] s_symbols =
        ["==", "!=", "<=", ">=", "//", "**", "+", "-", "*", "/", "%", "~", "(", ")", "[", "]", "{", "}", ".", ",", ":", "|", "=", "<", ">"];

    private readonly string _source;
    private readonly string _origin;
    private readonly List<JinjaToken> _tokens = [];
    private int _position;
    private int _line = 1;

    private JinjaLexer(string source, string origin) =>
        (_source, _origin) = (source.EndsWith('\n') ? source[..^1] : source, origin);

    /// <summary>The tokens of a template, <see cref="JinjaTokenKind.End"/> last.</summary>
    /// <exception cref="TinyLlama.Data.UserErrorException">A tag or a text does not end, or a character means nothing.</exception>
    public static List<JinjaToken> Read(string source, string origin)
    {
        var lexer = new JinjaLexer(source.ReplaceLineEndings("\n"), origin);
        lexer.ReadTemplate();
        return lexer._tokens;
    }

    private void ReadTemplate()
    {
        bool trimsStart = false;
        bool dropsLineFeed = false;
        while (_position < _source.Length)
        {
            int tag = FindTag();
            string text = _source[_position..tag];
            char kind = tag < _source.Length ? _source[tag + 1] : '\0';
            char control = tag + 2 < _source.Length ? _source[tag + 2] : '\0';
            AddText(text, trimsStart, dropsLineFeed, trimsEnd: control == '-', stripsLine: kind is '%' or '#' && control != '+');
            if (kind == '\0')
            {
                break;
            }

            _position = tag + 2 + (control is '-' or '+' ? 1 : 0);
            string end = kind == '{' ? "}}" : kind + "}";
            char last = kind == '#' ? SkipComment() : ReadTag("{" + kind, end);
            trimsStart = last == '-';
            dropsLineFeed = kind != '{' && last != '+';
        }

        _tokens.Add(new JinjaToken(JinjaTokenKind.End, "the end", _line));
    }

    private int FindTag()
    {
        for (int i = _position; i + 1 < _source.Length; i++)
        {
            if (_source[i] == '{' && _source[i + 1] is '{' or '%' or '#')
            {
                return i;
            }
        }

        return _source.Length;
    }

    private void AddText(string text, bool trimsStart, bool dropsLineFeed, bool trimsEnd, bool stripsLine)
    {
        int lines = text.Count(c => c == '\n');
        bool startsLine = _position == 0 || _source[_position - 1] == '\n';
        if (dropsLineFeed && text.StartsWith('\n'))
        {
            text = text[1..];
            startsLine = true;
        }

        text = trimsStart ? text.TrimStart() : text;
        if (trimsEnd)
        {
            text = text.TrimEnd();
        }
        else if (stripsLine)
        {
            string rest = text.TrimEnd(' ', '\t');
            text = rest.EndsWith('\n') || (rest.Length == 0 && startsLine) ? rest : text;
        }

        if (text.Length > 0)
        {
            _tokens.Add(new JinjaToken(JinjaTokenKind.Text, text, _line));
        }

        _line += lines;
    }

    // Both return the character of white space control before the end of the tag, if there is one.
    private char SkipComment()
    {
        int end = _source.IndexOf("#}", _position, StringComparison.Ordinal);
        if (end < 0)
        {
            throw Jinja.Error(_origin, _line, "a comment '{#' has no end '#}'");
        }

        _line += _source.AsSpan(_position, end - _position).Count('\n');
        char last = end > _position ? _source[end - 1] : '\0';
        _position = end + 2;
        return last;
    }

    private char ReadTag(string begin, string end)
    {
        int first = _line;
        int brackets = 0;
        _tokens.Add(new JinjaToken(JinjaTokenKind.Symbol, begin, _line));
        while (_position < _source.Length)
        {
            char c = _source[_position];
            if (char.IsWhiteSpace(c))
            {
                _line += c == '\n' ? 1 : 0;
                _position++;
                continue;
            }

            char control = c is '-' or '+' && brackets == 0 && StartsWith(end, _position + 1) ? c : '\0';
            if (control != '\0' || (brackets == 0 && StartsWith(end, _position)))
            {
                _tokens.Add(new JinjaToken(JinjaTokenKind.Symbol, end, _line));
                _position += end.Length + (control == '\0' ? 0 : 1);
                return control;
            }

            JinjaToken token = ReadToken(c);
            brackets += token is { Kind: JinjaTokenKind.Symbol, Text: "{" or "[" or "(" } ? 1
                : token is { Kind: JinjaTokenKind.Symbol, Text: "}" or "]" or ")" } ? -1 : 0;
            _tokens.Add(token);
        }

        throw Jinja.Error(_origin, first, $"a tag '{begin}' has no end '{end}'");
    }

    private bool StartsWith(string text, int position) => string.CompareOrdinal(_source, position, text, 0, text.Length) == 0;

    private JinjaToken ReadToken(char c)
    {
        int start = _position;
        if (c is '\'' or '"')
        {
            return ReadString(c);
        }

        if (char.IsAsciiDigit(c))
        {
            while (_position < _source.Length && char.IsAsciiDigit(_source[_position]))
            {
                _position++;
            }

            string digits = _source[start.._position];
            return long.TryParse(digits, NumberStyles.None, CultureInfo.InvariantCulture, out _)
                ? new JinjaToken(JinjaTokenKind.Number, digits, _line)
                : throw Jinja.Error(_origin, _line, "a number is too large");
        }

        if (char.IsAsciiLetter(c) || c == '_')
        {
            while (_position < _source.Length && (char.IsAsciiLetterOrDigit(_source[_position]) || _source[_position] == '_'))
            {
                _position++;
            }

            return new JinjaToken(JinjaTokenKind.Name, _source[start.._position], _line);
        }

        string symbol = Array.Find(s_symbols, s => StartsWith(s, _position))
            ?? throw Jinja.Error(_origin, _line, $"the character '{c}' means nothing here");
        _position += symbol.Length;
        return new JinjaToken(JinjaTokenKind.Symbol, symbol, _line);
    }

    private JinjaToken ReadString(char quote)
    {
        int first = _line;
        var text = new StringBuilder();
        for (_position++; _position < _source.Length; _position++)
        {
            char c = _source[_position];
            if (c == quote)
            {
                _position++;
                return new JinjaToken(JinjaTokenKind.String, text.ToString(), first);
            }

            _line += c == '\n' ? 1 : 0;
            if (c == '\\' && _position + 1 < _source.Length)
            {
                c = _source[++_position];
                c = c switch
                {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    '\\' or '\'' or '"' => c,
                    _ => throw Jinja.Error(_origin, _line, $"the escape '\\{c}' is not supported"),
                };
            }

            text.Append(c);
        }

        throw Jinja.Error(_origin, first, "a text in quotes does not end");
    }
}
