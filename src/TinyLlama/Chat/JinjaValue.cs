using System.Globalization;
using System.Runtime.CompilerServices;
using System.Text.Encodings.Web;
using System.Text.Json;

namespace TinyLlama.Chat;

/// <summary>
/// Operations on a template's values, which are null (none), <see cref="Undefined"/>, bool, long, <see cref="MarkedText"/>,
/// <see cref="List{T}"/> of values, and <see cref="Dictionary{TKey, TValue}"/> from names to values; a namespace is a
/// dictionary of the class <see cref="Namespace"/>.
/// </summary>
internal static class JinjaValue
{
    /// <summary>The value of what has none.</summary>
    public static readonly object Undefined = new();

    public static bool IsTrue(object? value) => value switch
    {
        null => false,
        bool b => b,
        long n => n != 0,
        MarkedText text => text.Text.Length > 0,
        List<object?> list => list.Count > 0,
        Namespace => true,
        Dictionary<string, object?> map => map.Count > 0,
        _ => false,
    };

    public static string NameOf(object? value) => value switch
    {
        null => "none",
        bool => "a truth value",
        long => "a number",
        MarkedText => "a text",
        List<object?> => "a list",
        Namespace => "a namespace",
        Dictionary<string, object?> => "a mapping",
        _ => "undefined",
    };

    public static MarkedText Text(JinjaRun run, object? value) => value switch
    {
        MarkedText text => text,
        null => MarkedText.Own("None"),
        bool b => MarkedText.Own(b ? "True" : "False"),
        long n => MarkedText.Own(n.ToString(CultureInfo.InvariantCulture)),
        _ when value == Undefined => MarkedText.Own(""),
        _ => throw run.Error($"{NameOf(value)} cannot be written as text; use the filter tojson"),
    };

    public static object? Add(JinjaRun run, object? left, object? right)
    {
        switch (left, right)
        {
            case (long a, long b):
                return unchecked(a + b);
            case (MarkedText a, MarkedText b):
                run.Charge(a.Text.Length + b.Text.Length);
                return a.Add(b);
            case (List<object?> a, List<object?> b):
                run.Charge(a.Count + b.Count);
                return (List<object?>)[.. a, .. b];
            default:
                throw run.Error($"{NameOf(left)} and {NameOf(right)} cannot be added");
        }
    }

    public static long Number(JinjaRun run, object? value) =>
        value is long n ? n : throw run.Error($"a number is needed, here is {NameOf(value)}");

    public static int Compare(JinjaRun run, object? left, object? right) => (left, right) switch
    {
        (long a, long b) => a.CompareTo(b),
        (MarkedText a, MarkedText b) => string.CompareOrdinal(a.Text, b.Text),
        _ => throw run.Error($"{NameOf(left)} and {NameOf(right)} cannot be compared"),
    };

    public static bool AreEqual(JinjaRun run, object? left, object? right)
    {
        run.Charge();
        RuntimeHelpers.EnsureSufficientExecutionStack();
        return (left, right) switch
        {
            (MarkedText a, MarkedText b) => a.Text == b.Text,
            (List<object?> a, List<object?> b) =>
                a.Count == b.Count && a.Zip(b).All(pair => AreEqual(run, pair.First, pair.Second)),
            _ => Equals(left, right),
        };
    }

    public static bool Contains(JinjaRun run, object? whole, object? part)
    {
        switch (whole)
        {
            case MarkedText text when part is MarkedText sought:
                run.Charge(text.Text.Length);
                return text.Text.Contains(sought.Text, StringComparison.Ordinal);
            case List<object?> list:
                return list.Exists(item => AreEqual(run, item, part));
            case Dictionary<string, object?> map when part is MarkedText key:
                return map.ContainsKey(key.Text);
            default:
                throw run.Error($"'in' cannot look for {NameOf(part)} in {NameOf(whole)}");
        }
    }

    /// <summary><c>value.name</c> and <c>value['name']</c>.</summary>
    public static object? Attribute(JinjaRun run, object? value, string name) => value is Dictionary<string, object?> map
        ? map.GetValueOrDefault(name, Undefined)
        : value is not null && value != Undefined
        ? Undefined
        : throw run.Error($"'{name}' is asked of {NameOf(value)}");

    /// <summary><c>value[index]</c>; a negative index counts from the end.</summary>
    public static object? Item(JinjaRun run, object? value, object? index)
    {
        if (index is MarkedText name)
        {
            return Attribute(run, value, name.Text);
        }

        long i = Number(run, index);
        switch (value)
        {
            case List<object?> list:
                i += i < 0 ? list.Count : 0;
                return i >= 0 && i < list.Count ? list[(int)i] : Undefined;
            case MarkedText text:
                i += i < 0 ? text.Text.Length : 0;
                return i >= 0 && i < text.Text.Length ? text.Slice((int)i, 1) : Undefined;
            default:
                throw run.Error($"{NameOf(value)} has no items");
        }
    }

    /// <summary><c>value[start:end]</c>; null for an end that is not given.</summary>
    public static object Slice(JinjaRun run, object? value, object? start, object? end)
    {
        int count = value switch
        {
            List<object?> list => list.Count,
            MarkedText text => text.Text.Length,
            _ => throw run.Error($"{NameOf(value)} cannot be sliced"),
        };
        run.Charge(count);
        int from = Place(start, 0);
        int length = Math.Max(0, Place(end, count) - from);
        return value is MarkedText marked ? marked.Slice(from, length) : ((List<object?>)value!).GetRange(from, length);

        int Place(object? bound, int absent)
        {
            long n = bound is null ? absent : Number(run, bound);
            return (int)Math.Clamp(n < 0 ? n + count : n, 0, count);
        }
    }

    public static long Length(JinjaRun run, object? value) => value switch
    {
        MarkedText text => text.Text.Length,
        List<object?> list => list.Count,
        Dictionary<string, object?> map => map.Count,
        _ => throw run.Error($"{NameOf(value)} has no length"),
    };

    public static MarkedText Join(JinjaRun run, object? value, MarkedText separator)
    {
        var joined = new MarkedText.Builder();
        List<object?> list = value as List<object?> ?? throw run.Error($"{NameOf(value)} cannot be joined");
        for (int i = 0; i < list.Count; i++)
        {
            joined.Append(i == 0 ? MarkedText.Own("") : separator);
            joined.Append(Text(run, list[i]));
            run.Charge(joined.Length);
        }

        return joined.Build();
    }

    /// <summary>JSON as Python's <c>json.dumps</c> spaces it, other characters than ASCII as they are.</summary>
    public static MarkedText Json(JinjaRun run, object? value)
    {
        var json = new MarkedText.Builder();
        WriteJson(run, json, value);
        return json.Build();
    }

    private static void WriteJson(JinjaRun run, MarkedText.Builder json, object? value)
    {
        run.Charge(json.Length / 64);
        RuntimeHelpers.EnsureSufficientExecutionStack();
        void Own(string text) => json.Append(MarkedText.Own(text));
        switch (value)
        {
            case null or bool or long:
                Own(value is bool b ? (b ? "true" : "false") : Convert.ToString(value ?? "null", CultureInfo.InvariantCulture)!);
                break;
            case MarkedText text:
                json.Append(text.With($"\"{JsonEncodedText.Encode(text.Text, JavaScriptEncoder.UnsafeRelaxedJsonEscaping)}\""));
                break;
            case List<object?> list:
                for (int i = 0; i < list.Count; i++)
                {
                    Own(i == 0 ? "[" : ", ");
                    WriteJson(run, json, list[i]);
                }

                Own(list.Count == 0 ? "[]" : "]");
                break;
            case Dictionary<string, object?> map and not Namespace:
                string before = "{";
                foreach ((string key, object? item) in map)
                {
                    Own($"{before}\"{JsonEncodedText.Encode(key, JavaScriptEncoder.UnsafeRelaxedJsonEscaping)}\": ");
                    WriteJson(run, json, item);
                    before = ", ";
                }

                Own(map.Count == 0 ? "{}" : "}");
                break;
            default:
                throw run.Error($"{NameOf(value)} cannot be written as JSON");
        }
    }

    /// <summary>What <c>namespace()</c> makes: variables that a loop can set for what comes after it.</summary>
    internal sealed class Namespace() : Dictionary<string, object?>(StringComparer.Ordinal);
}
