using TinyLlama.Data;

namespace TinyLlama.Chat;

/// <summary>Computes a value.</summary>
internal delegate object? JinjaExpression(JinjaRun run);

/// <summary>Writes to the output or sets a variable.</summary>
internal delegate void JinjaStatement(JinjaRun run);

/// <summary>
/// A template in the part of Jinja that chat templates are written in: <c>for</c>, <c>if</c>, <c>set</c>, expressions, a few
/// filters, tests and methods. What is not supported is refused by name when the template is read.
/// </summary>
/// <remarks>A template is a stranger's program: its size, steps, nesting and output are bounded.</remarks>
internal sealed class Jinja
{
    private const int MaximumSource = 1 << 16;

    private readonly string _origin;
    private readonly JinjaStatement _body;

    private Jinja(string origin, JinjaStatement body) => (_origin, _body) = (origin, body);

    /// <summary>Reads a template.</summary>
    /// <param name="source">The template.</param>
    /// <param name="origin">Where it comes from, for messages.</param>
    /// <exception cref="UserErrorException">It is damaged, too large, or uses what is not supported.</exception>
    public static Jinja Parse(string source, string origin)
    {
        if (source.Length > MaximumSource)
        {
            throw new UserErrorException($"{origin}: the chat template has {source.Length} characters, {MaximumSource} are read at most");
        }

        try
        {
            return new Jinja(origin, new JinjaParser(JinjaLexer.Read(source, origin), origin).ParseTemplate());
        }
        catch (InsufficientExecutionStackException)
        {
            throw new UserErrorException($"{origin}: the chat template is nested too deeply");
        }
    }

    /// <summary>Runs the template.</summary>
    /// <param name="variables">Its variables; see <see cref="JinjaValue"/> for what values are.</param>
    /// <exception cref="UserErrorException">It refuses its input, does something that has no meaning, or runs too long.</exception>
    public MarkedText Render(Dictionary<string, object?> variables)
    {
        var run = new JinjaRun(_origin, variables);
        try
        {
            _body(run);
        }
        catch (InsufficientExecutionStackException)
        {
            throw run.Error("values are nested too deeply");
        }

        return run.Output.Build();
    }

    /// <summary>A complaint about a line of a template.</summary>
    public static UserErrorException Error(string origin, int line, string problem) =>
        new($"{origin}: line {line} of the chat template: {problem}");
}
