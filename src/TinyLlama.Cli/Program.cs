using System.CommandLine;
using System.CommandLine.Help;
using System.Reflection;

namespace TinyLlama.Cli;

/// <summary>The <c>tinyllama</c> command.</summary>
internal static class Program
{
    /// <summary>The command's name.</summary>
    public const string Name = "tinyllama";

    /// <summary>Gets the version of this build.</summary>
    public static string Version =>
        typeof(Program).Assembly.GetCustomAttribute<AssemblyInformationalVersionAttribute>()?.InformationalVersion ?? "0";

    /// <summary>The root command with every verb.</summary>
    public static RootCommand CreateRoot()
    {
        var root = new RootCommand("Pretrain a Llama from raw text and use what came out.")
        {
            QuickstartCommand.Create(),
            TokenizerCommand.Create(),
            DataCommand.Create(),
            ImportCommand.Create(),
            ExportCommand.Create(),
            QuantizeCommand.Create(),
            RunsCommand.Create(),
            GenerateCommand.Create(),
            ChatCommand.Create(),
            ServeCommand.Create(),
            EvalCommand.Create(),
            PretrainCommand.Create(),
            PlanCommand.Create(),
            PresetsCommand.Create(),
            EnvCommand.Create(),
            BenchCommand.Create(),
        };
        root.SetAction(parse => new HelpAction().Invoke(parse));
        return root;
    }

    private static async Task<int> Main(string[] arguments)
    {
        using var signals = new StopSignals();
        if (RankProcess.IsSupervised)
        {
            RankProcess.FollowSupervisor(signals.Stop);
        }

        return await CommandLine.RunAsync(CreateRoot(), arguments, Console.Out, Console.Error, signals.Token);
    }
}
