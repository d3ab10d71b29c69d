using TinyLlama.Compute;
using TinyLlama.Compute.Cuda;
using TinyLlama.Data;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>
/// Times of TinyLlama on A100s of 24,000 tokens/s, eight a node: against sums by hand, and, where the two do the same, against a
/// model of the same cluster that was written before and by itself. Its numbers have two bytes on links of 200 GB/s: four bytes at
/// twice the rates.
/// </summary>
public sealed class ClusterPlanTests
{
    private const double Parameters = 1_100_048_384;
    private const double Bytes = 4 * Parameters;

    // Units: 22 blocks, the embedding, the head. α of 25 µs between nodes, 10 µs inside.
    private const double NetworkMessage = 24 * 25e-6;
    private const double LinkMessage = 24 * 10e-6;

    private static readonly GpuModel s_gpu = GpuModel.All.Single(gpu => gpu.Name == "a100-40g");

    [Theory]
    [InlineData(16, 50, 99.7)]
    [InlineData(16, 25, 99.7)]
    [InlineData(64, 50, 98.9)]
    public void Masters_divided_over_all_cost_little_where_the_network_hides(int ranks, double network, double percent)
    {
        ClusterPlan plan = Plan(ranks, 2_097_152, 8, s_gpu with { LinkRate = 2 * s_gpu.LinkRate });
        Assert.Equal(percent, 100 * plan.Step(Way(plan, 1, ranks), 2 * network * 1e9).Efficiency, 0.15);
    }

    [Theory]
    [InlineData(16, 2_097_152, 45)]
    [InlineData(64, 2_097_152, 85)]
    [InlineData(1024, 16_777_216, 115)]
    public void Replicas_send_a_shard_between_nodes_once_a_step(int ranks, long tokens, double milliseconds)
    {
        ClusterPlan plan = Plan(ranks, tokens, 8);
        Assert.All(Enumerable.Range(1, 3), stage => Assert.Equal(milliseconds, 1e3 * plan.Step(Way(plan, stage, 8), 2 * 6.25e9).Network, 0.6));
    }

    [Fact]
    public void A_reduction_over_all_ranks_sends_whole_gradients_between_nodes()
    {
        ClusterPlan plan = Plan(16, 2_097_152, 8);
        Assert.Equal(8, plan.MicroBatches);

        // An eighth of the weights of the other node's half comes from there; the half of all gradients goes there.
        double gather = (Bytes / 16 / 6.25e9) + NetworkMessage, reduce = (Bytes / 2 / 6.25e9) + NetworkMessage;
        Assert.Equal(gather + reduce, plan.Step(Way(plan, 1, 16), 6.25e9).Network, 1e-9);
        Assert.Equal(gather + (8 * reduce), plan.Step(Way(plan, 2, 16), 6.25e9).Network, 1e-9);
        Assert.Equal((16 * gather) + (8 * reduce), plan.Step(Way(plan, 3, 16), 6.25e9).Network, 1e-9);
    }

    [Fact]
    public void Inside_a_node_links_carry_seven_eighths()
    {
        ClusterPlan plan = Plan(16, 2_097_152, 8);
        double once = (Bytes * 7 / 8 / 200e9) + (7 * LinkMessage);
        Assert.Equal(2 * once, plan.Step(Way(plan, 1, 8), 1e9).Links, 1e-9);
        Assert.Equal(9 * once, plan.Step(Way(plan, 2, 8), 1e9).Links, 1e-9);
        Assert.Equal(24 * once, plan.Step(Way(plan, 3, 8), 1e9).Links, 1e-9);
    }

    [Fact]
    public void Gradients_of_bf16_halve_the_reduction_alone()
    {
        ClusterPlan plan = Plan(16, 2_097_152, 8, wire: DType.BF16);
        Assert.Equal((Bytes / 16 / 6.25e9) + (Bytes / 4 / 6.25e9) + (2 * NetworkMessage), plan.Step(Way(plan, 1, 16), 6.25e9).Network, 1e-9);
    }

    [Fact]
    public void Communication_hides_under_its_own_micro_batch_alone()
    {
        ClusterPlan plan = Plan(16, 2_097_152, 8);
        double hides = 0.85 * 16_384 / 24_000;

        // ZeRO-1: the reduction under the last backward; the gather hides under the first forward.
        double links = (Bytes * 7 / 16 / 200e9) + (7 * LinkMessage), network = (Bytes / 2 / 2e9) + NetworkMessage;
        Assert.Equal(links + network - (hides * 2 / 3), plan.Step(Way(plan, 1, 16), 2e9).Exposed, 1e-9);

        // ZeRO-2: that in every backward, and the gather still hidden.
        Assert.Equal(8 * (links + network - (hides * 2 / 3)), plan.Step(Way(plan, 2, 16), 2e9).Exposed, 1e-9);

        // ZeRO-3 inside nodes: the sum over replicas beside the last backward, after its gather and its reduction.
        double inside = 2 * ((Bytes * 7 / 8 / 200e9) + (7 * LinkMessage)), replicas = 2 * ((Bytes / 8 / 2 / 1e9) + NetworkMessage);
        Assert.Equal(inside + replicas - (hides * 2 / 3), plan.Step(Way(plan, 3, 8), 1e9).Exposed, 1e-9);
        Assert.Equal(0, plan.Step(Way(plan, 3, 8), 2e9).Exposed);
    }

    [Fact]
    public void A_step_is_its_parts()
    {
        ClusterPlan plan = Plan(16, 2_097_152, 8);
        ClusterStep step = plan.Step(Way(plan, 1, 8), 6.25e9);
        Assert.Equal(131_072 / 24_000.0, step.Compute, 1e-9);
        Assert.Equal(0.06 * (step.Links + step.Network), step.Slowdown, 1e-9);
        Assert.Equal(Parameters / 8 * 28 / (1555e9 * 5 / 6), step.Optimizer, 1e-9);
        Assert.Equal(step.Compute + step.Slowdown + step.Optimizer + 0.012, step.Seconds, 1e-9);
    }

    // Weights and their bf16 form, gradients, two moments, and sums of lanes that wait. The rest are units in turns and padding.
    [Theory]
    [InlineData(1, 8, 4 + 2 + 4 + (8 / 8.0), 0.3)]
    [InlineData(1, 64, 4 + 2 + 4 + (8 / 64.0), 0.3)]
    [InlineData(2, 8, 4 + 2 + ((4 + 8 + 4) / 8.0), 0.9)]
    [InlineData(3, 64, (4 + 4 + 8 + 4) / 64.0, 1.9)]
    public void A_stage_divides_its_bytes_of_a_parameter(int stage, int shards, double bytesOfOne, double otherGibibytes)
    {
        ClusterPlan plan = Plan(64, 16_777_216 / 8, 8);
        double bytes = plan.Memory(Way(plan, stage, shards)).Where(arena => !arena.Name.StartsWith("activation", StringComparison.Ordinal)).Sum(arena => arena.Bytes);
        double other = (bytes - (bytesOfOne * Parameters)) / (1L << 30);
        Assert.InRange(other, 0, otherGibibytes);
    }

    [Fact]
    public void Split_blocks_wait_for_four_sums_each()
    {
        ClusterPlan plan = Plan(16, 2_097_152, 8, tensor: 4);
        ClusterStep step = plan.Step(Assert.Single(plan.Ways), 50e9);
        Assert.Equal((32, 16_384 * 32), (plan.MicroBatches, plan.TokensPerRank));
        Assert.Equal(16_384 * 32 / 4 / 24_000.0, step.Compute, 1e-9);

        // 22 blocks, 4 sums of (N, C) in two bytes, a quarter from each of 3 others to be added, and a quarter from each added.
        double sums = 32 * 22 * 4 * 6 * ((16_384 * 2048 * 2 / 4 / 200e9) + 10e-6);
        Assert.Equal(sums, step.Links, 1e-9);
        Assert.Equal(sums, step.Exposed, 1e-9);

        // Four groups of a quarter of the matrices and all of the tables.
        double parameters = ((Parameters - (2 * 32_000 * 2048) - (45 * 2048)) / 4) + (2 * 32_000 * 2048) + (45 * 2048);
        Assert.Equal(2 * ((4 * parameters * 3 / 4 / 50e9) + (3 * NetworkMessage)), step.Network, 1e-9);
    }

    [Fact]
    public void Stages_wait_for_each_other()
    {
        ClusterPlan plan = Plan(64, 2_097_152, 8, pipeline: 4);
        ClusterStep step = plan.Step(Assert.Single(plan.Ways), 50e9);
        double passes = 8 * 2 * ((16_384 * 2048 * 2 / 200e9) + 10e-6);
        Assert.Equal(passes, step.Links, 1e-9);
        Assert.Equal(passes + ((step.Compute + passes) * 3 / 8), step.Exposed, 1e-9);

        // Sixteen stages are on two nodes: all passes as slow as the one between them.
        ClusterPlan wide = Plan(64, 2_097_152, 8, pipeline: 16);
        Assert.Equal(0, wide.Step(wide.Ways[0], 50e9).Links);
    }

    [Fact]
    public void Groups_of_ranks_that_do_not_divide_a_step_are_refused()
    {
        string message = Assert.Throws<UserErrorException>(() => Plan(16, 2_097_152, 8, pipeline: 3)).Message;
        Assert.Equal("16 GPUs, 8 a node: tensor 1 × pipeline 3 of them have a model between them, and the number of such groups must be a power of two and divide the 1,024 sequences of a step; change them or test.yaml:2:9: batch.global_tokens", message);
        Assert.Equal(8, Plan(24, 2_097_152, 8, pipeline: 3).Ways[0].DataRanks);
    }

    [Fact]
    public void Ranks_that_do_not_divide_a_step_are_refused()
    {
        string message = Assert.Throws<UserErrorException>(() => Plan(48, 2_097_152, 8)).Message;
        Assert.Equal("48 GPUs, 8 a node: both must be powers of two and divide the 1,024 sequences of a step; change them or test.yaml:2:9: batch.global_tokens", message);
        Assert.Throws<UserErrorException>(() => Plan(2048, 2_097_152, 8));
    }

    [Fact]
    public void More_ranks_have_smaller_micro_batches_where_a_step_has_no_more_sequences()
    {
        ClusterPlan plan = Plan(1024, 2_097_152, 8);
        Assert.Equal((1, 1, 2048), (plan.MicroBatches, plan.Sequences, plan.TokensPerRank));
    }

    private static Sharding Way(ClusterPlan plan, int stage, int shards) =>
        plan.Ways.Single(way => way.Stage == stage && way.Shards == shards);

    private static ClusterPlan Plan(int ranks, long tokens, int sequences, GpuModel? gpu = null, DType wire = DType.F32, int tensor = 1, int pipeline = 1)
    {
        TrainingPlan run = TrainingPlan.Create(RecipeFile.Parse(
            $"model: tinyllama-1.1b\nbatch: {{global_tokens: {tokens}, micro_sequences: {sequences}}}\nbudget: {{steps: 10}}\npacked_weights: forward\ndistribution: {{tensor: {tensor}, pipeline: {pipeline}}}\n", "test.yaml"), ranks: tensor * pipeline);
        return new ClusterPlan(run, new Cluster(gpu ?? s_gpu, ranks, 8, 24_000 * run.FlopsPerToken / s_gpu.PeakFlops, wire));
    }
}
