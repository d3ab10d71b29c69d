using System.Globalization;
using System.Runtime.CompilerServices;
using TinyLlama.Data;

namespace TinyLlama.Chat;

/// <summary>Turns a template's tokens into functions that run it.</summary>
/// <param name="tokens">The tokens, <see cref="JinjaTokenKind.End"/> last.</param>
/// <param name="origin">Where the template comes from, for messages.</param>
internal sealed class JinjaParser(List<JinjaToken> tokens, string origin)
{
    private int _next;

    private JinjaToken Current => tokens[_next];

    // The word of the tag that comes next; empty where text or a value does.
    private string NextTag => Current is { Kind: JinjaTokenKind.Symbol, Text: "{%" } ? tokens[_next + 1].Text : "";

    /// <summary>The whole template.</summary>
    public JinjaStatement ParseTemplate()
    {
        JinjaStatement body = Body();
        return Current.Kind == JinjaTokenKind.End ? body : throw Unsupported($"'{NextTag}' without its beginning");
    }

    private static bool Truth(JinjaRun run, JinjaExpression condition) => JinjaValue.IsTrue(condition(run));

    // Statements to the end of the template, or to a tag that one of them does not begin with.
    private JinjaStatement Body()
    {
        RuntimeHelpers.EnsureSufficientExecutionStack();
        var statements = new List<JinjaStatement>();
        while (Current.Kind != JinjaTokenKind.End && NextTag is not ("endfor" or "endif" or "else" or "elif"))
        {
            int line = Current.Line;
            JinjaStatement statement = Statement();
            statements.Add(run =>
            {
                run.Line = line;
                run.Charge();
                statement(run);
            });
        }

        return run =>
        {
            foreach (JinjaStatement statement in statements)
            {
                statement(run);
            }
        };
    }

    private JinjaStatement Statement()
    {
        JinjaToken token = Take();
        if (token.Kind == JinjaTokenKind.Text)
        {
            MarkedText text = MarkedText.Own(token.Text);
            return run => run.Write(text);
        }

        if (token.Text == "{{")
        {
            JinjaExpression value = Expression();
            Expect("}}");
            return run => run.Write(JinjaValue.Text(run, value(run)));
        }

        JinjaToken word = Take();
        switch (word.Text)
        {
            case "for":
                return For();
            case "if":
                return If();
            case "set":
                return Set();
            default:
                _next--;
                throw Unsupported($"the tag '{word.Text}'");
        }
    }

    private JinjaStatement For()
    {
        string name = Name();
        if (Current.Text == ",")
        {
            throw Unsupported("a loop over pairs");
        }

        Expect("in");
        JinjaExpression sequence = Expression(allowsIf: false);
        if (Current.Text == "if")
        {
            throw Unsupported("a loop with a condition");
        }

        Expect("%}");
        JinjaStatement body = Body();
        if (NextTag == "else")
        {
            throw Unsupported("'else' of a loop");
        }

        EndTag("endfor");
        return run =>
        {
            object? value = sequence(run);
            List<object?> items = value switch
            {
                List<object?> list => list,
                Dictionary<string, object?> map and not JinjaValue.Namespace => [.. map.Keys.Select(MarkedText.Foreign)],
                _ => throw run.Error($"a loop goes over a list, not over {JinjaValue.NameOf(value)}"),
            };
            for (int i = 0; i < items.Count; i++)
            {
                run.Charge();
                run.InScope(new(StringComparer.Ordinal) { [name] = items[i], ["loop"] = LoopVariable(i, items.Count) }, body);
            }
        };
    }

    private static Dictionary<string, object?> LoopVariable(int index, int count) => new(StringComparer.Ordinal)
    {
        ["index"] = index + 1L,
        ["index0"] = (long)index,
        ["first"] = index == 0,
        ["last"] = index == count - 1,
        ["length"] = (long)count,
    };

    private JinjaStatement If()
    {
        JinjaExpression condition = Expression();
        Expect("%}");
        JinjaStatement body = Body();
        JinjaStatement otherwise = static _ => { };
        switch (NextTag)
        {
            case "elif":
                _next += 2;
                otherwise = If();
                break;
            case "else":
                EndTag("else");
                otherwise = Body();
                EndTag("endif");
                break;
            default:
                EndTag("endif");
                break;
        }

        return run =>
        {
            RuntimeHelpers.EnsureSufficientExecutionStack();
            (Truth(run, condition) ? body : otherwise)(run);
        };
    }

    private JinjaStatement Set()
    {
        string name = Name();
        string? attribute = Accept(".") ? Name() : null;
        if (Current.Text == "%}")
        {
            throw Unsupported("'set' without a value");
        }

        Expect("=");
        JinjaExpression value = Expression();
        Expect("%}");
        return attribute is null
            ? run => run.Set(name, value(run))
            : run => (run.Get(name) as JinjaValue.Namespace ?? throw run.Error($"'{name}' is no namespace"))[attribute] = value(run);
    }

    private JinjaExpression Expression(bool allowsIf = true)
    {
        RuntimeHelpers.EnsureSufficientExecutionStack();
        JinjaExpression value = Or();
        if (!allowsIf || !Accept("if"))
        {
            return value;
        }

        JinjaExpression condition = Or();
        JinjaExpression otherwise = Accept("else") ? Expression() : static _ => JinjaValue.Undefined;
        return run => (Truth(run, condition) ? value : otherwise)(run);
    }

    private JinjaExpression Or()
    {
        JinjaExpression left = And();
        while (Accept("or"))
        {
            (JinjaExpression first, JinjaExpression second) = (left, And());
            left = Operation(run => first(run) is var value && JinjaValue.IsTrue(value) ? value : second(run));
        }

        return left;
    }

    private JinjaExpression And()
    {
        JinjaExpression left = Not();
        while (Accept("and"))
        {
            (JinjaExpression first, JinjaExpression second) = (left, Not());
            left = Operation(run => first(run) is var value && JinjaValue.IsTrue(value) ? second(run) : value);
        }

        return left;
    }

    private JinjaExpression Not()
    {
        RuntimeHelpers.EnsureSufficientExecutionStack();
        if (!Accept("not"))
        {
            return Comparison();
        }

        JinjaExpression value = Not();
        return Operation(run => !Truth(run, value));
    }

    private JinjaExpression Comparison()
    {
        JinjaExpression left = Sum();
        while (true)
        {
            bool negated = Current.Text == "not" && tokens[_next + 1].Text == "in" && Accept("not");
            string symbol = Current.Kind == JinjaTokenKind.String ? "" : Current.Text;
            if (symbol is not ("==" or "!=" or "<" or ">" or "<=" or ">=" or "in"))
            {
                return left;
            }

            _next++;
            (JinjaExpression first, JinjaExpression second) = (left, Sum());
            left = Operation(symbol switch
            {
                "==" => run => JinjaValue.AreEqual(run, first(run), second(run)),
                "!=" => run => !JinjaValue.AreEqual(run, first(run), second(run)),
                "<" => run => JinjaValue.Compare(run, first(run), second(run)) < 0,
                ">" => run => JinjaValue.Compare(run, first(run), second(run)) > 0,
                "<=" => run => JinjaValue.Compare(run, first(run), second(run)) <= 0,
                ">=" => run => JinjaValue.Compare(run, first(run), second(run)) >= 0,
                _ => run => JinjaValue.Contains(run, second(run), first(run)) != negated,
            });
        }
    }

    private JinjaExpression Sum()
    {
        JinjaExpression left = Remainder();
        while (Current is { Kind: JinjaTokenKind.Symbol, Text: "+" or "-" or "~" })
        {
            string symbol = Take().Text;
            (JinjaExpression first, JinjaExpression second) = (left, Remainder());
            left = Operation(symbol switch
            {
                "+" => run => JinjaValue.Add(run, first(run), second(run)),
                "-" => run => unchecked(JinjaValue.Number(run, first(run)) - JinjaValue.Number(run, second(run))),
                _ => run => JinjaValue.Add(run, JinjaValue.Text(run, first(run)), JinjaValue.Text(run, second(run))),
            });
        }

        return left;
    }

    private JinjaExpression Remainder()
    {
        JinjaExpression left = Unary();
        while (Current is { Kind: JinjaTokenKind.Symbol, Text: "%" or "*" or "/" or "//" or "**" })
        {
            if (Current.Text != "%")
            {
                throw Unsupported($"the operator '{Current.Text}'");
            }

            _next++;
            (JinjaExpression first, JinjaExpression second) = (left, Unary());
            left = Operation(run =>
            {
                (long a, long b) = (JinjaValue.Number(run, first(run)), JinjaValue.Number(run, second(run)));
                return b > 0 ? ((a % b) + b) % b : throw run.Error("a remainder is taken of a number that is not positive");
            });
        }

        return left;
    }

    private JinjaExpression Unary()
    {
        if (!Accept("-"))
        {
            return Postfix(Primary());
        }

        JinjaExpression value = Postfix(Primary());
        return Operation(run => unchecked(-JinjaValue.Number(run, value(run))));
    }

    private JinjaExpression Primary()
    {
        JinjaToken token = Take();
        switch (token.Kind)
        {
            case JinjaTokenKind.String:
                MarkedText text = MarkedText.Own(token.Text);
                return _ => text;
            case JinjaTokenKind.Number:
                long number = long.Parse(token.Text, CultureInfo.InvariantCulture);
                return _ => number;
            case JinjaTokenKind.Name when Current is { Kind: JinjaTokenKind.Symbol, Text: "(" }:
                return Call(token.Text);
            case JinjaTokenKind.Name:
                return token.Text switch
                {
                    "true" or "True" => _ => true,
                    "false" or "False" => _ => false,
                    "none" or "None" => _ => null,
                    _ => run => run.Get(token.Text),
                };
            case JinjaTokenKind.Symbol when token.Text == "(":
                JinjaExpression inner = Expression();
                Expect(")");
                return inner;
            case JinjaTokenKind.Symbol when token.Text == "[":
                List<JinjaExpression> items = List("]");
                return Operation(run => items.ConvertAll(item => item(run)));
            case JinjaTokenKind.Symbol when token.Text == "{":
                throw Unsupported("a mapping in braces");
            default:
                _next--;
                throw Unsupported($"'{token.Text}' in this place");
        }
    }

    private JinjaExpression Call(string function)
    {
        _next++;
        switch (function)
        {
            case "raise_exception":
                JinjaExpression message = Expression();
                Expect(")");
                return run => throw new UserErrorException($"the chat template refuses this conversation: {JinjaValue.Text(run, message(run))}");
            case "namespace":
                return Namespace();
            default:
                throw Unsupported($"the function '{function}'");
        }
    }

    private JinjaExpression Namespace()
    {
        var variables = new List<(string Name, JinjaExpression Value)>();
        while (!Accept(")"))
        {
            string name = Name();
            Expect("=");
            variables.Add((name, Expression()));
            if (Current.Text != ")")
            {
                Expect(",");
            }
        }

        return Operation(run =>
        {
            var made = new JinjaValue.Namespace();
            foreach ((string name, JinjaExpression value) in variables)
            {
                made[name] = value(run);
            }

            return made;
        });
    }

    private JinjaExpression Postfix(JinjaExpression value)
    {
        while (true)
        {
            JinjaExpression inner = value;
            if (Accept("."))
            {
                string name = Name();
                value = Accept("(") ? JinjaFunctions.Method(name, inner, List(")")) ?? throw Unsupported($"the method '{name}'")
                    : run => JinjaValue.Attribute(run, inner(run), name);
            }
            else if (Accept("["))
            {
                value = Index(inner);
            }
            else if (Accept("|"))
            {
                string name = Name();
                value = JinjaFunctions.Filter(name, inner, Accept("(") ? List(")") : []) ?? throw Unsupported($"the filter '{name}'");
            }
            else if (Accept("is"))
            {
                bool negated = Accept("not");
                string name = Name();
                Func<object?, bool> test = JinjaFunctions.Test(name) ?? throw Unsupported($"the test '{name}'");
                value = run => test(inner(run)) != negated;
            }
            else
            {
                return value;
            }

            value = Operation(value);
        }
    }

    private JinjaExpression Index(JinjaExpression value)
    {
        JinjaExpression none = static _ => null;
        JinjaExpression start = Current.Text == ":" ? none : Expression();
        if (Accept("]"))
        {
            return run => JinjaValue.Item(run, value(run), start(run));
        }

        Expect(":");
        JinjaExpression end = Current.Text == "]" ? none : Expression();
        if (Current.Text == ":")
        {
            throw Unsupported("a slice with a step");
        }

        Expect("]");
        return run => JinjaValue.Slice(run, value(run), start(run), end(run));
    }

    private List<JinjaExpression> List(string end)
    {
        var items = new List<JinjaExpression>();
        while (!Accept(end))
        {
            if (Current.Kind == JinjaTokenKind.Name && tokens[_next + 1] is { Kind: JinjaTokenKind.Symbol, Text: "=" })
            {
                throw Unsupported($"the named argument '{Current.Text}'");
            }

            items.Add(Expression());
            if (Current.Text != end)
            {
                Expect(",");
            }
        }

        return items;
    }

    // Every operation counts, and none can end the process by a stack that is too small.
    private static JinjaExpression Operation(JinjaExpression expression) => run =>
    {
        run.Charge();
        RuntimeHelpers.EnsureSufficientExecutionStack();
        return expression(run);
    };

    private JinjaToken Take() => Current.Kind == JinjaTokenKind.End ? throw Unsupported("a template that ends here") : tokens[_next++];

    private string Name() => Current.Kind == JinjaTokenKind.Name ? Take().Text : throw Unsupported($"'{Current.Text}' in place of a name");

    private bool Accept(string text)
    {
        bool isNext = Current.Kind is JinjaTokenKind.Symbol or JinjaTokenKind.Name && Current.Text == text;
        _next += isNext ? 1 : 0;
        return isNext;
    }

    private void Expect(string text)
    {
        if (!Accept(text))
        {
            throw Unsupported($"'{Current.Text}' in place of '{text}'");
        }
    }

    private void EndTag(string word)
    {
        Expect("{%");
        Expect(word);
        Expect("%}");
    }

    private UserErrorException Unsupported(string what) => Jinja.Error(origin, Current.Line, $"{what} is not supported");
}
