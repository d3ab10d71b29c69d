using System.CommandLine;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama presets</c>: the model shapes that a recipe may name.</summary>
internal static class PresetsCommand
{
    /// <summary>The verb.</summary>
    public static Command Create()
    {
        var command = new Command("presets", "List the model shapes that a recipe may name");
        command.SetAction(_ => ExitCode.Success);
        return command;
    }
}
