using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Data.Tests.Tokenizers;

public sealed class BpeTokenizerTests
{
    private static readonly BpeModel s_model = BpeTrainer.Train(
        TokenizerTexts.RandomDocuments(1, 400), new BpeTrainingOptions { VocabularySize = 450, CharacterCoverage = 0.999 });

    [Fact]
    public void Encoding_follows_the_definition_on_random_vocabularies_and_texts()
    {
        var random = new Random(5);
        for (int round = 0; round < 60; round++)
        {
            BpeModel model = RandomModel(random);
            var tokenizer = new BpeTokenizer(model);
            for (int i = 0; i < 12; i++)
            {
                string text = RandomText(random, random.Next(0, 60));
                Assert.Equal(NaiveBpe.Encode(model, text), Encode(tokenizer, text));
            }
        }
    }

    [Fact]
    public void Encoding_follows_the_definition_on_a_trained_vocabulary()
    {
        var tokenizer = new BpeTokenizer(s_model);
        var random = new Random(6);
        foreach (string document in TokenizerTexts.RandomDocuments(2, 60))
        {
            Assert.Equal(NaiveBpe.Encode(s_model, document), Encode(tokenizer, document));
        }

        for (int i = 0; i < 40; i++)
        {
            string text = TokenizerTexts.RandomUnicode(random, 40);
            Assert.Equal(NaiveBpe.Encode(s_model, text), Encode(tokenizer, text));
        }
    }

    [Fact]
    public void Decoding_gives_back_what_was_encoded_but_for_the_sign_that_means_a_space()
    {
        var tokenizer = new BpeTokenizer(s_model);
        var random = new Random(7);
        for (int i = 0; i < 300; i++)
        {
            string text = TokenizerTexts.RandomUnicode(random, random.Next(0, 100));
            Assert.Equal(text.Replace('\u2581', ' '), tokenizer.Decode(Encode(tokenizer, text).ToArray()));
        }
    }

    [Fact]
    public void Bytes_that_are_no_text_come_back_when_decoded()
    {
        var tokenizer = new BpeTokenizer(s_model);
        var random = new Random(8);
        for (int i = 0; i < 300; i++)
        {
            byte[] bytes = new byte[random.Next(1, 60)];
            random.NextBytes(bytes);
            List<int> ids = [];
            tokenizer.EncodeUtf8(bytes, ids);
            byte[] decoded = [.. ids.SelectMany((id, place) =>
                (place == 0 ? tokenizer.FirstTokenBytes(id) : tokenizer.TokenBytes(id)).ToArray())];
            Assert.Equal(bytes, decoded);
        }
    }

    [Fact]
    public void An_unpaired_surrogate_becomes_the_replacement_character()
    {
        var tokenizer = new BpeTokenizer(s_model);
        Assert.Equal("a\uFFFDb", tokenizer.Decode(Encode(tokenizer, "a\uD800b").ToArray()));
    }

    [Fact]
    public void The_stream_of_pieces_of_text_is_the_whole_text()
    {
        ITokenizer[] tokenizers = [new BpeTokenizer(s_model), new ByteTokenizer()];
        var random = new Random(9);
        foreach (ITokenizer tokenizer in tokenizers)
        {
            for (int i = 0; i < 200; i++)
            {
                // Random ids are also broken characters, and control tokens at any place.
                int[] ids = i % 2 == 0
                    ? [.. Encode(tokenizer, TokenizerTexts.RandomUnicode(random, 40))]
                    : [.. Enumerable.Range(0, 40).Select(_ => random.Next(tokenizer.VocabularySize))];
                var decoder = new StreamingDecoder(tokenizer);
                string streamed = string.Concat(ids.Select(decoder.Append)) + decoder.Finish();
                Assert.Equal(tokenizer.Decode(ids), streamed);
            }
        }
    }

    [Fact]
    public void A_character_split_over_tokens_comes_out_whole_and_a_prompt_is_gone_on_from_with_its_space()
    {
        var bytes = new ByteTokenizer();
        var decoder = new StreamingDecoder(bytes);
        int[] llama = [0xF0, 0x9F, 0xA6, 0x99];
        Assert.Equal(["", "", "", "\U0001F999"], llama.Select(decoder.Append));
        decoder.Append(0xF0);
        Assert.Equal("\uFFFD", decoder.Finish());

        var tokenizer = new BpeTokenizer(s_model);
        int word = Enumerable.Range(259, 100).First(id => s_model.Pieces[id].Text is ['\u2581', not '\u2581', ..]);
        string inside = " " + s_model.Pieces[word].Text[1..];
        Assert.Equal(inside, new StreamingDecoder(tokenizer, startsDocument: false).Append(word));
        Assert.Equal(inside[1..], new StreamingDecoder(tokenizer).Append(word));
    }

    [Fact]
    public void A_line_of_ten_million_characters_without_spaces_takes_work_in_proportion_to_its_length()
    {
        var tokenizer = new BpeTokenizer(s_model);
        var random = new Random(10);
        string[] words = [.. s_model.Pieces.Skip(259).Where(piece => piece.Text.All(char.IsAsciiLetter)).Select(piece => piece.Text)];
        string text = string.Create(10_000_000, words, (span, parts) =>
        {
            for (int i = 0; i < span.Length;)
            {
                string word = parts[random.Next(parts.Length)];
                word.AsSpan(0, Math.Min(word.Length, span.Length - i)).CopyTo(span[i..]);
                i += word.Length;
            }
        });

        // A character enters the queue with its right neighbour, and each merge adds at most two pairs.
        Assert.InRange(tokenizer.CountQueued(text), text.Length / 4, 3L * text.Length);
        Assert.Equal(text[..1000], tokenizer.Decode(Encode(tokenizer, text[..1000]).ToArray()));
    }

    [Fact]
    public void Threads_that_share_a_tokenizer_get_the_same_ids()
    {
        var tokenizer = new BpeTokenizer(s_model);
        string[] documents = TokenizerTexts.RandomDocuments(3, 200);
        List<int>[] expected = [.. documents.Select(document => Encode(new BpeTokenizer(s_model), document))];
        var results = new List<int>[documents.Length * 4];
        Thread[] threads = [.. Enumerable.Range(0, 4).Select(t => new Thread(() =>
        {
            for (int i = 0; i < documents.Length; i++)
            {
                results[(t * documents.Length) + i] = Encode(tokenizer, documents[i]);
            }
        }))];
        Array.ForEach(threads, thread => thread.Start());
        Array.ForEach(threads, thread => thread.Join());
        for (int i = 0; i < results.Length; i++)
        {
            Assert.Equal(expected[i % documents.Length], results[i]);
        }
    }

    [Fact]
    public void User_defined_symbols_are_found_before_merges_and_control_symbols_are_text()
    {
        BpeModel model = s_model with
        {
            Pieces = [.. s_model.Pieces, new Piece("<|tool|>", 0, PieceKind.UserDefined), new Piece("<|to", 0, PieceKind.UserDefined)],
        };
        var tokenizer = new BpeTokenizer(model);
        List<int> ids = Encode(tokenizer, "an<|tool|>an<|to");
        Assert.Single(ids, 450);
        Assert.Single(ids, 451);
        Assert.Equal("an<|tool|>an<|to", tokenizer.Decode(ids.ToArray()));
        Assert.DoesNotContain(2, Encode(tokenizer, "</s>"));
        List<int> marked = [];
        tokenizer.EncodeWithControls("a</s>a", marked);
        Assert.Equal([.. Encode(tokenizer, "a"), 2, .. Encode(tokenizer, "a")], marked);
    }

    [Fact]
    public void Without_byte_fallback_a_run_of_unknown_characters_is_one_unknown_token()
    {
        BpeModel model = s_model with
        {
            ByteFallback = false,
            Pieces = [.. s_model.Pieces.Where(piece => piece.Kind != PieceKind.Byte)],
        };
        var tokenizer = new BpeTokenizer(model);
        List<int> ids = Encode(tokenizer, "a\u4E00\u4E01\u4E02 \u4E03");
        Assert.Equal(2, ids.Count(id => id == 0));
        Assert.Equal("a \u2047   \u2047 ", tokenizer.Decode(ids.ToArray()));
    }

    [Fact]
    public void Byte_tokens_are_the_bytes_of_the_text()
    {
        var tokenizer = new ByteTokenizer();
        Assert.Equal([0x61, 0xC3, 0xA9], Encode(tokenizer, "a\u00E9"));
        Assert.Equal("a\u00E9", tokenizer.Decode([256, 0x61, 0xC3, 0xA9, 257]));
        Assert.Throws<ArgumentOutOfRangeException>(() => tokenizer.TokenBytes(258));
    }

    private static List<int> Encode(ITokenizer tokenizer, string text)
    {
        List<int> ids = [];
        tokenizer.Encode(text, ids);
        return ids;
    }

    /// <summary>
    /// A vocabulary of random strings, many of which cannot be reached, with spaces inside and characters that have no piece of
    /// their own, and with equal scores.
    /// </summary>
    private static BpeModel RandomModel(Random random)
    {
        List<Piece> pieces = [new Piece("<unk>", 0, PieceKind.Unknown)];
        pieces.AddRange(Enumerable.Range(0, 256).Select(value => new Piece($"<0x{value:X2}>", 0, PieceKind.Byte)));
        var seen = new HashSet<string>(StringComparer.Ordinal);
        for (int i = random.Next(5, 60); i > 0; i--)
        {
            string text = RandomText(random, random.Next(1, 5)).Replace(' ', '\u2581');
            if (seen.Add(text))
            {
                pieces.Add(new Piece(text, -random.Next(0, 40), PieceKind.Normal));
            }
        }

        return new BpeModel { Pieces = pieces, ByteFallback = true };
    }

    private static string RandomText(Random random, int length)
    {
        return string.Concat(Enumerable.Range(0, length).Select(_ => "aab \u00E9\n"[random.Next(6)]));
    }
}
