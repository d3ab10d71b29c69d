using System.Buffers.Binary;
using System.Text;
using TinyLlama.Compute.Native;
using TinyLlama.Data;

namespace TinyLlama.Checkpoints;

/// <summary>
/// The files inside a zip archive that are stored as they are, where they lie in it, so that they can be mapped; with the
/// 64-bit extension. Source: PKWARE's APPNOTE, sections 4.3 and 4.5.
/// </summary>
internal static class ZipDirectory
{
    private const uint LocalSignature = 0x04034B50;
    private const uint CentralSignature = 0x02014B50;
    private const uint EndSignature = 0x06054B50;
    private const uint End64Signature = 0x06064B50;
    private const uint Locator64Signature = 0x07064B50;
    private const int LocalBytes = 30;
    private const int CentralBytes = 46;
    private const int EndBytes = 22;
    private const int End64Bytes = 56;
    private const int Locator64Bytes = 20;
    private const int MaximumCommentBytes = ushort.MaxValue;
    private const int MaximumDirectoryBytes = 1 << 24;
    private const ushort Extension64 = 1;

    /// <summary>Where each file's bytes are: first byte in the archive, and number.</summary>
    /// <exception cref="UserErrorException">It is no zip archive, is damaged, or has compressed or encrypted files.</exception>
    public static Dictionary<string, (long Offset, long ByteCount)> Read(MappedFile archive)
    {
        (long offset, long length) = FindDirectory(archive);
        ReadOnlySpan<byte> directory = Bytes(archive, offset, length <= MaximumDirectoryBytes ? (int)length : throw Damaged(archive));
        var files = new Dictionary<string, (long, long)>(StringComparer.Ordinal);
        while (!directory.IsEmpty)
        {
            if (directory.Length < CentralBytes || UInt32(directory, 0) != CentralSignature)
            {
                throw Damaged(archive);
            }

            int nameBytes = UInt16(directory, 28);
            int extraBytes = UInt16(directory, 30);
            int bytes = CentralBytes + nameBytes + extraBytes + UInt16(directory, 32);
            if (bytes > directory.Length)
            {
                throw Damaged(archive);
            }

            string name = Encoding.UTF8.GetString(directory.Slice(CentralBytes, nameBytes));
            bool isStored = UInt16(directory, 10) == 0 && (UInt16(directory, 8) & 1) == 0;
            if (!isStored)
            {
                throw new UserErrorException($"{archive.Path}: '{name}' in it is compressed or encrypted, which PyTorch never does");
            }

            if (!files.TryAdd(name, Place(archive, directory[..CentralBytes], directory.Slice(CentralBytes + nameBytes, extraBytes))))
            {
                throw new UserErrorException($"{archive.Path}: has '{name}' twice: damaged");
            }

            directory = directory[bytes..];
        }

        return files;
    }

    private static (long Offset, long ByteCount) FindDirectory(MappedFile archive)
    {
        int tailBytes = (int)Math.Min(archive.Length, EndBytes + MaximumCommentBytes);
        long tailOffset = archive.Length - tailBytes;
        ReadOnlySpan<byte> tail = archive.Bytes(tailOffset, tailBytes);
        int end = tailBytes - EndBytes;
        while (end >= 0 && UInt32(tail, end) != EndSignature)
        {
            end--;
        }

        if (end < 0)
        {
            throw new UserErrorException($"{archive.Path}: has no directory at its end, as zip files have: cut off or damaged");
        }

        (uint length, uint offset) = (UInt32(tail, end + 12), UInt32(tail, end + 16));
        if (length != uint.MaxValue && offset != uint.MaxValue)
        {
            return (offset, length);
        }

        ReadOnlySpan<byte> locator = Bytes(archive, tailOffset + end - Locator64Bytes, Locator64Bytes);
        ReadOnlySpan<byte> end64 = UInt32(locator, 0) == Locator64Signature ? Bytes(archive, Int64(archive, locator, 8), End64Bytes) : throw Damaged(archive);
        return UInt32(end64, 0) == End64Signature ? (Int64(archive, end64, 48), Int64(archive, end64, 40)) : throw Damaged(archive);
    }

    private static (long Offset, long ByteCount) Place(MappedFile archive, ReadOnlySpan<byte> central, ReadOnlySpan<byte> extra)
    {
        long length = UInt32(central, 24);
        long local = UInt32(central, 42);
        bool stored64 = UInt32(central, 20) == uint.MaxValue;
        if (length == uint.MaxValue || stored64 || local == uint.MaxValue)
        {
            ReadOnlySpan<byte> numbers = FindExtension64(archive, extra);
            length = length == uint.MaxValue ? Next(ref numbers) : length;
            _ = stored64 ? Next(ref numbers) : 0;
            local = local == uint.MaxValue ? Next(ref numbers) : local;
        }

        ReadOnlySpan<byte> header = Bytes(archive, local, LocalBytes);
        long first = local + LocalBytes + UInt16(header, 26) + UInt16(header, 28);
        return UInt32(header, 0) == LocalSignature && first <= archive.Length && length <= archive.Length - first
            ? (first, length)
            : throw Damaged(archive);

        long Next(ref ReadOnlySpan<byte> numbers)
        {
            long number = numbers.Length >= sizeof(long) ? Int64(archive, numbers, 0) : throw Damaged(archive);
            numbers = numbers[sizeof(long)..];
            return number;
        }
    }

    private static ReadOnlySpan<byte> FindExtension64(MappedFile archive, ReadOnlySpan<byte> extra)
    {
        while (extra.Length >= 4 && 4 + UInt16(extra, 2) is var bytes && bytes <= extra.Length)
        {
            if (UInt16(extra, 0) == Extension64)
            {
                return extra[4..bytes];
            }

            extra = extra[bytes..];
        }

        throw Damaged(archive);
    }

    private static ReadOnlySpan<byte> Bytes(MappedFile archive, long offset, int count) =>
        offset >= 0 && offset <= archive.Length - count ? archive.Bytes(offset, count) : throw Damaged(archive);

    private static ushort UInt16(ReadOnlySpan<byte> bytes, int offset) => BinaryPrimitives.ReadUInt16LittleEndian(bytes[offset..]);

    private static uint UInt32(ReadOnlySpan<byte> bytes, int offset) => BinaryPrimitives.ReadUInt32LittleEndian(bytes[offset..]);

    private static long Int64(MappedFile archive, ReadOnlySpan<byte> bytes, int offset) =>
        BinaryPrimitives.ReadInt64LittleEndian(bytes[offset..]) is >= 0 and var value ? value : throw Damaged(archive);

    private static UserErrorException Damaged(MappedFile archive) => new($"{archive.Path}: its zip directory is damaged");
}
