namespace TinyLlama.Chat;

/// <summary>The filters, tests and methods that templates can use; null for one that is not there.</summary>
internal static class JinjaFunctions
{
    /// <summary><c>value | name(arguments)</c>.</summary>
    public static JinjaExpression? Filter(string name, JinjaExpression value, List<JinjaExpression> arguments) => (name, arguments.Count) switch
    {
        ("trim", 0) => OnText(value, static text => text.Trim(start: true, end: true)),
        ("upper", 0) => OnText(value, static text => text with { Text = text.Text.ToUpperInvariant() }),
        ("lower", 0) => OnText(value, static text => text with { Text = text.Text.ToLowerInvariant() }),
        ("string", 0) => run => JinjaValue.Text(run, value(run)),
        ("length" or "count", 0) => run => JinjaValue.Length(run, value(run)),
        ("tojson", 0) => run => JinjaValue.Json(run, value(run)),
        ("join", 0) => run => JinjaValue.Join(run, value(run), MarkedText.Own("")),
        ("join", 1) => run => JinjaValue.Join(run, value(run), JinjaValue.Text(run, arguments[0](run))),
        ("default", 1) => run => value(run) is var given && given == JinjaValue.Undefined ? arguments[0](run) : given,
        _ => null,
    };

    /// <summary><c>value is name</c>.</summary>
    public static Func<object?, bool>? Test(string name) => name switch
    {
        "defined" => static value => value != JinjaValue.Undefined,
        "undefined" => static value => value == JinjaValue.Undefined,
        "none" => static value => value is null,
        "string" => static value => value is MarkedText,
        "number" => static value => value is long,
        "boolean" => static value => value is bool,
        "true" => static value => value is true,
        "false" => static value => value is false,
        "mapping" => static value => value is Dictionary<string, object?>,
        "sequence" or "iterable" => static value => value is MarkedText or List<object?> or Dictionary<string, object?>,
        _ => null,
    };

    /// <summary><c>value.name(arguments)</c>, of texts.</summary>
    public static JinjaExpression? Method(string name, JinjaExpression value, List<JinjaExpression> arguments) => (name, arguments.Count) switch
    {
        ("upper" or "lower", 0) => Filter(name, value, arguments),
        ("strip", 0 or 1) => Strip(value, arguments, start: true, end: true),
        ("lstrip", 0 or 1) => Strip(value, arguments, start: true, end: false),
        ("rstrip", 0 or 1) => Strip(value, arguments, start: false, end: true),
        ("split", 0) => OnText(value, static text => text.Split(null)),
        ("split", 1) => run => Receiver(run, value).Split(Argument(run, arguments)),
        ("startswith", 1) => run => Receiver(run, value).Text.StartsWith(Argument(run, arguments), StringComparison.Ordinal),
        ("endswith", 1) => run => Receiver(run, value).Text.EndsWith(Argument(run, arguments), StringComparison.Ordinal),
        _ => null,
    };

    private static JinjaExpression Strip(JinjaExpression value, List<JinjaExpression> arguments, bool start, bool end) => arguments.Count == 0
        ? OnText(value, text => text.Trim(start, end))
        : run => Receiver(run, value).Trim(start, end, Argument(run, arguments));

    private static JinjaExpression OnText(JinjaExpression value, Func<MarkedText, object> function) => run => function(Receiver(run, value));

    private static MarkedText Receiver(JinjaRun run, JinjaExpression value)
    {
        MarkedText text = value(run) is var given && given is MarkedText marked ? marked
            : throw run.Error($"a text is needed, here is {JinjaValue.NameOf(given)}");
        run.Charge(text.Text.Length);
        return text;
    }

    private static string Argument(JinjaRun run, List<JinjaExpression> arguments) =>
        arguments[0](run) is MarkedText { Text.Length: > 0 } text ? text.Text
        : throw run.Error("the argument of a method of texts is no text, or an empty one");
}
