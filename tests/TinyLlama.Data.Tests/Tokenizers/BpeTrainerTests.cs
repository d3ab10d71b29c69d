using System.Text;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Data.Tests.Tokenizers;

public sealed class BpeTrainerTests
{
    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    [InlineData(4)]
    [InlineData(5)]
    public void Training_finds_the_pieces_of_a_trainer_that_counts_everything_anew(int seed)
    {
        string[] documents = TokenizerTexts.RandomDocuments(seed, 12);
        int alphabet = string.Concat(documents).EnumerateRunes().Where(rune => !Rune.IsControl(rune)).Append(new Rune(' ')).Distinct().Count();
        int size = 259 + alphabet + 60;
        BpeModel model = BpeTrainer.Train(
            documents, new BpeTrainingOptions { VocabularySize = size, CharacterCoverage = 1, Threads = 2 });
        IEnumerable<string> expected = NaiveBpe.Train(documents, 60, 16);
        Assert.Equal(expected, model.Pieces.Skip(259).Take(60).Select(piece => piece.Text));
    }

    [Fact]
    public void One_two_and_three_threads_train_the_same_model()
    {
        string[] documents = TokenizerTexts.RandomDocuments(9, 3000);
        byte[][] files = [.. Enumerable.Range(1, 3).Select(threads => SentencePieceModel.Write(BpeTrainer.Train(
            documents, new BpeTrainingOptions { VocabularySize = 480, Threads = threads })))];
        Assert.Equal(files[0], files[1]);
        Assert.Equal(files[0], files[2]);
    }

    [Fact]
    public void A_long_document_counts_as_its_lines_do()
    {
        string[] lines = string.Join("\n", TokenizerTexts.RandomDocuments(4, 16000)).Split('\n');
        string document = string.Join("\n", lines);
        Assert.True(document.Length > 1 << 20);

        // A document that begins with a line feed has the space before it alone in a chunk, where it changes no pair.
        IEnumerable<string> lineByLine = lines.Select((line, i) => i == 0 ? line : "\n" + line);
        var options = new BpeTrainingOptions { VocabularySize = 470, CharacterCoverage = 1 };
        Assert.Equal(
            BpeTrainer.Train(lineByLine, options).Pieces.Select(piece => piece.Text),
            BpeTrainer.Train([document], options).Pieces.Select(piece => piece.Text));
    }

    [Fact]
    public void The_vocabulary_begins_with_special_pieces_and_bytes_and_ends_with_characters()
    {
        BpeModel model = BpeTrainer.Train(
            TokenizerTexts.RandomDocuments(2, 50), new BpeTrainingOptions { VocabularySize = 400, CharacterCoverage = 1 });
        Assert.Equal(400, model.Pieces.Count);
        Assert.Equal(["<unk>", "<s>", "</s>", "<0x00>"], model.Pieces.Take(4).Select(piece => piece.Text));
        Assert.Equal("<0xFF>", model.Pieces[258].Text);
        Assert.True(model.Pieces[259].Text.Length > 1);
        Assert.Single(model.Pieces[399].Text.EnumerateRunes());
        Assert.Equal(400, model.Pieces.Select(piece => piece.Text).Distinct(StringComparer.Ordinal).Count());
    }

    [Fact]
    public void Pieces_stay_within_words_and_digits_stand_alone()
    {
        BpeModel model = BpeTrainer.Train(
            [string.Concat(Enumerable.Repeat("if (x == 1234) {\n    return foo.bar;\n}\n", 50))],
            new BpeTrainingOptions { VocabularySize = 300, CharacterCoverage = 1 });
        foreach (Piece piece in model.Pieces.Where(piece => piece.Kind == PieceKind.Normal))
        {
            bool isSpaces = piece.Text.All(c => c == BpeModel.Space);
            string body = isSpaces ? "" : piece.Text.TrimStart(BpeModel.Space);
            Assert.True(isSpaces || piece.Text.Length - body.Length <= 1, piece.Text);
            Assert.True(body.All(char.IsLetter) || body.All(c => !char.IsLetterOrDigit(c)) || piece.Text.Length == 1, piece.Text);
        }

        Assert.Contains(model.Pieces, piece => piece.Text == "\u2581return");
        Assert.Contains(model.Pieces, piece => piece.Text == "\u2581\u2581\u2581");
        List<int> ids = [];
        new BpeTokenizer(model).Encode("{\n    return", ids);
        Assert.Equal(["\u2581\u2581\u2581", "\u2581return"], ids.TakeLast(2).Select(id => model.Pieces[id].Text));
    }

    [Fact]
    public void A_text_with_too_few_pairs_gives_a_smaller_vocabulary_where_that_is_allowed()
    {
        string[] text = ["a b a b"];
        Assert.Throws<UserErrorException>(() => BpeTrainer.Train(text, new BpeTrainingOptions { VocabularySize = 400 }));
        BpeModel most = BpeTrainer.Train(text, new BpeTrainingOptions { VocabularySize = 400, AllowsFewer = true });
        BpeModel exact = BpeTrainer.Train(text, new BpeTrainingOptions { VocabularySize = most.Pieces.Count });
        Assert.InRange(most.Pieces.Count, 262, 399);
        Assert.Equal(exact.Pieces, most.Pieces);
    }

    [Fact]
    public void Rare_characters_become_bytes_as_the_coverage_says()
    {
        string text = string.Concat(Enumerable.Repeat("some text ", 1000)) + "\u65E5";
        BpeModel covered = BpeTrainer.Train([text], new BpeTrainingOptions { VocabularySize = 268, CharacterCoverage = 1 });
        BpeModel partly = BpeTrainer.Train([text], new BpeTrainingOptions { VocabularySize = 268, CharacterCoverage = 0.999 });
        Assert.Contains(covered.Pieces, piece => piece.Text == "\u65E5");
        Assert.DoesNotContain(partly.Pieces, piece => piece.Text == "\u65E5");
        List<int> ids = [];
        var tokenizer = new BpeTokenizer(partly);
        tokenizer.Encode("\u65E5", ids);
        Assert.Equal([0xE6 + 3, 0x97 + 3, 0xA5 + 3], ids.TakeLast(3));
    }

    [Fact]
    public void Sizes_that_cannot_be_are_refused_with_the_arithmetic()
    {
        var small = Assert.Throws<UserErrorException>(() => BpeTrainer.Train(["abc"], new BpeTrainingOptions { VocabularySize = 260 }));
        Assert.Contains("= 263", small.Message, StringComparison.Ordinal);
        var large = Assert.Throws<UserErrorException>(() => BpeTrainer.Train(["abc"], new BpeTrainingOptions { VocabularySize = 500 }));
        Assert.Contains("at most 266", large.Message, StringComparison.Ordinal);
        BpeModel fits = BpeTrainer.Train(["abc"], new BpeTrainingOptions { VocabularySize = 266 });
        Assert.Equal("\u2581abc", fits.Pieces[261].Text);
        Assert.Throws<UserErrorException>(() => BpeTrainer.Train([], new BpeTrainingOptions { VocabularySize = 500 }));
        Assert.Throws<UserErrorException>(() => BpeTrainer.Train(["", "\n"], new BpeTrainingOptions { VocabularySize = 500 }));
        Assert.Throws<UserErrorException>(() => BpeTrainer.Train(
            ["abc"], new BpeTrainingOptions { VocabularySize = 500, CharacterCoverage = double.NaN }));
    }

    [Fact]
    public void Progress_ends_with_all_pieces_and_a_cancelled_training_stops()
    {
        var reports = new List<BpeTrainingProgress>();
        var progress = new Recorder(reports);
        string[] documents = TokenizerTexts.RandomDocuments(2, 50);
        BpeTrainer.Train(documents, new BpeTrainingOptions { VocabularySize = 400 }, progress);
        Assert.True(reports.Count >= 3);
        Assert.Equal(documents.Sum(document => document.Length), reports[^1].Characters);
        Assert.Equal(reports[^1].TotalPieces, reports[^1].Pieces);
        using var source = new CancellationTokenSource();
        source.Cancel();
        Assert.Throws<OperationCanceledException>(() => BpeTrainer.Train(
            documents, new BpeTrainingOptions { VocabularySize = 400 }, null, source.Token));
    }

    private sealed class Recorder(List<BpeTrainingProgress> reports) : IProgress<BpeTrainingProgress>
    {
        public void Report(BpeTrainingProgress value) => reports.Add(value);
    }
}
