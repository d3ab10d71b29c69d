using TinyLlama.Compute.Cpu;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Cpu;

public abstract class EmbeddingTests(CpuPath path) : OperationTests(path)
{
    [Fact]
    public void Equals_the_golden_values()
    {
        GoldenFile golden = GoldenFile.Open(SharedFiles.Require("goldens/llama-tiny/ops.safetensors"));
        int[] tokens = Array.ConvertAll(golden.Read("embedding.ids").Values, t => (int)t);
        (double[] w, int[] shape) = golden.Read("embedding.w");
        Tensor table = Device.Put(shape[0], shape[1], w), output = Device.Take(tokens.Length, shape[1]);
        Tensor dTable = Device.Take(shape[0], shape[1]);

        Device.Backend.Embedding(output, table, Device.Put(tokens));
        Device.Backend.EmbeddingBackward(dTable, Device.Put(tokens.Length, shape[1], golden.Read("embedding.dy").Values), Device.Put(tokens));

        Close(golden.Read("embedding.y").Values, Device.Get(output), 0, "y");
        Close(golden.Read("embedding.dw").Values, Device.Get(dTable), 1e-7, "dw");
    }

    [Theory]
    [InlineData(1, 1)]
    [InlineData(50, 37)]
    [InlineData(33, 200)]
    public void Rows_are_gathered_and_their_gradients_added_in_order(int tokens, int channels)
    {
        const int Vocabulary = 11;
        float[] w = Normal(Vocabulary * channels), dy = Normal(tokens * channels);
        int[] ids = Whole(tokens, Vocabulary);
        float[] y = new float[tokens * channels], dw = new float[w.Length];
        for (int i = 0; i < y.Length; i++)
        {
            int at = (ids[i / channels] * channels) + (i % channels);
            y[i] = w[at];
            dw[at] += dy[i];
        }

        for (int threads = 1; threads <= 3; threads++)
        {
            Device device = On(threads);
            Tensor output = device.Take(tokens, channels), again = device.Take(tokens, channels), dTable = device.Take(Vocabulary, channels);
            Tensor table = device.PutStrided(Vocabulary, channels, w), idTensor = device.Put(ids);
            device.Backend.Embedding(output, table, idTensor);
            device.Backend.GatherRows(again, table, idTensor);
            device.Backend.EmbeddingBackward(dTable, device.PutStrided(tokens, channels, dy), idTensor);
            SameBits(y, device.Get(output), "output");
            SameBits(y, device.Get(again), "gathered rows");
            SameBits(dw, device.Get(dTable), "dTable");
        }
    }

    [Fact]
    public void A_token_outside_the_table_is_refused()
    {
        Tensor output = Device.Take(1, 2), table = Device.Take(3, 2);
        Assert.Throws<ArgumentException>(() => Device.Backend.Embedding(output, table, Device.Put([3])));
        Assert.Throws<ArgumentException>(() => Device.Backend.EmbeddingBackward(table, output, Device.Put([-1])));
    }

    [Fact]
    public void Allocates_nothing()
    {
        Tensor output = Device.Take(2, 2), table = Device.Take(3, 2), tokens = Device.Put([2, 0]);
        AllocatesNothing(() =>
        {
            Device.Backend.Embedding(output, table, tokens);
            Device.Backend.EmbeddingBackward(table, output, tokens);
        });
    }
}

public sealed class EmbeddingOn512() : EmbeddingTests(CpuPath.Vector512);

public sealed class EmbeddingOn256() : EmbeddingTests(CpuPath.Vector256);

public sealed class EmbeddingOn128() : EmbeddingTests(CpuPath.Vector128);

public sealed class EmbeddingOnScalar() : EmbeddingTests(CpuPath.Scalar);
