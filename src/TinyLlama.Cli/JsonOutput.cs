using System.Text.Encodings.Web;
using System.Text.Json;

namespace TinyLlama.Cli;

/// <summary>
/// What <c>--json</c> writes: one indented document on standard output, snake_case keys, plain numbers in the units
/// that their names tell. Verbs build it of <see cref="System.Text.Json.Nodes.JsonObject"/>, which needs no reflection.
/// </summary>
internal static class JsonOutput
{
    /// <summary>Indented; characters outside ASCII stay readable.</summary>
    public static JsonSerializerOptions Options { get; } = new()
    {
        WriteIndented = true,
        Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
    };
}
