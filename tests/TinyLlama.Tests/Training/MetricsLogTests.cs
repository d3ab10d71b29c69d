using TinyLlama.Data;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

public sealed class MetricsLogTests : IDisposable
{
    private static readonly Metrics[] s_records =
    [
        new ValidationMetrics(0, 0, 6.25, 518.0128246683427, 3.1),
        new StepMetrics(0, 1024, 6.24, 1.5, 0, 1234.5, 0.25),
        new StepMetrics(1, 2048, 6.1, 1.4, 1e-5, 1250, null),
        new SampleMetrics(2, "Once", " upon\na \"time\" ä 漢 😀\u0001"),
        new NoteMetrics(2, "resumed"),
        new StepMetrics(2, 3072, 6, double.PositiveInfinity, 2e-5, 1250, null),
    ];

    private readonly string _path = Path.Combine(Path.GetTempPath(), Path.GetRandomFileName());

    public void Dispose() => File.Delete(_path);

    [Fact]
    public void What_is_appended_is_read_back_equal_while_the_log_is_open()
    {
        using MetricsLog log = MetricsLog.Open(_path, 0);
        foreach (Metrics record in s_records)
        {
            log.Append(record);
        }

        Assert.Equal(s_records, MetricsLog.Read(_path));
    }

    [Fact]
    public void Lines_are_JSON_with_a_kind_and_snake_case_names()
    {
        Write(s_records[1]);
        Assert.Equal(
            """{"kind":"step","tokens":1024,"loss":6.24,"gradient_norm":1.5,"learning_rate":0,"tokens_per_second":1234.5,"mfu":0.25,"step":0}""" + "\n",
            File.ReadAllText(_path));
    }

    [Theory]
    [InlineData(0, 0)]
    [InlineData(1, 2)]
    [InlineData(2, 3)]
    [InlineData(3, 6)]
    [InlineData(9, 6)]
    public void A_run_that_goes_on_from_a_step_drops_what_it_will_do_again(long step, int kept)
    {
        Write(s_records);
        using (MetricsLog log = MetricsLog.Open(_path, step))
        {
            log.Append(new NoteMetrics(step, "here"));
        }

        Assert.Equal([.. s_records[..kept], new NoteMetrics(step, "here")], MetricsLog.Read(_path));
    }

    [Fact]
    public void A_last_line_torn_at_any_byte_is_dropped()
    {
        Write(s_records);
        byte[] whole = File.ReadAllBytes(_path);
        int last = Array.LastIndexOf(whole, (byte)'\n', whole.Length - 2) + 1;
        for (int length = last; length < whole.Length; length++)
        {
            File.WriteAllBytes(_path, whole[..length]);
            Assert.Equal(s_records[..^1], MetricsLog.Read(_path));
            using (MetricsLog log = MetricsLog.Open(_path, 99))
            {
                log.Append(s_records[^1]);
            }

            Assert.Equal(whole, File.ReadAllBytes(_path));
        }
    }

    [Theory]
    [InlineData("{\"kind\":\"step\",\"step\":")]
    [InlineData("{\"kind\":\"dance\",\"step\":1}")]
    [InlineData("null")]
    [InlineData("")]
    public void A_damaged_line_in_the_middle_is_named(string line)
    {
        Write(s_records[0]);
        File.AppendAllText(_path, line + "\n");
        Assert.StartsWith($"{_path}:2: not a record", Assert.Throws<UserErrorException>(() => MetricsLog.Read(_path)).Message, StringComparison.Ordinal);
        Assert.Throws<UserErrorException>(() => MetricsLog.Open(_path, 5));
    }

    [Fact]
    public void A_log_that_is_not_there_is_an_error_of_one_line() =>
        Assert.Equal($"{_path}: there are no metrics", Assert.Throws<UserErrorException>(() => MetricsLog.Read(_path)).Message);

    private void Write(params ReadOnlySpan<Metrics> records)
    {
        using MetricsLog log = MetricsLog.Open(_path, 0);
        foreach (Metrics record in records)
        {
            log.Append(record);
        }
    }
}
