using System.CommandLine;
using System.CommandLine.Help;
using System.CommandLine.Parsing;
using System.Globalization;
using System.Text;
using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;
using TinyLlama.Data;

namespace TinyLlama.Cli;

/// <summary>The frame around the verbs: parsing, errors and exit codes.</summary>
internal static class CommandLine
{
    /// <summary>Where a defect is reported.</summary>
    private const string ReportTo = "please report it, with these lines and the command";

    /// <summary>Runs one command.</summary>
    /// <param name="root">The command with its verbs.</param>
    /// <param name="arguments">The words after the program's name.</param>
    /// <param name="output">Where results go.</param>
    /// <param name="error">Where errors and progress go.</param>
    /// <param name="stop">Asks the verb to stop cleanly.</param>
    /// <returns>One of <see cref="ExitCode"/>.</returns>
    public static async Task<int> RunAsync(
        RootCommand root, string[] arguments, TextWriter output, TextWriter error, CancellationToken stop)
    {
        // Options are whole words: "-abc" is not "-a -b -c".
        ParseResult parse = root.Parse(arguments, new ParserConfiguration { EnablePosixBundling = false });
        bool asksForHelp = parse.Action is HelpAction;
        if (!asksForHelp && Mistake(parse) is { } mistake)
        {
            Write(error, [$"error: {string.Join(' ', Lines(mistake)).TrimEnd('.')}; see '{string.Join(' ', Verb(parse))} --help'"]);
            return ExitCode.UserError;
        }

        try
        {
            // The signals are ours: a null timeout keeps the library from ending a run that is saving its checkpoint.
            var configuration = new InvocationConfiguration
            {
                EnableDefaultExceptionHandler = false,
                ProcessTerminationTimeout = null,
                Output = output,
                Error = error,
            };
            return await parse.InvokeAsync(configuration, stop);
        }
#pragma warning disable CA1031 // The last handler: it decides what the user sees of any exception.
        catch (Exception exception)
#pragma warning restore CA1031
        {
            return Report(exception, error, stop);
        }
    }

    /// <summary>Opens standard input as UTF-8; reading another encoding ends with <see cref="DecoderFallbackException"/>.</summary>
    public static TextReader OpenInput() => new StreamReader(Console.OpenStandardInput(), new UTF8Encoding(false, throwOnInvalidBytes: true));

    /// <summary>Says in a line each what the user can mend; anything else is a defect and shows where it happened.</summary>
    public static int Report(Exception exception, TextWriter error, CancellationToken stop)
    {
        while (exception is AggregateException { InnerExceptions: [Exception only] })
        {
            exception = only;
        }

        (int code, IEnumerable<string> lines) = exception switch
        {
            OperationCanceledException when stop.IsCancellationRequested => (ExitCode.Stopped, ["stopped"]),
            UserErrorException or DeviceException or IOException or UnauthorizedAccessException =>
                (ExitCode.UserError, Lines(exception.Message).Select(static line => $"error: {line}")),
            DecoderFallbackException => (ExitCode.UserError, ["error: the input is not UTF-8 text; convert it first"]),
            CollectiveException => (ExitCode.RanksLost, Lines(exception.Message).Select(static line => $"error: {line}")),
            OutOfMemoryException => (ExitCode.UserError, ["error: this machine has too little memory for that"]),
            _ => (ExitCode.Defect, [$"This is a defect of tinyllama {Program.Version}; {ReportTo}:", exception.ToString()]),
        };
        Write(error, lines);
        return code;
    }

    private static void Write(TextWriter error, IEnumerable<string> lines)
    {
        try
        {
            foreach (string line in lines)
            {
                error.WriteLine(line);
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // The disk of standard error is full, or it is closed: the exit code alone tells.
        }
    }

    private static string? Mistake(ParseResult parse)
    {
        // To the library 0,5 is 5.
        foreach (Option option in parse.CommandResult.Command.Options.Where(static option => (Nullable.GetUnderlyingType(option.ValueType) ?? option.ValueType) == typeof(double)))
        {
            if (parse.GetResult(option)?.Tokens is [{ Value: string text }] && !double.TryParse(text, NumberStyles.Float, CultureInfo.InvariantCulture, out _))
            {
                return $"{option.Name} is '{text}', a number is needed, such as 0.5";
            }
        }

        return parse.Errors.Count == 0 ? null : Describe(parse.Errors[0]);
    }

    // Of a text that is no number of an option's type the library tells the runtime's name of that type.
    private static string Describe(ParseError mistake) =>
        mistake.SymbolResult is not OptionResult { Option: { } option, Tokens: [{ Value: string text }] } || !mistake.Message.Contains("as expected type", StringComparison.Ordinal)
            ? mistake.Message
            : Int128.TryParse(text, NumberStyles.Integer, CultureInfo.InvariantCulture, out _)
            ? $"{option.Name} is {text}, which is out of range"
            : $"{option.Name} is '{text}', a whole number is needed";

    private static IEnumerable<string> Verb(ParseResult parse)
    {
        yield return Program.Name;
        var names = new Stack<string>();
        for (var command = parse.CommandResult; command is not null && command.Command is not RootCommand;
            command = command.Parent as System.CommandLine.Parsing.CommandResult)
        {
            names.Push(command.Command.Name);
        }

        foreach (string name in names)
        {
            yield return name;
        }
    }

    /// <summary>A mistake is a line; what a user's file brings into it cannot steer the terminal.</summary>
    private static IEnumerable<string> Lines(string message) => message
        .Split(['\r', '\n'], StringSplitOptions.RemoveEmptyEntries | StringSplitOptions.TrimEntries)
        .Select(line => string.Concat(line.Select(c => char.IsControl(c) ? '?' : c)));
}
