using System.Text.Encodings.Web;
using System.Text.Json;

namespace TinyLlama.Checkpoints;

/// <summary>How JSON files for people and other programs are written.</summary>
internal static class JsonText
{
    /// <summary>Gets two spaces a level; characters outside ASCII stay readable.</summary>
    public static JsonSerializerOptions Indented { get; } = new()
    {
        WriteIndented = true,
        NewLine = "\n",
        Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
    };
}
