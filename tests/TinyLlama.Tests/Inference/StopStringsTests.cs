using TinyLlama.Inference;

namespace TinyLlama.Tests.Inference;

public sealed class StopStringsTests
{
    [Fact]
    public void Without_stop_strings_every_piece_passes_at_once()
    {
        var stops = new StopStrings([]);
        Assert.Equal("abc", stops.Append("abc"));
        Assert.Equal("", stops.Flush());
    }

    [Fact]
    public void The_beginning_of_a_stop_string_waits_until_it_is_known()
    {
        var stops = new StopStrings(["###"]);
        Assert.Equal("a", stops.Append("a#"));
        Assert.Equal("", stops.Append("#"));
        Assert.Equal("##b", stops.Append("b"));
        Assert.Equal("", stops.Append("##"));
        Assert.Equal("", stops.Append("#c"));
        Assert.Equal("###", stops.Found);
        Assert.Equal("", stops.Append("more"));
    }

    [Fact]
    public void What_is_held_back_comes_at_the_end()
    {
        var stops = new StopStrings(["\n\nUser:"]);
        Assert.Equal("x", stops.Append("x\n\nUse"));
        Assert.Equal("\n\nUse", stops.Flush());
        Assert.Null(stops.Found);
    }

    [Fact]
    public void However_the_text_is_cut_the_result_is_the_same()
    {
        var random = new Random(3);
        for (int round = 0; round < 2000; round++)
        {
            string[] stops = [.. Enumerable.Range(0, random.Next(1, 4)).Select(_ => Text(random.Next(1, 5)))];
            string text = Text(random.Next(0, 30));
            (string expected, string? found) = Reference(text, stops);
            var filter = new StopStrings(stops);
            string given = "";
            for (int i = 0; i < text.Length;)
            {
                int count = Math.Min(random.Next(1, 5), text.Length - i);
                given += filter.Append(text.Substring(i, count));
                i += count;
                Assert.True(expected.StartsWith(given, StringComparison.Ordinal), $"'{given}' was given of '{text}', stops {string.Join(',', stops)}");
            }

            given += filter.Flush();
            Assert.Equal(expected, given);
            Assert.Equal(found, filter.Found);
        }

        string Text(int length) => string.Concat(Enumerable.Range(0, length).Select(_ => (char)('a' + random.Next(2))));
    }

    // Before the first place where a stop string ends; of several that end there, before the longest.
    private static (string Text, string? Found) Reference(string text, string[] stops)
    {
        for (int end = 1; end <= text.Length; end++)
        {
            string? found = stops.Where(s => text[..end].EndsWith(s, StringComparison.Ordinal)).MaxBy(s => s.Length);
            if (found is not null)
            {
                return (text[..(end - found.Length)], found);
            }
        }

        return (text, null);
    }
}
