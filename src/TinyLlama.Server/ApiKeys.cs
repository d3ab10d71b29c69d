using System.Security.Cryptography;
using System.Text;
using Microsoft.AspNetCore.Http;

namespace TinyLlama.Server;

/// <summary>The keys that let a request in. How long a comparison takes tells nothing about them.</summary>
internal sealed class ApiKeys(ServerOptions options)
{
    private const string Scheme = "Bearer ";

    private readonly byte[][] _hashes = [.. options.ApiKeys.Select(Hash)];

    /// <summary>Whether a request bears one of the keys, or none is needed.</summary>
    public bool Admit(HttpRequest request)
    {
        string header = request.Headers.Authorization.ToString();
        byte[] given = Hash(header.StartsWith(Scheme, StringComparison.OrdinalIgnoreCase) ? header[Scheme.Length..] : "");
        bool admitted = _hashes.Length == 0;
        foreach (byte[] hash in _hashes)
        {
            admitted |= CryptographicOperations.FixedTimeEquals(hash, given);
        }

        return admitted;
    }

    // Hashes are of equal length, whatever the keys are.
    private static byte[] Hash(string key) => SHA256.HashData(Encoding.UTF8.GetBytes(key));
}
