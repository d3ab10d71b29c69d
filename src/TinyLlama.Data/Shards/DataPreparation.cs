namespace TinyLlama.Data.Shards;

/// <summary>From documents to a folder of token shards.</summary>
public static class DataPreparation
{
    /// <summary>The folder inside the destination that holds what an unfinished preparation continues from.</summary>
    internal const string UnfinishedFolder = "unfinished";
}
