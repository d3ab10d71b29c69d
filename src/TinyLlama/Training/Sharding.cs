using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>How the ranks of a run share its state and the micro-batches of a step. All of it powers of two, but for the pipeline's stages.</summary>
/// <param name="Ranks">W: processes that train together.</param>
/// <param name="Shards">S: ranks that keep the state once between them; the others are in the same place of another such group.</param>
/// <param name="Stage">
/// ZeRO (Rajbhandari et al. 2020): 1 shards the optimizer's state, 2 gradients too, 3 weights too.
/// </param>
/// <param name="Lanes">
/// R: the sums that micro-batches add up in, one after the other, before these add up in a pairwise tree. It fixes the bits of a
/// step for any number of ranks up to it.
/// </param>
/// <param name="Wire">What gradients are rounded to between ranks: F32, or BF16 for half the bytes and other last bits.</param>
/// <param name="Tensor">T: neighbours that have the heads and the hidden channels of their blocks between them.</param>
/// <param name="Pipeline">
/// P: stages that have the blocks between them, each of T neighbours. Where T · P is more than 1 the other ranks keep the state of
/// these again: S and the stage of ZeRO are 1.
/// </param>
public sealed record Sharding(
    int Ranks, int Shards, int Stage, int Lanes, DType Wire = DType.F32, int Tensor = 1, int Pipeline = 1)
{
    /// <summary>One rank that adds micro-batches up in order.</summary>
    public static readonly Sharding None = new(1, 1, 1, 1);

    /// <summary>Gets T · P: the ranks that have one model between them, and work on the same micro-batches.</summary>
    public int ModelRanks => Tensor * Pipeline;

    /// <summary>Gets D: the groups of such ranks, which have micro-batches of their own.</summary>
    public int DataRanks => Ranks / ModelRanks;

    /// <summary>Gets the groups that keep the same state.</summary>
    public int Replicas => DataRanks / Shards;

    /// <summary>Gets the lanes of a rank.</summary>
    public int LanesOfRank => Lanes / DataRanks;

    /// <summary>Gets a value indicating whether a gradient is reduced in every micro-batch, each of which is a lane then.</summary>
    public bool ReducesEachMicroBatch => Stage > 1;

    /// <summary>Gets a value indicating whether no rank has all weights: each unit's are gathered before it is used.</summary>
    public bool ShardsWeights => Stage == 3 && Shards > 1;

    /// <summary>Which of the T neighbours a rank is.</summary>
    public int TensorRankOf(int rank) => rank % Tensor;

    /// <summary>The stage of the pipeline that a rank is in.</summary>
    public int PipelineStageOf(int rank) => rank / Tensor % Pipeline;

    /// <summary>The shape of what a rank has of a model.</summary>
    public ModelConfig PartOf(ModelConfig model, int rank)
    {
        ArgumentNullException.ThrowIfNull(model);
        return model.Stage(PipelineStageOf(rank), Pipeline).Part(Tensor);
    }

    /// <summary>
    /// The lane that a rank works on. Where a rank adds its lanes up before it meets the others they are neighbours; where the
    /// ranks of a shard group meet in each of them, theirs are neighbours. Either way the tree is that over lanes 0 … R-1.
    /// </summary>
    /// <param name="rank">0 … W-1; ranks of a shard group are neighbours.</param>
    /// <param name="turn">0 … <see cref="LanesOfRank"/>-1: which of its lanes.</param>
    public int LaneOf(int rank, int turn) => ReducesEachMicroBatch
        ? (rank / Shards * (Lanes / Replicas)) + (turn * Shards) + (rank % Shards)
        : (rank / ModelRanks * LanesOfRank) + turn;

    /// <summary>The sum in a pairwise tree, (0 + 1) + (2 + 3) …; overwrites the values.</summary>
    /// <param name="values">A power of two of them.</param>
    public static double Tree(Span<double> values)
    {
        for (int distance = 1; distance < values.Length; distance *= 2)
        {
            for (int i = 0; i < values.Length; i += 2 * distance)
            {
                values[i] += values[i + distance];
            }
        }

        return values[0];
    }
}
