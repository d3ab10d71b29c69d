using System.Diagnostics;
using System.Text;
using System.Text.Json.Nodes;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Tests.Common;

namespace TinyLlama.Data.Tests.Tokenizers;

public sealed class TokenizerFileTests : IDisposable
{
    private static readonly BpeModel s_model = BpeTrainer.Train(
        TokenizerTexts.RandomDocuments(1, 400), new BpeTrainingOptions { VocabularySize = 420, CharacterCoverage = 0.999 });

    private readonly string _folder = Directory.CreateTempSubdirectory("tokenizer-files-").FullName;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Fact]
    public void A_model_written_and_read_again_is_the_same_in_both_forms()
    {
        var tokenizer = new BpeTokenizer(s_model);
        Assert.Empty(tokenizer.Save(_folder));
        BpeTokenizer model = Tokenizer.Load(_folder);
        BpeTokenizer json = Tokenizer.Load(Path.Combine(_folder, "tokenizer.json"));
        Assert.Equal(s_model.Pieces, model.Model.Pieces);
        Assert.Equal(s_model.Pieces.Select(piece => (piece.Text, piece.Kind)), json.Model.Pieces.Select(piece => (piece.Text, piece.Kind)));
        Assert.Null(json.Model.Merges);
        Assert.Equal(tokenizer.Hash, model.Hash);
        Assert.Equal(tokenizer.Hash, json.Hash);
        Assert.Equal(SentencePieceModel.Write(s_model), File.ReadAllBytes(Path.Combine(_folder, "tokenizer.model")));
        Assert.Equal(HuggingFaceTokenizer.Write(tokenizer), HuggingFaceTokenizer.Write(json));
        foreach (string text in TokenizerTexts.RandomDocuments(2, 30))
        {
            Assert.Equal(Encode(tokenizer, text), Encode(model, text));
            Assert.Equal(Encode(tokenizer, text), Encode(json, text));
        }
    }

    [Fact]
    public void A_tokenizer_that_cannot_be_written_leaves_the_one_before()
    {
        new BpeTokenizer(s_model).Save(_folder);
        byte[][] before = [.. Directory.GetFiles(_folder).Order(StringComparer.Ordinal).Select(File.ReadAllBytes)];
        string inTheWay = Directory.CreateDirectory(Path.Combine(_folder, "special_tokens_map.json.tmp")).FullName;
        BpeModel other = BpeTrainer.Train(TokenizerTexts.RandomDocuments(3, 400), new BpeTrainingOptions { VocabularySize = 400 });
        string message = Assert.Throws<UserErrorException>(() => new BpeTokenizer(other).Save(_folder)).Message;
        Assert.Contains(_folder, message, StringComparison.Ordinal);
        Assert.Equal(before, Directory.GetFiles(_folder).Order(StringComparer.Ordinal).Select(File.ReadAllBytes));
        Directory.Delete(inTheWay);
        new BpeTokenizer(other).Save(_folder);
        Assert.Equal(SentencePieceModel.Write(other), File.ReadAllBytes(Path.Combine(_folder, "tokenizer.model")));
    }

    [Fact]
    public void The_hash_follows_what_decides_ids()
    {
        string hash = new BpeTokenizer(s_model).Hash;
        Piece[] swapped = [.. s_model.Pieces];
        (swapped[300], swapped[301]) = (swapped[301], swapped[300]);
        Assert.NotEqual(hash, new BpeTokenizer(s_model with { Pieces = swapped }).Hash);
        Assert.NotEqual(hash, new BpeTokenizer(s_model with { DummyPrefix = DummyPrefix.None }).Hash);
        Piece[] rescored = [.. s_model.Pieces];
        (rescored[270], rescored[280]) =
            (rescored[270] with { Score = rescored[280].Score }, rescored[280] with { Score = rescored[270].Score });
        Assert.NotEqual(hash, new BpeTokenizer(s_model with { Pieces = rescored }).Hash);
        Assert.Equal(64, hash.Length);
        Assert.NotEqual(hash, new ByteTokenizer().Hash);
    }

    [Fact]
    public void Llama_2_goes_through_both_forms_unchanged()
    {
        BpeTokenizer llama = Tokenizer.Load(SharedFiles.Require("oracles/llama2-tokenizer/tokenizer.model"));
        Assert.Empty(llama.Save(_folder));
        BpeTokenizer model = Tokenizer.Load(_folder);
        BpeTokenizer json = Tokenizer.Load(Path.Combine(_folder, "tokenizer.json"));
        Assert.Equal(llama.Hash, model.Hash);
        Assert.Equal(llama.Model.Pieces, model.Model.Pieces);
        string text = File.ReadAllText(SharedFiles.Require("oracles/tinyshakespeare/input.txt"));
        List<int> ids = Encode(llama, text);
        Assert.Equal(ids, Encode(json, text));
        Assert.Equal(text, llama.Decode(ids.ToArray()));
        for (int length = 0; length < 100; length++)
        {
            Assert.Equal(Encode(llama, new string(' ', length)), Encode(json, new string(' ', length)));
        }
    }

    [Fact]
    public void The_vocabulary_of_llama2_c_decodes_and_encodes_its_stories()
    {
        BpeTokenizer tokenizer = Tokenizer.Load(SharedFiles.Require("oracles/stories260K/tok512.bin"));
        Assert.Equal(512, tokenizer.VocabularySize);
        Assert.Equal(1, tokenizer.Bos);
        string story = File.ReadAllText(SharedFiles.Require("oracles/stories260K/expected_stdout_200.txt"));
        List<int> ids = Encode(tokenizer, story);
        Assert.Equal(story, tokenizer.Decode(ids.ToArray()));
        Assert.Equal(NaiveBpe.Encode(tokenizer.Model, story), ids);
    }

    [Theory]
    [InlineData("byte-level", "byte-level BPE")]
    [InlineData("merges", "do not follow from an order")]
    [InlineData("no prefix", "puts no space before it")]
    [InlineData("no bytes", "id 3 is 'a' (Normal)")]
    [InlineData("short", "id 258 is missing")]
    [InlineData("other EOS", "id 2 is '</s>' (Control)")]
    [InlineData("control", "id 259 is '<|user|>' (Control)")]
    public void What_llama2_c_would_encode_otherwise_is_not_written(string change, string said)
    {
        Piece[] bytes = [.. Enumerable.Range(0, 256).Select(value => new Piece($"<0x{value:X2}>", 0, PieceKind.Byte))];
        Piece[] special = [new("<unk>", 0, PieceKind.Unknown), new("<s>", 0, PieceKind.Control), new("</s>", 0, PieceKind.Control)];
        var model = new BpeModel { Pieces = [.. special, .. bytes, new("a", -1, PieceKind.Normal)], ByteFallback = true };
        Assert.Equal(model.Pieces, Llama2CTokenizer.Read(Llama2CTokenizer.Write(model, 260), "x.bin").Pieces);
        BpeModel changed = change switch
        {
            "byte-level" => model with { WordSplit = WordSplit.Gpt2 },
            "merges" => model with { Merges = [] },
            "no prefix" => model with { DummyPrefix = DummyPrefix.None },
            "no bytes" => model with { Pieces = [.. special, new("a", -1, PieceKind.Normal)] },
            "short" => model with { Pieces = [.. special, .. bytes[..^1]] },
            "other EOS" => model with { EosPiece = "<|end|>" },
            _ => model with { Pieces = [.. special, .. bytes, new("<|user|>", 0, PieceKind.Control)] },
        };
        Assert.Contains(said, Assert.Throws<UserErrorException>(() => Llama2CTokenizer.Write(changed, 300)).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void SentencePiece_loads_our_model_and_gives_the_same_ids()
    {
        Programs.Require("spm_encode", "SentencePiece's spm_encode (Debian package sentencepiece)");
        string text = Lines();
        BpeModel model = BpeTrainer.Train([text], new BpeTrainingOptions { VocabularySize = 2000 });
        var tokenizer = new BpeTokenizer(model);
        tokenizer.Save(_folder);
        string output = Run("spm_encode", text, $"--model={Path.Combine(_folder, "tokenizer.model")}", "--output_format=id");
        AssertLines(tokenizer, text, output);
    }

    [Fact]
    public void SentencePieces_own_models_give_its_ids_with_every_normalization()
    {
        Programs.Require("spm_train", "SentencePiece's spm_train (Debian package sentencepiece)");
        string text = Lines();
        string file = Path.Combine(_folder, "text.txt");
        File.WriteAllText(file, text);
        string hard = string.Concat(
            TokenizerTexts.RandomUnicode(new Random(3), 3000).Where(c => c is not ('\n' or '\r' or '\0' or '\u2028'))) + "\n"
            + "  two  spaces \u3000 wide \uFF21\uFF22 \uFF8A\uFF9E \uFF8A e\u0301 \uFB01 \u2460 \u00BD  \n \n\u2581\u2581 a \u2581\n<|x|> <|x|>  b<|x|>\n";
        foreach (string settings in (string[])[
            "--normalization_rule_name=nmt_nfkc",
            "--normalization_rule_name=nmt_nfkc_cf --byte_fallback",
            "--normalization_rule_name=identity --byte_fallback --remove_extra_whitespaces=false",
            "--normalization_rule_name=nfkc --add_dummy_prefix=false --user_defined_symbols=<|x|>,\uFF21,\u2581th",
            "--normalization_rule_name=identity --remove_extra_whitespaces=true --user_defined_symbols=<|x|>"])
        {
            string prefix = Path.Combine(_folder, "peer");
            Run("spm_train", "", [$"--input={file}", $"--model_prefix={prefix}", "--model_type=bpe", "--vocab_size=600", "--minloglevel=2",
                .. settings.Split(' ')]);
            BpeTokenizer tokenizer = Tokenizer.Load(prefix + ".model");
            AssertLines(tokenizer, text + hard, Run("spm_encode", text + hard, $"--model={prefix}.model", "--output_format=id"));

            // What we write of it is the same to SentencePiece.
            File.WriteAllBytes(prefix + "2.model", SentencePieceModel.Write(tokenizer.Model));
            AssertLines(tokenizer, text + hard, Run("spm_encode", text + hard, $"--model={prefix}2.model", "--output_format=id"));
        }
    }

    [Fact]
    public void Hugging_Faces_transformers_give_the_same_ids_with_our_tokenizer_json()
    {
        string package = NodePackages.Require("@huggingface/transformers");
        Programs.Require("node", "node");
        string text = Lines() + "  two  spaces\n\u2581 \U0001F999 \u65E5\u672C\u8A9E\u0007\n1234 def f(x):    return\n";
        BpeModel model = BpeTrainer.Train([text], new BpeTrainingOptions { VocabularySize = 2000, CharacterCoverage = 0.999 });
        var tokenizer = new BpeTokenizer(model);
        tokenizer.Save(Path.Combine(_folder, "ours"));
        string script = Path.Combine(_folder, "encode.mjs");
        File.WriteAllText(script, $$"""
            import { AutoTokenizer, env } from '{{Path.Combine(package, "dist", "transformers.node.mjs")}}';
            import fs from 'fs';
            env.allowRemoteModels = false;
            env.localModelPath = '{{_folder}}/';
            const tokenizer = await AutoTokenizer.from_pretrained('ours', { local_files_only: true });
            const lines = fs.readFileSync(0, 'utf8').split('\n').slice(0, -1);
            for (const line of lines) console.log(tokenizer.encode(line, { add_special_tokens: false }).join(' '));
            """);
        AssertLines(tokenizer, text, Run("node", text, script));
    }

    [Fact]
    public void Every_truncated_or_altered_model_is_read_or_refused_with_a_message()
    {
        BpeModel small = BpeTrainer.Train(["some text, some more text"], new BpeTrainingOptions { VocabularySize = 275, CharacterCoverage = 1 });
        byte[] file = SentencePieceModel.Write(small);
        for (int length = 0; length < file.Length; length++)
        {
            ReadOrRefuse(content => SentencePieceModel.Read(content, "x.model"), file[..length]);
        }

        var random = new Random(11);
        for (int i = 0; i < 4000; i++)
        {
            byte[] altered = [.. file];
            for (int flips = random.Next(1, 4); flips > 0; flips--)
            {
                altered[random.Next(altered.Length)] ^= (byte)(1 << random.Next(8));
            }

            ReadOrRefuse(content => SentencePieceModel.Read(content, "x.model"), altered);
        }

        byte[] hugeField = [0x0A, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F, .. file];
        var error = Assert.Throws<UserErrorException>(() => SentencePieceModel.Read(hugeField, "x.model"));
        Assert.Contains("x.model: a field of 4294967295 bytes", error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Every_truncated_or_altered_json_is_read_or_refused_with_a_message()
    {
        byte[] file = HuggingFaceTokenizer.Write(new BpeTokenizer(
            BpeTrainer.Train(["some text, some more text"], new BpeTrainingOptions { VocabularySize = 275, CharacterCoverage = 1 })));
        for (int length = 0; length < file.Length; length += 13)
        {
            ReadOrRefuse(content => HuggingFaceTokenizer.Read(content, "x.json"), file[..length]);
        }

        var random = new Random(12);
        for (int i = 0; i < 1500; i++)
        {
            byte[] altered = [.. file];
            altered[random.Next(altered.Length)] = (byte)(i % 2 == 0 ? random.Next(32, 127) : random.Next(256));
            ReadOrRefuse(content => HuggingFaceTokenizer.Read(content, "x.json"), altered);
        }
    }

    [Fact]
    public void Every_truncated_or_altered_vocabulary_of_llama2_c_is_read_or_refused_with_a_message()
    {
        byte[] file = File.ReadAllBytes(SharedFiles.Require("oracles/stories260K/tok512.bin"));
        for (int length = 0; length < file.Length; length += 3)
        {
            ReadOrRefuse(content => Llama2CTokenizer.Read(content, "x.bin"), file[..length]);
        }

        var random = new Random(13);
        for (int i = 0; i < 500; i++)
        {
            byte[] altered = [.. file];
            altered[random.Next(altered.Length)] ^= (byte)(1 << random.Next(8));
            ReadOrRefuse(content => Llama2CTokenizer.Read(content, "x.bin"), altered);
        }
    }

    [Fact]
    public void An_altered_character_map_is_read_or_refused_with_a_message()
    {
        string path = SharedFiles.Require("oracles/spm-vectors/test_model.model");
        byte[] map = CharacterMapOf(File.ReadAllBytes(path));
        Assert.True(map.Length > 1000);
        var random = new Random(14);
        for (int i = 0; i < 200; i++)
        {
            byte[] altered = i < 100 ? [.. map] : map[..random.Next(map.Length)];
            for (int flips = 50; flips > 0 && altered.Length > 0; flips--)
            {
                altered[random.Next(Math.Min(altered.Length, i % 2 == 0 ? 200 : altered.Length))] = (byte)random.Next(256);
            }

            try
            {
                var tokenizer = new BpeTokenizer(s_model with { CharacterMap = altered });
                Encode(tokenizer, TokenizerTexts.RandomUnicode(random, 200));
            }
            catch (UserErrorException error)
            {
                Assert.Contains("precompiled_charsmap", error.Message, StringComparison.Ordinal);
            }
        }
    }

    [Theory]
    [InlineData("{}", "has no \"model\"")]
    [InlineData("[]", "has no \"model\"")]
    [InlineData("nonsense", "line 1")]
    [InlineData("""{"model":{"type":"Unigram"}}""", "Unigram")]
    [InlineData("""{"model":{"type":"BPE"},"pre_tokenizer":{"type":"ByteLevel"}}""", "pre_tokenizer of type ByteLevel with these settings")]
    [InlineData("""{"model":{"type":"BPE"},"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false}}""", "only one of pre_tokenizer and decoder is ByteLevel")]
    [InlineData("""{"model":{"type":"BPE"},"decoder":{"type":"ByteLevel"}}""", "only one of pre_tokenizer and decoder is ByteLevel")]
    [InlineData("""{"model":{"type":"BPE"},"pre_tokenizer":{"type":"Split","pattern":{"Regex":"x"},"behavior":"Isolated"}}""", "pre_tokenizer of type Split")]
    [InlineData("""{"model":{"type":"BPE"},"normalizer":{"type":"NFKC"}}""", "NFKC")]
    [InlineData("""{"model":{"type":"BPE","ignore_merges":true}}""", "ignore_merges")]
    [InlineData("""{"model":{"type":"BPE","byte_fallback":"yes"}}""", "byte_fallback")]
    [InlineData("""{"model":{"type":"BPE"},"normalizer":"Prepend"}""", "normalizer")]
    [InlineData("""{"model":{"type":"BPE","dropout":0.1}}""", "dropout")]
    [InlineData("""{"model":{"type":"BPE","fuse_unk":true,"unk_token":"a","vocab":{"a":0,"b":2},"merges":[]}}""", "ids must be")]
    [InlineData("""{"model":{"type":"BPE","fuse_unk":true,"unk_token":"a","vocab":{"a":0,"b":0},"merges":[]}}""", "id 0")]
    [InlineData("""{"model":{"type":"BPE","fuse_unk":true,"unk_token":"u","vocab":{"u":0,"b":1},"merges":["b c"]}}""", "merge 0")]
    [InlineData("""{"model":{"type":"BPE","fuse_unk":true,"unk_token":"u","vocab":{"u":0,"b":1},"merges":["b b"]}}""", "merge 0")]
    [InlineData("""{"model":{"type":"BPE","byte_fallback":true,"vocab":{"u":0,"b":1},"merges":[]}}""", "<0x00>")]
    [InlineData("""{"model":{"type":"BPE","fuse_unk":true,"vocab":{"u":0},"merges":[]}}""", "unknown piece")]
    [InlineData("""{"model":{"type":"BPE","fuse_unk":true,"vocab":{"\uD800":0},"merges":[]}}""", "not Unicode")]
    public void A_json_that_cannot_be_followed_exactly_is_refused_with_the_reason(string json, string reason)
    {
        string path = Path.Combine(_folder, "tokenizer.json");
        File.WriteAllText(path, json);
        var error = Assert.Throws<UserErrorException>(() => Tokenizer.Load(path));
        Assert.StartsWith(path, error.Message, StringComparison.Ordinal);
        Assert.Contains(reason, error.Message, StringComparison.Ordinal);
        Assert.DoesNotContain('\n', error.Message);
    }

    [Fact]
    public void Metaspace_puts_no_space_before_a_space_and_begins_a_word_with_each()
    {
        JsonNode root = JsonNode.Parse(HuggingFaceTokenizer.Write(new BpeTokenizer(s_model)))!;
        root["normalizer"] = null;
        root["pre_tokenizer"] = JsonNode.Parse("""{"type":"Metaspace","replacement":"▁","prepend_scheme":"first","split":false}""");
        BpeTokenizer kept = ReadJson(root);
        Assert.Equal(Encode(kept, "an"), Encode(kept, " an"));
        Assert.NotEqual(Encode(new BpeTokenizer(s_model), "an"), Encode(new BpeTokenizer(s_model), " an"));
        Assert.Equal("an   an", kept.Decode(Encode(kept, "an   an").ToArray()));
        root["pre_tokenizer"]!["split"] = true;
        BpeTokenizer split = ReadJson(root);
        Assert.DoesNotContain(Encode(split, "an    an"), id => s_model.Pieces[id].Text.StartsWith("\u2581\u2581", StringComparison.Ordinal));
        Assert.Contains(Encode(kept, "an    an"), id => s_model.Pieces[id].Text.StartsWith("\u2581\u2581", StringComparison.Ordinal));
        root["pre_tokenizer"]!["prepend_scheme"] = "never";
        Assert.Equal(DummyPrefix.None, ReadJson(root).Model.DummyPrefix);
    }

    [Fact]
    public void Merges_whose_order_no_scores_express_are_followed_as_listed_and_not_written_as_a_model()
    {
        // "abc" may come of (ab, c) but not of (a, bc).
        const string Json = """
            {"model":{"type":"BPE","fuse_unk":true,"unk_token":"u",
            "vocab":{"u":0,"a":1,"b":2,"c":3,"bc":4,"ab":5,"abc":6},"merges":[["b","c"],["a","b"],["ab","c"]]}}
            """;
        var tokenizer = new BpeTokenizer(HuggingFaceTokenizer.Read(Encoding.UTF8.GetBytes(Json), "x.json"));
        Assert.Equal([1, 4], Encode(tokenizer, "abc"));
        Assert.Throws<UserErrorException>(() => SentencePieceModel.Write(tokenizer.Model));
    }

    [Fact]
    public void Pieces_of_equal_score_are_not_written_as_a_list()
    {
        Piece[] tied = [.. s_model.Pieces.Select(piece => piece with { Score = 0 })];
        var tokenizer = new BpeTokenizer(s_model with { Pieces = tied });
        Assert.Contains("equal score", Assert.Throws<UserErrorException>(() => HuggingFaceTokenizer.Write(tokenizer)).Message, StringComparison.Ordinal);
        Assert.Single(tokenizer.Save(_folder));
        Assert.False(File.Exists(Path.Combine(_folder, "tokenizer.json")));
    }

    [Fact]
    public void Added_tokens_split_the_text_and_special_ones_are_never_found_in_it()
    {
        JsonNode root = JsonNode.Parse(HuggingFaceTokenizer.Write(new BpeTokenizer(s_model)))!;
        root["added_tokens"]!.AsArray().Add(JsonNode.Parse("""{"id":420,"content":"<|x|>","normalized":false,"special":false}"""));
        root["added_tokens"]!.AsArray().Add(JsonNode.Parse("""{"id":421,"content":"<|y|>","normalized":false,"special":true}"""));
        BpeTokenizer tokenizer = ReadJson(root);
        Assert.Equal([.. Encode(tokenizer, "an"), 420, .. Encode(tokenizer, "an")], Encode(tokenizer, "an<|x|>an"));
        Assert.DoesNotContain(421, Encode(tokenizer, "an<|y|>an"));
        List<int> marked = [];
        tokenizer.EncodeWithControls("an<|y|>an<|x|>an", marked);
        List<int> word = Encode(tokenizer, "an");
        Assert.Equal([.. word, 421, .. word, 420, .. word], marked);
        Assert.Single(tokenizer.Save(_folder));
        Assert.Equal(tokenizer.Hash, Tokenizer.Load(_folder).Hash);
        root["added_tokens"]!.AsArray()[^2]!["lstrip"] = true;
        Assert.Contains("lstrip", Assert.Throws<UserErrorException>(() => ReadJson(root)).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void The_configuration_beside_a_json_names_the_pieces_that_begin_and_end_documents()
    {
        new BpeTokenizer(s_model).Save(_folder);
        File.Delete(Path.Combine(_folder, "tokenizer.model"));
        File.WriteAllText(Path.Combine(_folder, "tokenizer_config.json"), """{"bos_token":{"content":"</s>"},"eos_token":"none"}""");
        BpeTokenizer tokenizer = Tokenizer.Load(_folder);
        Assert.Equal(2, tokenizer.Bos);
        Assert.Null(tokenizer.Eos);
    }

    [Fact]
    public void A_wrong_path_is_refused_with_the_names_of_what_is_expected()
    {
        foreach (string path in (string[])[_folder, Path.Combine(_folder, "missing"), Path.Combine(_folder, "missing.json")])
        {
            string message = Assert.Throws<UserErrorException>(() => Tokenizer.Load(path)).Message;
            Assert.Contains("tokenizer.model", message, StringComparison.Ordinal);
            Assert.Contains("tokenizer.json", message, StringComparison.Ordinal);
        }
    }

    [Fact]
    public void Models_that_contradict_themselves_are_refused()
    {
        var cases = new (BpeModel Model, string Reason)[]
        {
            (s_model with { Pieces = [.. s_model.Pieces, s_model.Pieces[300]] }, "twice"),
            (s_model with { Pieces = [.. s_model.Pieces, new Piece("<unk2>", 0, PieceKind.Unknown)] }, "both the unknown"),
            (s_model with { Pieces = [.. s_model.Pieces, new Piece("x", 0, PieceKind.Unused)] }, "UNUSED"),
            (s_model with { Pieces = [.. s_model.Pieces, new Piece("<0xZZ>", 0, PieceKind.Byte)] }, "<0x41>"),
            (s_model with { Pieces = [.. s_model.Pieces, new Piece("ab", float.NaN, PieceKind.Normal)] }, "not a number"),
            (s_model with { Pieces = [.. s_model.Pieces, new Piece(new string('a', 2000), 0, PieceKind.Normal)] }, "2000 characters"),
            (s_model with { Merges = [new Merge(0, 100000)] }, "100000"),
        };
        foreach ((BpeModel model, string reason) in cases)
        {
            Assert.Contains(reason, Assert.Throws<UserErrorException>(() => new BpeTokenizer(model)).Message, StringComparison.Ordinal);
        }
    }

    private static BpeTokenizer ReadJson(JsonNode root)
    {
        return new BpeTokenizer(HuggingFaceTokenizer.Read(Encoding.UTF8.GetBytes(root.ToJsonString()), "x.json"));
    }

    private static void ReadOrRefuse(Func<byte[], BpeModel> read, byte[] content)
    {
        try
        {
            var tokenizer = new BpeTokenizer(read(content), "x");
            Encode(tokenizer, "some text");
        }
        catch (UserErrorException error)
        {
            Assert.StartsWith("x", error.Message, StringComparison.Ordinal);
        }
    }

    /// <summary>The bytes of normalizer_spec.precompiled_charsmap of a model whose kind is refused otherwise.</summary>
    private static byte[] CharacterMapOf(byte[] file)
    {
        var reader = new ProtobufReader(file, 0, "model");
        while (reader.Next())
        {
            if (reader.Field != 3)
            {
                reader.Skip();
                continue;
            }

            ProtobufReader normalizer = reader.Message();
            while (normalizer.Next())
            {
                if (normalizer.Field == 2)
                {
                    return normalizer.Bytes().ToArray();
                }

                normalizer.Skip();
            }
        }

        return [];
    }

    private static List<int> Encode(BpeTokenizer tokenizer, string text)
    {
        List<int> ids = [];
        tokenizer.Encode(text, ids);
        return ids;
    }

    private static string Lines() => string.Join("\n", TokenizerTexts.RandomDocuments(21, 1500, 3000)).Replace('\t', ' ') + "\n";

    private static void AssertLines(BpeTokenizer tokenizer, string text, string output)
    {
        string[] lines = text.Split('\n');
        string[] expected = output.Split('\n');
        Assert.Equal(expected.Length, lines.Length);
        for (int i = 0; i + 1 < lines.Length; i++)
        {
            Assert.Equal(expected[i], string.Join(' ', Encode(tokenizer, lines[i])));
        }
    }

    private static string Run(string program, string input, params string[] arguments)
    {
        var start = new ProcessStartInfo(program, arguments)
        {
            UseShellExecute = false,
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            StandardInputEncoding = new UTF8Encoding(false),
            StandardOutputEncoding = new UTF8Encoding(false),
        };
        using Process process = Process.Start(start)!;
        Task<string> output = process.StandardOutput.ReadToEndAsync();
        Task<string> errors = process.StandardError.ReadToEndAsync();
        process.StandardInput.Write(input);
        process.StandardInput.Close();
        process.WaitForExit();
        Assert.True(process.ExitCode == 0, errors.GetAwaiter().GetResult());
        return output.GetAwaiter().GetResult();
    }
}
