using System.IO.Compression;
using System.Text;
using TinyLlama.Data.Documents;

namespace TinyLlama.Data.Tests.Documents;

public sealed class TextFilesTests
{
    private static readonly TextFileOptions s_options = new();

    [Fact]
    public void Files_of_a_folder_are_read_in_ordinal_order_of_their_relative_paths()
    {
        using TemporaryFolder folder = new();
        foreach (string name in (string[])["b.txt", "a/z.txt", "B.txt", "a.txt", "a/b/c.jsonl", "é.txt", "a-1.txt"])
        {
            Directory.CreateDirectory(Path.GetDirectoryName(folder[name])!);
            File.WriteAllText(folder[name], name.EndsWith("jsonl", StringComparison.Ordinal) ? $"{{\"text\": \"{name}\"}}" : name);
        }

        File.WriteAllText(folder["readme.md"], "no");
        TextFiles files = TextFiles.Find([folder.Path], s_options);
        string[] expected = ["B.txt", "a-1.txt", "a.txt", "a/b/c.jsonl", "a/z.txt", "b.txt", "é.txt"];
        Assert.Equal(expected, files.Files.Select(f => f.Name));
        Assert.Equal(expected, files.Read(0).Select(d => d.Text));
        Assert.Equal(expected[2..4], files.Read(2, 4).Select(d => d.Text));
        Assert.Equal(expected[4..], files.Read(4).Select(d => d.Text));
        Assert.Equal(files.Files.Sum(f => f.Bytes), files.BytesRead);
        Assert.Equal([folder["readme.md"]], files.PassedOver);
    }

    [Fact]
    public void Links_to_folders_are_not_followed()
    {
        using TemporaryFolder folder = new();
        File.WriteAllText(folder["a.txt"], "a");
        Directory.CreateSymbolicLink(folder["loop"], folder.Path);
        Assert.Single(TextFiles.Find([folder.Path], s_options).Files);
    }

    [Fact]
    public void A_line_is_a_document_where_that_is_asked_for()
    {
        using TemporaryFolder folder = new();
        File.WriteAllText(folder["a.txt"], "\uFEFFone\r\n\r\n\n  two\nthree");
        Assert.Equal([new Document(0, 1, "one"), new Document(0, 4, "  two"), new Document(0, 5, "three")], Read(folder["a.txt"], s_options with { Lines = true }));
        Assert.Equal([new Document(0, 0, "one\r\n\r\n\n  two\nthree")], Read(folder["a.txt"], s_options));
    }

    [Fact]
    public void A_separator_stands_between_documents_where_one_is_named()
    {
        using TemporaryFolder folder = new();
        File.WriteAllText(folder["a.txt"], "<|endoftext|>\none\r\n\ntwo\n<|endoftext|>\n\n<|endoftext|>\nthree<|endoftext|>\nfour");
        Assert.Equal(
            [new Document(0, 2, "one\n\ntwo\n"), new Document(0, 8, "three<|endoftext|>\nfour\n")],
            Read(folder["a.txt"], s_options with { Separator = "<|endoftext|>" }));
        File.WriteAllText(folder["b.txt"], "\n\none\ntwo\n\n\nthree\n");
        Assert.Equal([new Document(0, 3, "one\ntwo\n"), new Document(0, 7, "three\n")], Read(folder["b.txt"], s_options with { Separator = "" }));
        Assert.Contains("the document of line 3 is longer", Error(folder["b.txt"], s_options with { Separator = "", MaximumDocumentBytes = 6 }), StringComparison.Ordinal);
        Assert.Contains("choose one", Error(folder["b.txt"], s_options with { Separator = "", Lines = true }), StringComparison.Ordinal);
    }

    [Fact]
    public void Json_lines_take_the_field_that_is_named_and_say_why_a_line_is_bad()
    {
        using TemporaryFolder folder = new();
        string[] lines =
        [
            """{"meta": {"text": "inner"}, "text": "outer \u00e9\n", "id": [1, {"text": 2}]}""",
            "",
            """{"content": "x"}""",
            """{"text": 5}""",
            """{"text": "cut""",
            """["text"]""",
            """{"text": "a"} {"text": "b"}""",
            """{"text": "\ud800"}""",
            """{"text": ""}""",
            """null""",
            """{"text": "first", "text": "second"}""",
        ];
        File.WriteAllText(folder["a.jsonl"], string.Join('\n', lines) + "\n");
        Document[] documents = Read(folder["a.jsonl"], s_options);
        Assert.Equal([1L, 3, 4, 5, 6, 7, 8, 9, 10, 11], documents.Select(d => d.Line));
        Assert.Equal(["outer é\n", "", "first"], documents.Where(d => d.Fault is null).Select(d => d.Text));
        Assert.Equal(
            [
                "it has no field 'text'",
                "its field 'text' is not a text",
                "it is not JSON: byte 13",
                "it is not a JSON object",
                "it is not JSON: byte 14",
                "its field 'text' has half a surrogate pair",
                "it is not a JSON object",
            ],
            documents.Where(d => d.Fault is not null).Select(d => d.Fault));
        Assert.Equal(lines[2], documents[1].Text);
        Assert.Equal(["x"], Read(folder["a.jsonl"], s_options with { Field = "content" }).Where(d => d.Fault is null).Select(d => d.Text));
    }

    [Fact]
    public void Text_that_is_not_UTF_8_is_bad_and_does_not_spoil_its_neighbours()
    {
        using TemporaryFolder folder = new();
        File.WriteAllBytes(folder["a.txt"], [.. "good\nb"u8, 0xE9, .. "d\nfine"u8]);
        Assert.Equal(
            [new Document(0, 1, "good"), new Document(0, 2, "b\uFFFDd", "byte 1 is not UTF-8"), new Document(0, 3, "fine")],
            Read(folder["a.txt"], s_options with { Lines = true }));
        Assert.Equal("byte 6 is not UTF-8", Read(folder["a.txt"], s_options)[0].Fault);

        File.WriteAllBytes(folder["a.jsonl"], [.. "{\"x\":\""u8, 0xFF, .. "\",\"text\":\"ok\"}"u8]);
        Assert.Equal("byte 6 is not UTF-8", Read(folder["a.jsonl"], s_options)[0].Fault);
    }

    [Fact]
    public void Gzip_is_unpacked_also_in_several_members_and_refused_where_it_is_cut_off()
    {
        using TemporaryFolder folder = new();
        byte[] packed = [.. Gzip("first\nsec"), .. Gzip("ond\nthird\n")];
        File.WriteAllBytes(folder["a.txt.gz"], packed);
        Assert.Equal(["first", "second", "third"], Read(folder["a.txt.gz"], s_options with { Lines = true }).Select(d => d.Text));
        File.WriteAllBytes(folder["b.jsonl.GZ"], Gzip("{\"text\":\"x\"}"));
        Assert.Equal(["x"], Read(folder["b.jsonl.GZ"], s_options).Select(d => d.Text));

        int first = Gzip("first\nsec").Length;
        for (int length = 1; length < packed.Length; length++)
        {
            File.WriteAllBytes(folder["cut.txt.gz"], packed[..length]);
            Assert.True(length == first || Error(folder["cut.txt.gz"], s_options).Contains("cut.txt.gz", StringComparison.Ordinal));
        }

        // Bytes that are no member would hide what they damaged.
        File.WriteAllBytes(folder["more.txt.gz"], [.. packed, .. "rest"u8]);
        Assert.Contains("something else follows", Error(folder["more.txt.gz"], s_options), StringComparison.Ordinal);

        string large = string.Concat(Enumerable.Range(0, 100_000));
        File.WriteAllBytes(folder["large.txt.gz"], Gzip(large));
        Assert.Equal(large, Read(folder["large.txt.gz"], s_options)[0].Text);

        packed[^12] ^= 0x40;
        File.WriteAllBytes(folder["bad.txt.gz"], packed);
        Assert.Contains("bad.txt.gz", Error(folder["bad.txt.gz"], s_options), StringComparison.Ordinal);
    }

    [Fact]
    public void Zstandard_goes_through_what_the_caller_supplies_and_without_it_says_what_to_do()
    {
        using TemporaryFolder folder = new();
        File.WriteAllText(folder["a.jsonl.zst"], "cba");
        Assert.Contains("unpack it first", Error(folder["a.jsonl.zst"], s_options), StringComparison.Ordinal);
        TextFileOptions options = s_options with { OpenZstandard = _ => new MemoryStream("{\"text\":\"abc\"}"u8.ToArray()) };
        Assert.Equal(["abc"], Read(folder["a.jsonl.zst"], options).Select(d => d.Text));
        options = s_options with { OpenZstandard = _ => throw new InvalidDataException("damaged") };
        Assert.Equal($"{folder["a.jsonl.zst"]}: damaged", Error(folder["a.jsonl.zst"], options));
    }

    [Theory]
    [InlineData("a.txt", true, "line 2 is longer than 1000 bytes")]
    [InlineData("a.jsonl", false, "line 2 is longer than 1000 bytes")]
    [InlineData("a.txt", false, "the file is longer than 1000 bytes")]
    public void What_is_too_long_is_refused_by_file_and_line(string name, bool lines, string message)
    {
        using TemporaryFolder folder = new();
        TextFileOptions options = s_options with { Lines = lines, MaximumDocumentBytes = 1000 };
        foreach (int length in (int[])[1001, 100_000, 1_000_000])
        {
            File.WriteAllText(folder[name], "{}\n" + new string('x', length));
            Assert.Contains($"{folder[name]}: {message}", Error(folder[name], options), StringComparison.Ordinal);
        }
    }

    [Fact]
    public void Lines_of_any_length_come_out_whole()
    {
        using TemporaryFolder folder = new();
        string[] lines = [.. ((int[])[1, 65_534, 65_535, 65_536, 65_537, 200_000, 2, 3_000_000, 1]).Select((length, i) => new string((char)('a' + i), length))];
        File.WriteAllText(folder["a.txt"], string.Join("\r\n", lines));
        Assert.Equal(lines, Read(folder["a.txt"], s_options with { Lines = true }).Select(d => d.Text));
    }

    [Fact]
    public void Nothing_to_read_is_an_error_that_says_what_was_looked_for()
    {
        using TemporaryFolder folder = new();
        File.WriteAllText(folder["notes.md"], "x");
        string message = Assert.Throws<UserErrorException>(() => TextFiles.Find([folder.Path], s_options)).Message;
        Assert.Contains(".txt, .txt.gz, .txt.zst, .jsonl, .jsonl.gz, .jsonl.zst", message, StringComparison.Ordinal);
        Assert.Contains("notes.md", message, StringComparison.Ordinal);
        Assert.Contains("does not exist", Assert.Throws<UserErrorException>(() => TextFiles.Find([folder["no"]], s_options)).Message, StringComparison.Ordinal);
        Assert.Contains("notes.md", Assert.Throws<UserErrorException>(() => TextFiles.Find([folder["notes.md"]], s_options)).Message, StringComparison.Ordinal);
    }

    private static Document[] Read(string path, TextFileOptions options) => [.. TextFiles.Find([path], options).Read(0)];

    private static string Error(string path, TextFileOptions options) => Assert.Throws<UserErrorException>(() => Read(path, options)).Message;

    private static byte[] Gzip(string text)
    {
        using MemoryStream packed = new();
        using (GZipStream stream = new(packed, CompressionMode.Compress))
        {
            stream.Write(Encoding.UTF8.GetBytes(text));
        }

        return packed.ToArray();
    }
}
