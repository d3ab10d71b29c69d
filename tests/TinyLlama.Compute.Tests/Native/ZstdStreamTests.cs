using System.Security.Cryptography;
using TinyLlama.Compute.Native;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Native;

public sealed class ZstdStreamTests
{
    /// <summary>The libzstd since which the corner cases of the format are decided as the golden files do.</summary>
    private const int StrictLibrary = 10506;

    [Theory]
    [InlineData("block-128k.zst", 131_068)]
    [InlineData("empty-block.zst", 0)]
    [InlineData("rle-first-block.zst", 1_048_576)]
    [InlineData("zeroSeq_2B.zst", 13, StrictLibrary)]
    public void Golden_files_unpack(string file, int length, int since = 0)
    {
        RequireLibrary(since);
        byte[] compressed = File.ReadAllBytes(SharedFiles.Require("oracles/zstd/golden-decompression/" + file));
        byte[] content = Unpack(compressed);
        Assert.Equal(length, content.Length);

        // The same bytes however they come in and go out.
        using ZstdStream trickle = new(new TrickleStream(compressed));
        using MemoryStream slow = new();
        byte[] one = new byte[1];
        while (trickle.Read(one) == 1)
        {
            slow.WriteByte(one[0]);
        }

        Assert.Equal(SHA256.HashData(content), SHA256.HashData(slow.ToArray()));
    }

    [Theory]
    [InlineData("off0.bin.zst")]
    [InlineData("truncated_huff_state.zst")]
    [InlineData("zeroSeq_extraneous.zst")]
    public void Damaged_golden_files_are_refused(string file)
    {
        RequireLibrary(StrictLibrary);
        byte[] damaged = File.ReadAllBytes(SharedFiles.Require("oracles/zstd/golden-decompression-errors/" + file));
        Assert.Throws<InvalidDataException>(() => Unpack(damaged));
    }

    [Fact]
    public void Frames_follow_each_other_and_one_cut_off_anywhere_is_refused()
    {
        RequireLibrary();

        // A frame of a raw block "abc" with its header: magic, single segment of 3 bytes, last block of 3 bytes.
        byte[] frame = [0x28, 0xB5, 0x2F, 0xFD, 0x20, 0x03, 0x19, 0x00, 0x00, (byte)'a', (byte)'b', (byte)'c'];
        Assert.Equal("abcabc"u8, Unpack([.. frame, .. frame]));
        for (int length = 1; length < frame.Length; length++)
        {
            Assert.Throws<InvalidDataException>(() => Unpack(frame[..length]));
            Assert.Throws<InvalidDataException>(() => Unpack([.. frame, .. frame[..length]]));
        }

        Assert.Throws<InvalidDataException>(() => Unpack([.. frame, 1, 2, 3, 4, 5, 6, 7, 8]));
    }

    [Fact]
    public void A_disposed_stream_says_so()
    {
        RequireLibrary();
        MemoryStream compressed = new();
        ZstdStream stream = new(compressed);
        stream.Dispose();
        Assert.Throws<ObjectDisposedException>(() => stream.Read(new byte[1]));
        Assert.False(compressed.CanRead);
    }

    private static byte[] Unpack(byte[] compressed)
    {
        RequireLibrary();
        using ZstdStream stream = new(new MemoryStream(compressed));
        using MemoryStream content = new();
        stream.CopyTo(content);
        return content.ToArray();
    }

    private static void RequireLibrary(int version = 0)
    {
        try
        {
            new ZstdStream(new MemoryStream()).Dispose();
            Assert.SkipUnless(ZstdStream.LibraryVersion >= version, $"libzstd {ZstdStream.LibraryVersion} is older than {version} and decides this case otherwise");
        }
        catch (DeviceException e)
        {
            Assert.Skip(e.Message);
        }
    }

    /// <summary>Gives one byte at a time.</summary>
    private sealed class TrickleStream(byte[] content) : MemoryStream(content)
    {
        public override int Read(Span<byte> buffer) => base.Read(buffer[..Math.Min(1, buffer.Length)]);
    }
}
