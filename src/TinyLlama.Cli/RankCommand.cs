using System.CommandLine;
using System.CommandLine.Parsing;
using System.Globalization;
using TinyLlama.Compute.Collectives;
using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary>What the verbs that run as several ranks share: how the ranks are started here, and how one ends.</summary>
internal static class RankCommand
{
    /// <summary>What launchers set in the environment of every rank.</summary>
    private static readonly string[] s_worlds = ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"];

    /// <summary><c>--ranks N</c>, which is refused where something else has started the ranks.</summary>
    public static Option<int?> Ranks(string description)
    {
        Option<int?> option = CommonOptions.AtLeast(new Option<int?>("--ranks") { Description = description, HelpName = "N" }, 1);
        option.Validators.Add(static result =>
        {
            if (s_worlds.FirstOrDefault(name => Environment.GetEnvironmentVariable(name) is not null) is string world)
            {
                result.AddError($"--ranks starts the ranks, but {world} is set: this process is a rank already; leave --ranks out");
            }
        });
        return option;
    }

    /// <summary>Starts a command once a rank and sees it through.</summary>
    /// <param name="ranks">The number of ranks.</param>
    /// <param name="restarts">How often all may be started again.</param>
    /// <param name="folder">What they work on; their logs are in there.</param>
    /// <param name="proof">The file of it that proves that all is done.</param>
    /// <param name="arguments">The command of one rank.</param>
    /// <param name="isDone">Whether it does prove it.</param>
    /// <param name="stop">Asks the ranks to stop.</param>
    /// <returns>One of <see cref="ExitCode"/>, or that of the rank that failed.</returns>
    public static async Task<int> Supervise(
        int ranks, int restarts, string folder, string proof, string[] arguments, Func<bool> isDone, CancellationToken stop)
    {
        var supervisor = new RankSupervisor(ranks, restarts, folder, proof, () => RankProcess.Command(arguments), isDone, Console.Error);
        int code = await supervisor.RunAsync(stop);
        if (!Console.IsErrorRedirected && !Console.IsOutputRedirected)
        {
            // A rank that was ended while it drew its progress has left it hidden.
            Console.CursorVisible = true;
        }

        return code;
    }

    /// <summary>The words of the command that one rank runs: those that were given, without the options that are for all.</summary>
    /// <param name="parse">The command.</param>
    /// <param name="ranks">The number of ranks, which divide the cores between them where nobody says how many threads each has.</param>
    /// <param name="hasThreads">Whether somebody does.</param>
    /// <param name="left">Options to leave out, with their values.</param>
    public static string[] Arguments(ParseResult parse, int ranks, bool hasThreads, params Option[] left)
    {
        var words = new List<string>();
        for (int i = 0; i < parse.Tokens.Count; i++)
        {
            if (parse.Tokens[i] is { Type: TokenType.Option } token && left.Any(option => option.Name == token.Value))
            {
                i++;
            }
            else
            {
                words.Add(parse.Tokens[i].Value);
            }
        }

        string[] threads = hasThreads ? [] : ["--threads", Math.Max(1, Environment.ProcessorCount / ranks).ToString(CultureInfo.InvariantCulture)];
        return [.. words, .. threads];
    }

    /// <summary>Ends the process, whose rank cannot go on, before anything is disposed of that would wait for the other ranks.</summary>
    /// <param name="reason">Why.</param>
    /// <param name="ranks">All ranks.</param>
    /// <param name="say">Is told why, in a line.</param>
    /// <param name="stop">What was to stop it.</param>
    public static void End(Exception reason, Collective ranks, Action<string> say, CancellationToken stop)
    {
        using var lines = new StringWriter();
        int code = CommandLine.Report(reason, lines, stop);
        string text = lines.ToString().TrimEnd();
        RankEnd.Now(ranks, say, text, code);
    }
}
