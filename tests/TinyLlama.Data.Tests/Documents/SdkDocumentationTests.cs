using System.Text;
using TinyLlama.Data.Documents;

namespace TinyLlama.Data.Tests.Documents;

public sealed class SdkDocumentationTests
{
    [Fact]
    public void Prose_is_taken_out_of_members_each_text_once_a_type_a_document()
    {
        using TemporaryFolder folder = new();
        Write(folder, "Microsoft.NETCore.App.Ref/10.0.9/ref/net10.0/A.xml", """
            <doc><members>
              <member name="T:N.Box`1">
                <summary>
                  Holds a <typeparamref name="T" />,  or <see langword="null" />.
                  See <see cref="T:System.Collections.Generic.List`1" />.</summary>
                <typeparam name="T">What is held.</typeparam>
                <remarks><para>First.</para><para>Second <c>x &lt; y</c>.</para><code>int x = 1;</code></remarks>
              </member>
              <member name="M:N.Box`1.#ctor(System.Int32)">
                <summary>Makes a box with <see cref="M:N.Box`1.Put(`0)" />, <see cref="P:N.Box`1.Item(System.Int32)" /> or <see cref="M:N.Box`1.#ctor" />.</summary>
                <param name="size">What is held.</param>
                <exception cref="T:System.ArgumentException"><paramref name="size" /> is negative.</exception>
                <inheritdoc />
              </member>
              <member name="T:N.Other"><summary>What is held.</summary></member>
              <member name="F:N.Third.One"><summary>The <see href="https://example.org">manual</see>.</summary></member>
            </members></doc>
            """);
        Write(folder, "Microsoft.AspNetCore.App.Ref/10.0.9/ref/net10.0/B.xml", """
            <doc><members><member name="T:M.C"><summary>Holds a T, or null. See List.</summary><remarks>New.</remarks></member></members></doc>
            """);
        SdkDocumentation source = SdkDocumentation.FindIn(folder.Path, threads: 2)!;
        Assert.Equal(["Microsoft.NETCore.App.Ref/A.xml", "Microsoft.AspNetCore.App.Ref/B.xml"], source.Files.Select(f => f.Name));
        Document[] expected =
        [
            new(0, 2, """
                Holds a T, or null. See List.
                What is held.
                First.
                Second x < y.
                Makes a box with Box.Put, Box.Item or Box.
                size is negative.

                """.ReplaceLineEndings("\n")),
            new(0, 16, "The manual.\n"),
            new(1, 1, "New.\n"),
        ];
        Assert.Equal(expected, source.Read(0));
        Assert.Equal(expected[..2], source.Read(0, 1));
        Assert.Equal(expected[2..], source.Read(1));
        Assert.Equal(source.Files.Sum(f => f.Bytes), source.BytesRead);
    }

    [Fact]
    public void The_newest_pack_counts_and_a_release_is_newer_than_its_preview()
    {
        using TemporaryFolder folder = new();
        foreach (string version in (string[])["9.0.12", "10.0.9", "10.0.11", "10.0.11-rc.1", "8.0.0"])
        {
            Write(folder, $"Microsoft.NETCore.App.Ref/{version}/ref/net10.0/A.xml", $"<doc><members><member name='T:A'><summary>{version}</summary></member></members></doc>");
        }

        Directory.CreateDirectory(folder["packs/Microsoft.NETCore.App.Ref/11.0.0/ref/net11.0"]);
        Assert.Equal(["10.0.11\n"], SdkDocumentation.FindIn(folder.Path, threads: 1)!.Read(0).Select(d => d.Text));
        using TemporaryFolder empty = new();
        Assert.Null(SdkDocumentation.FindIn(empty.Path, threads: 1));
    }

    [Theory]
    [InlineData("<doc><members><member name='T:A'><summary>cut")]
    [InlineData("<!DOCTYPE d [<!ENTITY e \"x\">]><doc><member name='T:A'><summary>&e;</summary></member></doc>")]
    [InlineData("")]
    public void Broken_and_hostile_xml_is_refused_by_name(string xml)
    {
        using TemporaryFolder folder = new();
        Write(folder, "Microsoft.NETCore.App.Ref/10.0.9/ref/net10.0/A.xml", xml);
        string message = Assert.Throws<UserErrorException>(() => SdkDocumentation.FindIn(folder.Path, threads: 1)!.Read(0).ToList()).Message;
        Assert.Contains("A.xml cannot be read", message, StringComparison.Ordinal);
    }

    [Fact]
    public void The_documentation_of_this_machine_is_several_million_bytes_of_prose_whatever_the_threads()
    {
        SdkDocumentation? source = SdkDocumentation.Find(threads: 2);
        Assert.SkipWhen(source is null, "this machine has no SDK with XML documentation");
        Document[] documents = [.. source.Read(0)];
        Assert.True(documents.Sum(d => (long)Encoding.UTF8.GetByteCount(d.Text)) > 5_000_000);
        Assert.Equal(documents.Length, documents.Select(d => d.Text).Distinct(StringComparer.Ordinal).Count());
        Assert.DoesNotContain(documents, d => d.Text.Contains("<see", StringComparison.Ordinal) || d.Text.Contains("  ", StringComparison.Ordinal));
        Assert.InRange(documents.Count(d => d.Text.Length > 8000), 0, documents.Length / 100);
        Assert.Equal(documents, SdkDocumentation.Find(threads: 1)!.Read(0));
    }

    private static void Write(TemporaryFolder folder, string file, string content)
    {
        string path = folder["packs/" + file];
        Directory.CreateDirectory(Path.GetDirectoryName(path)!);
        File.WriteAllText(path, content);
    }
}
