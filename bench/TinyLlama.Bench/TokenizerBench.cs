using System.Diagnostics;
using System.Globalization;
using System.Text;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Bench;

/// <summary>
/// Encoding on one thread and training, beside SentencePiece's own programs (spm_encode, spm_train) on the same text in
/// the same run. Seconds of processor time are printed beside those of the clock, because they are what other programs on
/// the machine disturb least; those of the peers include starting, reading and writing.
/// </summary>
internal static class TokenizerBench
{
    private const string Usage = "usage: TinyLlama.Bench --model tokenizer.model [--encode FILE] [--train FILE] [--vocab-size 32000] [--runs 3]";

    public static int Run(string[] args)
    {
        string model = "";
        string encode = "";
        List<string> train = [];
        int vocabularySize = 32000;
        int runs = 3;
        for (int i = 0; i + 1 < args.Length; i += 2)
        {
            switch (args[i])
            {
                case "--model":
                    model = args[i + 1];
                    break;
                case "--encode":
                    encode = args[i + 1];
                    break;
                case "--train":
                    train.Add(args[i + 1]);
                    break;
                case "--vocab-size":
                    vocabularySize = int.Parse(args[i + 1], CultureInfo.InvariantCulture);
                    break;
                case "--runs":
                    runs = int.Parse(args[i + 1], CultureInfo.InvariantCulture);
                    break;
                default:
                    Console.Error.WriteLine($"no option {args[i]}; {Usage}");
                    return 2;
            }
        }

        if (args.Length % 2 != 0 || (encode.Length > 0 && model.Length == 0) || (encode.Length == 0 && train.Count == 0))
        {
            Console.Error.WriteLine(Usage);
            return 2;
        }

        Console.WriteLine("best of the runs                              seconds   processor     MB/s of processor time");
        if (encode.Length > 0)
        {
            Encode(model, encode, runs);
        }

        train.ForEach(file => Train(file, vocabularySize, runs));
        return 0;
    }

    private static void Encode(string model, string file, int runs)
    {
        string text = File.ReadAllText(file);
        double megabytes = Encoding.UTF8.GetByteCount(text) / 1e6;
        string[] lines = text.Split('\n');
        BpeTokenizer tokenizer = Tokenizer.Load(model);
        List<int> ids = [];
        string name = $"encode {megabytes:F1} MB";
        Report($"{name}, ours, line by line", megabytes, Best(runs, () =>
        {
            foreach (string line in lines)
            {
                ids.Clear();
                tokenizer.Encode(line, ids);
            }
        }));
        Report($"{name}, ours, as one document", megabytes, Best(runs, () =>
        {
            ids.Clear();
            tokenizer.Encode(text, ids);
        }));
        string line = text.Replace("\n", "").Replace(" ", "");
        double lineMegabytes = Encoding.UTF8.GetByteCount(line) / 1e6;
        Report($"encode {lineMegabytes:F1} MB without spaces, ours", lineMegabytes, Best(runs, () =>
        {
            ids.Clear();
            tokenizer.Encode(line, ids);
        }));
        Report($"{name}, spm_encode", megabytes, BestOfPeer(
            runs, "spm_encode", $"--model={model}", $"--input={file}", "--output=/dev/null", "--output_format=id"));
    }

    private static void Train(string file, int vocabularySize, int runs)
    {
        string text = File.ReadAllText(file);
        double megabytes = Encoding.UTF8.GetByteCount(text) / 1e6;
        string name = $"train {vocabularySize} on {megabytes:F1} MB";
        foreach (int threads in (ReadOnlySpan<int>)[1, 2])
        {
            var options = new BpeTrainingOptions { VocabularySize = vocabularySize, Threads = threads };
            Report($"{name}, ours, {threads} threads", megabytes, Best(runs, () => BpeTrainer.Train([text], options)));
        }

        string prefix = Path.Combine(Path.GetTempPath(), $"tokenizer-bench-{Environment.ProcessId}");
        Report($"{name}, spm_train, 2 threads", megabytes, BestOfPeer(
            Math.Min(runs, 2),
            "spm_train",
            "--model_type=bpe",
            $"--input={file}",
            $"--model_prefix={prefix}",
            $"--vocab_size={vocabularySize}",
            "--character_coverage=0.99995",
            "--byte_fallback",
            "--split_digits",
            "--normalization_rule_name=identity",
            "--remove_extra_whitespaces=false",
            "--num_threads=2",
            "--minloglevel=2"));
        File.Delete(prefix + ".model");
        File.Delete(prefix + ".vocab");
    }

    private static void Report(string what, double megabytes, (double Seconds, double Processor)? time)
    {
        Console.WriteLine(time is not { } found ? $"{what,-44} not measured: the program is not installed, or it failed"
            : string.Create(CultureInfo.InvariantCulture, $"{what,-44} {found.Seconds,8:F2} {found.Processor,11:F2} {megabytes / found.Processor,12:F1}"));
    }

    private static (double Seconds, double Processor)? Best(int runs, Action action)
    {
        (double Seconds, double Processor) best = (double.MaxValue, double.MaxValue);
        using var self = Process.GetCurrentProcess();
        for (int run = 0; run < runs; run++)
        {
            self.Refresh();
            double before = self.TotalProcessorTime.TotalSeconds;
            long start = Stopwatch.GetTimestamp();
            action();
            double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
            self.Refresh();
            double processor = self.TotalProcessorTime.TotalSeconds - before;
            best = (Math.Min(best.Seconds, seconds), Math.Min(best.Processor, processor));
        }

        return best;
    }

    private static (double Seconds, double Processor)? BestOfPeer(int runs, string program, params string[] arguments)
    {
        (double Seconds, double Processor) best = (double.MaxValue, double.MaxValue);
        for (int run = 0; run < runs; run++)
        {
            // The shell tells the processor time of a program that has ended.
            var start = new ProcessStartInfo(
                "bash", ["-c", "TIMEFORMAT='%U %S'; time \"$@\" || echo failed >&2", "bash", program, .. arguments])
            {
                UseShellExecute = false,
                RedirectStandardError = true,
            };
            long before = Stopwatch.GetTimestamp();
            using Process peer = Process.Start(start)!;
            string[] last = peer.StandardError.ReadToEnd().TrimEnd().Split('\n')[^1].Split(' ');
            peer.WaitForExit();
            double seconds = Stopwatch.GetElapsedTime(before).TotalSeconds;
            if (last is not [string user, string system])
            {
                return null;
            }

            double processor = double.Parse(user, CultureInfo.InvariantCulture) + double.Parse(system, CultureInfo.InvariantCulture);
            best = (Math.Min(best.Seconds, seconds), Math.Min(best.Processor, processor));
        }

        return best;
    }
}
