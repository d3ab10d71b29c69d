using System.CommandLine;
using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Model;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama presets</c>: the model shapes that a recipe may name.</summary>
internal static class PresetsCommand
{
    /// <summary>The verb.</summary>
    public static Command Create()
    {
        var json = CommonOptions.Json();
        var command = new Command("presets", "List the model shapes that a recipe may name") { json };
        command.SetAction(parse =>
        {
            TextWriter output = parse.InvocationConfiguration.Output;
            if (parse.GetValue(json))
            {
                output.WriteLine(new JsonArray([.. Presets.All.Select(Describe)]).ToJsonString(JsonOutput.Options));
            }
            else
            {
                WriteTable(output);
            }

            return ExitCode.Success;
        });
        return command;
    }

    private static JsonObject Describe(ModelPreset preset) => new()
    {
        ["name"] = preset.Name,
        ["description"] = preset.Description,
        ["parameters"] = preset.Config.ParameterCount,
        ["flops_per_token"] = Flops.PerToken(preset.Config, preset.Config.ContextLength),
        ["vocabulary"] = preset.Config.VocabularySize,
        ["context"] = preset.Config.ContextLength,
        ["layers"] = preset.Config.Layers,
        ["heads"] = preset.Config.Heads,
        ["key_value_heads"] = preset.Config.KeyValueHeads,
        ["channels"] = preset.Config.Channels,
        ["hidden"] = preset.Config.Hidden,
        ["rope_factor"] = preset.Config.RopeFactor,
        ["tied_embeddings"] = preset.Config.TiedEmbeddings,
    };

    private static void WriteTable(TextWriter output)
    {
        int width = Presets.All.Max(preset => preset.Name.Length);
        output.WriteLine($"{"name".PadRight(width)} {"parameters",15} {"layers",7} {"channels",9} {"heads",7} {"vocabulary",11} {"context",8}");
        foreach ((string name, string description, ModelConfig config) in Presets.All)
        {
            string heads = $"{config.Heads}/{config.KeyValueHeads}";
            output.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"{name.PadRight(width)} {config.ParameterCount,15:N0} {config.Layers,7} {config.Channels,9:N0} {heads,7} {config.VocabularySize,11:N0} {config.ContextLength,8:N0}  {description}"));
        }

        output.WriteLine("heads: of queries/of keys and values");
    }
}
