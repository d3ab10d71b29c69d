using System.Text.RegularExpressions;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests;

public sealed partial class LayoutTests
{
    /// <summary>The folders of src/TinyLlama, each of which may use those before it.</summary>
    private static readonly string[] s_order = ["Model", "Checkpoints", "Chat", "Inference", "Evaluation", "Training"];

    [Fact]
    public void The_folders_of_the_library_use_only_those_before_them()
    {
        string root = Path.Combine(Checkout.Root, "src", "TinyLlama");
        Assert.Empty(Directory.GetDirectories(root).Select(path => Path.GetFileName(path)!).Except([.. s_order, "bin", "obj"]));
        List<string> upward = [];
        for (int i = 0; i < s_order.Length; i++)
        {
            string folder = Path.Combine(root, s_order[i]);
            foreach (string file in Directory.Exists(folder) ? Directory.GetFiles(folder, "*.cs", SearchOption.AllDirectories) : [])
            {
                upward.AddRange(Uses(File.ReadAllText(file))
                    .Where(used => Array.IndexOf(s_order, used) > i)
                    .Select(used => $"{Path.GetRelativePath(root, file)} uses {used}"));
            }
        }

        Assert.Empty(upward);
    }

    [Fact]
    public void Uses_are_seen_wherever_they_are_written() =>
        Assert.Equal(
            ["Training", "Model", "Inference"],
            Uses("using TinyLlama.Training;\nusing static TinyLlama.Model.Presets;\n  var x = TinyLlama.Inference.Sampler.Greedy;\n// plain TinyLlama"));

    [Fact]
    public void Only_Compute_has_unsafe_code_and_calls_the_system()
    {
        foreach (string project in Directory.GetDirectories(Path.Combine(Checkout.Root, "src")))
        {
            if (Path.GetFileName(project) != "TinyLlama.Compute")
            {
                Assert.DoesNotContain(
                    Directory.GetFiles(project, "*.cs", SearchOption.AllDirectories),
                    file => UnsafeCode().IsMatch(File.ReadAllText(file)));
            }
        }
    }

    private static IEnumerable<string> Uses(string code) => Use().Matches(code).Select(match => match.Groups["folder"].Value);

    [GeneratedRegex(@"\bTinyLlama\.(?<folder>Model|Checkpoints|Chat|Inference|Evaluation|Training)\b", RegexOptions.ExplicitCapture, 1000)]
    private static partial Regex Use();

    [GeneratedRegex(@"\bunsafe\s+[a-z{]|\[(DllImport|LibraryImport)\b", RegexOptions.ExplicitCapture, 1000)]
    private static partial Regex UnsafeCode();
}
