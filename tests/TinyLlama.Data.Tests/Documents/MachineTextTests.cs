using System.IO.Compression;
using System.Text;
using TinyLlama.Data.Documents;

namespace TinyLlama.Data.Tests.Documents;

public sealed class MachineTextTests
{
    [Fact]
    public void Licences_notes_and_English_manuals_are_read_each_paragraph_once()
    {
        using TemporaryFolder folder = new();
        Write(folder["common-licenses/GPL"], "You may copy.\n\nNo   warranty\n at all.\n");
        Write(folder["doc/tool/copyright"], "By A.\n\nYou may copy.\n");
        Write(folder["doc/tool/README.gz"], "Reads well.\n");
        Write(folder["doc/tool/tool.c"], "int x;\n");
        Write(folder["doc/tool/latin.txt"], "\uFFFF");
        File.WriteAllBytes(folder["doc/tool/latin.txt"], [0xE9]);
        Write(folder["man/man1/tool.1.gz"], ".TH TOOL 1\n.\\\" comment\n.SH NAME\ntool \\- reads\n.SH \"SEE ALSO\"\nThe option\n.B \\-v\nis \\fIgood\\fP.\n.BR cat (1)\n.PP\nNo warranty\nat all.\n");
        Write(folder["man/de/man1/tool.1"], "Nein.\n");
        MachineText source = MachineText.FindIn(folder.Path, leastBytes: 1)!;
        Assert.Equal(
            ["common-licenses/GPL", "doc/tool/README.gz", "doc/tool/copyright", "doc/tool/latin.txt", "man/man1/tool.1.gz"],
            source.Files.Select(f => f.Name));
        Document[] expected =
        [
            new(0, 0, "You may copy.\nNo warranty\nat all.\n"),
            new(1, 0, "Reads well.\n"),
            new(2, 0, "By A.\n"),
            new(4, 0, "NAME\ntool - reads\nSEE ALSO\nThe option\n-v\nis good.\ncat(1)\n"),
        ];
        Assert.Equal(expected, source.Read(0));
        Assert.Equal(expected[2..], source.Read(2));
        Assert.Equal(expected[1..2], source.Read(1, 2));
        Assert.Null(MachineText.FindIn(folder.Path, leastBytes: 1 << 20));
    }

    [Theory]
    [InlineData("plain", "plain")]
    [InlineData("\\fBbold\\fR \\f(CWcode\\fP \\f[I]x\\f[R]", "bold code x")]
    [InlineData("a\\-b \\(co \\e \\&c\\", "a-b  \\ c\\")]
    [InlineData(".IR name , other", "name,other")]
    [InlineData(".in +4n", "")]
    [InlineData("\\f", "")]
    [InlineData("\\f(", "")]
    [InlineData("\\[", "")]
    public void Manual_sources_read_as_text(string line, string text) => Assert.Equal(text, MachineText.FromRoff(line));

    private static void Write(string path, string content)
    {
        Directory.CreateDirectory(Path.GetDirectoryName(path)!);
        using Stream file = File.Create(path);
        using Stream stream = path.EndsWith(".gz", StringComparison.Ordinal) ? new GZipStream(file, CompressionMode.Compress) : file;
        stream.Write(Encoding.UTF8.GetBytes(content));
    }
}
