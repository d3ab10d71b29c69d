using System.Text;
using TinyLlama.Data;
using YamlDotNet.Core;
using YamlDotNet.Core.Events;

namespace TinyLlama.Training;

/// <summary>
/// Recipes as YAML: sections of keys, at most two levels deep. What is set later wins: the preset, the file, the
/// variable <see cref="Variable"/>, then flags. All mistakes are reported at once, each with file, line and column.
/// </summary>
public static class RecipeFile
{
    /// <summary>An environment variable with settings such as <c>threads=4; seed=7</c>.</summary>
    public const string Variable = "TINYLLAMA_SET";

    private const string Model = "model";
    private const string Budget = "budget.";

    /// <summary>More than any recipe, and too little to hurt.</summary>
    private const long MostBytes = 1 << 20;
    private const int MostDepth = 16;
    private const int MostProblems = 50;

    /// <summary>Reads a recipe file and what overrides it.</summary>
    /// <param name="path">The file.</param>
    /// <param name="sets">Flags, each <c>key=value</c>.</param>
    /// <exception cref="UserErrorException">A line for each mistake.</exception>
    public static Recipe Read(string path, params ReadOnlySpan<string> sets)
    {
        if (!File.Exists(path))
        {
            throw new UserErrorException($"{path}: there is no such recipe");
        }

        if (new FileInfo(path).Length > MostBytes)
        {
            throw new UserErrorException($"{path}: larger than {MostBytes:N0} bytes, which is no recipe");
        }

        return Parse(File.ReadAllText(path), path, Environment.GetEnvironmentVariable(Variable), sets);
    }

    /// <summary>Reads a recipe from a text.</summary>
    /// <param name="yaml">The text.</param>
    /// <param name="name">What messages call it.</param>
    /// <param name="variable">The value of <see cref="Variable"/>, or null.</param>
    /// <param name="sets">Flags, each <c>key=value</c>.</param>
    /// <exception cref="UserErrorException">A line for each mistake.</exception>
    public static Recipe Parse(string yaml, string name, string? variable = null, params ReadOnlySpan<string> sets)
    {
        List<string> problems = [];
        Dictionary<string, RecipeValue> values = ReadYaml(yaml, name, problems);
        string[] settings = variable?.Split(';', StringSplitOptions.RemoveEmptyEntries | StringSplitOptions.TrimEntries) ?? [];
        Merge(values, ReadSettings(settings, Variable, problems));
        Merge(values, ReadSettings(sets, "--set", problems));
        Recipe recipe = Apply(values, problems);
        return problems.Count == 0 ? recipe : throw new UserErrorException(string.Join('\n', problems));
    }

    /// <summary>Every key of a recipe as YAML; read again it is an equal recipe.</summary>
    public static string Write(Recipe recipe)
    {
        var yaml = new StringBuilder();
        string section = "";
        foreach (RecipeKey key in RecipeKeys.All)
        {
            if (key.Write(recipe) is not string value)
            {
                continue;
            }

            int dot = key.Name.IndexOf('.', StringComparison.Ordinal);
            string own = dot < 0 ? "" : key.Name[..dot];
            if (own != section && own.Length > 0)
            {
                yaml.Append(own).Append(":\n");
            }

            section = own;
            yaml.Append(dot < 0 ? "" : "  ").Append(key.Name.AsSpan(dot + 1)).Append(": ").Append(value).Append('\n');
        }

        return yaml.ToString();
    }

    /// <summary>The keys that two recipes differ in.</summary>
    /// <returns>Name, value before and value after; <c>–</c> where one does not set it.</returns>
    public static IReadOnlyList<(string Key, string Before, string After)> Differences(Recipe before, Recipe after) =>
    [
        .. RecipeKeys.All
            .Select(key => (key.Name, Before: key.Write(before) ?? "–", After: key.Write(after) ?? "–"))
            .Where(key => key.Before != key.After),
    ];

    /// <summary>Lets a later layer win.</summary>
    private static void Merge(Dictionary<string, RecipeValue> values, Dictionary<string, RecipeValue> later)
    {
        // The three kinds of budget exclude each other: a flag that names one takes the place of the file's.
        if (later.Keys.Any(IsBudget))
        {
            foreach (string key in values.Keys.Where(IsBudget).ToList())
            {
                values.Remove(key);
            }
        }

        foreach ((string key, RecipeValue value) in later)
        {
            values[key] = value;
        }

        static bool IsBudget(string key) => key.StartsWith(Budget, StringComparison.Ordinal);
    }

    private static Dictionary<string, RecipeValue> ReadSettings(
        ReadOnlySpan<string> settings, string place, List<string> problems)
    {
        var values = new Dictionary<string, RecipeValue>(StringComparer.Ordinal);
        foreach (string setting in settings)
        {
            int equals = setting.IndexOf('=', StringComparison.Ordinal);
            if (equals < 1)
            {
                problems.Add($"{place} {setting}: want key=value, such as optimizer.learning_rate=3e-4");
                continue;
            }

            string key = Expand(setting[..equals].Trim());
            string text = setting[(equals + 1)..].Trim();
            string where = $"{place} {setting}";
            if (!IsKnown(key))
            {
                problems.Add($"{where}: {Unknown(key)}");
            }
            else if (text.StartsWith('['))
            {
                // A list is written as in the file.
                foreach ((_, RecipeValue list) in ReadYaml($"{{{Inside(key)}: {text}}}", where, problems, Section(key)))
                {
                    values[key] = list with { Place = where };
                }
            }
            else
            {
                values[key] = new RecipeValue(key, [text], IsSequence: false, where);
            }
        }

        return values;
    }

    /// <summary>The keys of a YAML text with their values; events instead of nodes, so that no depth is ever recursed into.</summary>
    private static Dictionary<string, RecipeValue> ReadYaml(
        string yaml, string name, List<string> problems, string section = "")
    {
        var values = new Dictionary<string, RecipeValue>(StringComparer.Ordinal);
        try
        {
            var parser = new Parser(new StringReader(yaml));
            parser.Consume<StreamStart>();
            if (parser.TryConsume<DocumentStart>(out _))
            {
                if (parser.TryConsume<MappingStart>(out _))
                {
                    ReadMapping(parser, section, name, values, problems);
                    parser.Consume<DocumentEnd>();
                    if (parser.Current is DocumentStart second)
                    {
                        problems.Add($"{Place(name, second)}: a second document begins; a recipe is one");
                    }
                }
                else
                {
                    problems.Add($"{Place(name, parser.Current!)}: a recipe is a mapping, lines of 'key: value'");
                }
            }
        }
        catch (UserErrorException error)
        {
            problems.Add(error.Message);
        }
        catch (YamlException error)
        {
            // Of a tab the library tells where the mapping begins around it.
            int tab = Array.FindIndex(yaml.Split('\n'), static line => line.TrimStart(' ').StartsWith('\t'));
            problems.Add(tab >= 0
                ? $"{name}:{tab + 1}:1: indented with a tab; YAML is indented with spaces"
                : $"{name}:{error.Start.Line}:{error.Start.Column}: not YAML: {error.Message}");
        }

        return values;
    }

    private static void ReadMapping(
        Parser parser, string section, string name, Dictionary<string, RecipeValue> values, List<string> problems)
    {
        while (!parser.TryConsume<MappingEnd>(out _))
        {
            if (!parser.TryConsume<Scalar>(out Scalar? word))
            {
                throw new UserErrorException($"{Place(name, parser.Current!)}: a key is wanted");
            }

            if (problems.Count >= MostProblems)
            {
                throw new UserErrorException($"{Place(name, word)}: and so on; that is no recipe");
            }

            string place = Place(name, word);
            string key = section.Length == 0 ? word.Value : $"{section}.{word.Value}";
            if (section.Length == 0 && IsSection(key) && parser.TryConsume<MappingStart>(out _))
            {
                ReadMapping(parser, key, name, values, problems);
                continue;
            }

            key = Expand(key);
            RecipeValue? value = ReadValue(parser, key, place, problems);
            if (value is not null && !values.TryAdd(key, value))
            {
                problems.Add($"{place}: {key} is already set at {values[key].Place}");
            }
        }
    }

    /// <summary>A scalar or a list of scalars; anything else is a problem and is skipped.</summary>
    private static RecipeValue? ReadValue(Parser parser, string key, string place, List<string> problems)
    {
        string? problem = !IsKnown(key) ? Unknown(key)
            : parser.Current is AnchorAlias ? $"{key} is an alias, which a recipe does not have"
            : parser.Current is MappingStart ? $"{key} has keys below it, but a single value is wanted"
            : null;
        if (problem is not null)
        {
            problems.Add($"{place}: {problem}");
            Skip(parser, place);
            return null;
        }

        if (parser.TryConsume<Scalar>(out Scalar? scalar))
        {
            return new RecipeValue(key, [scalar.Value], IsSequence: false, place);
        }

        parser.Consume<SequenceStart>();
        List<string> items = [];
        while (!parser.TryConsume<SequenceEnd>(out _))
        {
            if (parser.TryConsume<Scalar>(out Scalar? item))
            {
                items.Add(item.Value);
            }
            else
            {
                problems.Add($"{place}: {key} has an item that is no single value");
                Skip(parser, place);
            }
        }

        return new RecipeValue(key, items, IsSequence: true, place);
    }

    /// <summary>Passes over a value. Nothing in a recipe nests; the parser's own cost is quadratic in the depth.</summary>
    private static void Skip(Parser parser, string place)
    {
        int depth = 0;
        do
        {
            depth += parser.Current!.NestingIncrease;
            if (depth > MostDepth)
            {
                throw new UserErrorException($"{place}: nests deeper than {MostDepth} levels; that is no recipe");
            }

            parser.MoveNext();
        }
        while (depth > 0);
    }

    private static Recipe Apply(Dictionary<string, RecipeValue> values, List<string> problems)
    {
        var recipe = new Recipe();
        foreach (RecipeKey key in RecipeKeys.All)
        {
            if (values.TryGetValue(key.Name, out RecipeValue? value))
            {
                try
                {
                    recipe = key.Read(recipe, value);
                }
                catch (UserErrorException mistake)
                {
                    problems.Add(mistake.Message);
                }
            }
        }

        return recipe with
        {
            Origins = new RecipeOrigins(values.ToDictionary(pair => pair.Key, pair => pair.Value.Place, StringComparer.Ordinal)),
        };
    }

    /// <summary><c>model: X</c> is short for the preset.</summary>
    private static string Expand(string key) => key == Model ? "model.preset" : key;

    private static bool IsKnown(string key) => RecipeKeys.All.Any(known => known.Name == key);

    private static bool IsSection(string word) =>
        RecipeKeys.All.Any(key => key.Name.StartsWith(word + ".", StringComparison.Ordinal));

    private static string Section(string key) => key.IndexOf('.', StringComparison.Ordinal) is int dot and > 0 ? key[..dot] : "";

    private static string Inside(string key) => key[(key.IndexOf('.', StringComparison.Ordinal) + 1)..];

    private static string Place(string name, ParsingEvent at) => $"{name}:{at.Start.Line}:{at.Start.Column}";

    private static string Unknown(string key)
    {
        if (IsSection(key))
        {
            return $"{key} is a section; below it may stand {KeysOf(key)}";
        }

        const int Longest = 64;
        if (key.Length > Longest)
        {
            return $"{key[..Longest]}… is no key of a recipe";
        }

        // A key may be misspelt, or stand in the wrong section.
        IEnumerable<string> names = RecipeKeys.All.Select(known => known.Name)
            .Concat(RecipeKeys.All.Select(known => Section(known.Name)).Where(section => section.Length > 0).Distinct());
        int DistanceTo(string known) => Math.Min(NearestName.Distance(key, known), NearestName.Distance(Inside(key), Inside(known)) + 1);
        string nearest = names.MinBy(DistanceTo)!;
        return DistanceTo(nearest) <= Math.Max(1, Inside(key).Length / 3) || !IsSection(Section(key))
            ? $"{key} is no key of a recipe; did you mean {nearest}?"
            : $"{key} is no key of a recipe; below {Section(key)} may stand {KeysOf(Section(key))}";
    }

    private static string KeysOf(string section) =>
        string.Join(", ", RecipeKeys.All.Where(known => Section(known.Name) == section).Select(known => Inside(known.Name)));
}
