using TinyLlama.Data;

namespace TinyLlama.Chat;

/// <summary>One run of a template: its variables, its output and what is left of its budget.</summary>
internal sealed class JinjaRun(string origin, Dictionary<string, object?> variables)
{
    private const int MaximumSteps = 1_000_000;
    private const int MaximumCharacters = 1 << 22;
    private const int CharactersPerStep = 64;

    private readonly List<Dictionary<string, object?>> _scopes = [variables];
    private long _steps;

    /// <summary>Gets the output.</summary>
    public MarkedText.Builder Output { get; } = new();

    /// <summary>Gets or sets the line that runs.</summary>
    public int Line { get; set; }

    /// <summary>The value of a variable; <see cref="JinjaValue.Undefined"/> where it has none.</summary>
    public object? Get(string name)
    {
        for (int i = _scopes.Count - 1; i >= 0; i--)
        {
            if (_scopes[i].TryGetValue(name, out object? value))
            {
                return value;
            }
        }

        return JinjaValue.Undefined;
    }

    /// <summary>Sets a variable of the innermost loop, or of the template.</summary>
    public void Set(string name, object? value) => _scopes[^1][name] = value;

    /// <summary>Runs the body of a loop once, with variables of its own.</summary>
    public void InScope(Dictionary<string, object?> variables, JinjaStatement body)
    {
        _scopes.Add(variables);
        body(this);
        _scopes.RemoveAt(_scopes.Count - 1);
    }

    /// <summary>Appends to the output.</summary>
    public void Write(MarkedText text)
    {
        Charge(text.Text.Length);
        if (Output.Length + text.Text.Length > MaximumCharacters)
        {
            throw Error($"it writes more than {MaximumCharacters} characters");
        }

        Output.Append(text);
    }

    /// <summary>Counts work: a step, and one for each 64 characters or elements that are copied.</summary>
    public void Charge(int copied = 0)
    {
        _steps += 1 + (copied / CharactersPerStep);
        if (_steps > MaximumSteps)
        {
            throw Error($"it takes more than {MaximumSteps} steps");
        }

        if (copied > MaximumCharacters)
        {
            throw Error($"a value has more than {MaximumCharacters} characters");
        }
    }

    /// <summary>A complaint about the line that runs.</summary>
    public UserErrorException Error(string problem) => Jinja.Error(origin, Line, problem);
}
