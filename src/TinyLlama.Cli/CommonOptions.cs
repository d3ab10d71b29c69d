using System.CommandLine;
using System.Globalization;
using System.Numerics;
using TinyLlama.Compute;

namespace TinyLlama.Cli;

/// <summary>The options that several verbs share, so that a word means the same everywhere.</summary>
internal static class CommonOptions
{
    /// <summary><c>RUN</c>: a trained model.</summary>
    public static Argument<string> Model() =>
        new("MODEL") { Description = "A run, a checkpoint, a Hugging Face folder, a .gguf file, or a .bin file of llama2.c" };

    /// <summary><c>--chat-template NAME</c>: how conversations become prompts.</summary>
    public static Option<string?> ChatTemplate() => new("--chat-template")
    {
        Description = "human-assistant, chatml, zephyr, plain, or a file with a Jinja template [default: the model's own, else plain]",
        HelpName = "NAME",
    };

    /// <summary><c>--lora DIR</c>: an adapter.</summary>
    public static Option<string?> Lora() => new("--lora")
    {
        Description = "A folder in which PEFT saved a LoRA adapter, which is added to the weights",
        HelpName = "DIR",
    };

    /// <summary><c>--json</c>: the result as one JSON document on standard output; progress stays on standard error.</summary>
    public static Option<bool> Json() => new("--json") { Description = "Write the result as JSON" };

    /// <summary><c>--out PATH</c>: the folder where the result goes.</summary>
    public static Option<string?> Out(string description)
    {
        var option = new Option<string?>("--out") { Description = description, HelpName = "PATH" };
        option.Validators.Add(static result =>
        {
            if (result.Tokens is [{ Value: string path }] && File.Exists(path))
            {
                result.AddError($"--out {path}: is a file; name a folder");
            }
        });
        return option;
    }

    /// <summary><c>--set key=value</c>, any number of times: overrides one key of the recipe.</summary>
    public static Option<string[]> Set() => new("--set")
    {
        Description = "Override a key of the recipe, such as optimizer.learning_rate=3e-4; may be repeated",
        HelpName = "KEY=VALUE",
        AllowMultipleArgumentsPerToken = false,
        DefaultValueFactory = _ => [],
    };

    /// <summary><c>--lookup N</c> of what runs texts together.</summary>
    public static Option<int?> Lookup()
    {
        var option = new Option<int?>("--lookup")
        {
            Description = "Try up to N tokens at a time that followed where a reply's last ones stood before: the same reply, sooner where it repeats [default: none]",
            HelpName = "N",
        };
        return AtLeast(option, 1);
    }

    /// <summary><c>--threads N</c>.</summary>
    public static Option<int?> Threads()
    {
        var option = new Option<int?>("--threads")
        {
            Description = "Threads to compute with [default: one a core]",
            HelpName = "N",
        };
        return AtLeast(option, 1);
    }

    /// <summary><c>--cache-type T</c>: what keys and values are rounded to.</summary>
    public static Option<DType?> CacheType()
    {
        var option = new Option<DType?>("--cache-type")
        {
            Description = "What keys and values are rounded to in the cache [default: f16, on a GPU bf16]",
            CustomParser = result => Enum.Parse<DType>(result.Tokens[0].Value, ignoreCase: true),
        };
        return option.AcceptOnlyFromAmong(StringComparer.OrdinalIgnoreCase, "f32", "f16", "bf16", "q8_0");
    }

    /// <summary><c>--device D</c>: what to compute on.</summary>
    public static Option<Device?> Device() => new("--device")
    {
        Description = "What to compute on: cpu, cuda (a GPU), cuda:N (the one of that number), or auto (a GPU where one can be used)",
        HelpName = "D",
        CustomParser = result =>
        {
            if (Compute.Device.TryParse(result.Tokens[0].Value, out Device device))
            {
                return device;
            }

            result.AddError($"--device {result.Tokens[0].Value}: no such device; use cpu, cuda, cuda:N or auto");
            return null;
        },
    };

    /// <summary><c>--max-tokens N</c>.</summary>
    public static Option<int?> MaxTokens(string description)
    {
        var option = new Option<int?>("--max-tokens") { Description = description, HelpName = "N" };
        return AtLeast(option, 0);
    }

    /// <summary><c>--max-steps N</c>.</summary>
    public static Option<long?> MaxSteps()
    {
        var option = new Option<long?>("--max-steps")
        {
            Description = "Stop after this many steps in all; the schedule stays that of the whole budget",
            HelpName = "N",
        };
        return AtLeast(option, 0);
    }

    /// <summary><c>--temperature X</c>; 0 is greedy.</summary>
    public static Option<double?> Temperature()
    {
        var option = new Option<double?>("--temperature")
        {
            Description = "Divides the logits before sampling; 0 takes the likeliest token [default: 0.8]",
            HelpName = "X",
        };
        return AtLeast(option, 0);
    }

    /// <summary><c>--seed N</c>.</summary>
    public static Option<ulong?> Seed() =>
        new("--seed") { Description = "Seed of everything random", HelpName = "N" };

    /// <summary><c>--ctx N</c>: the context length, in tokens.</summary>
    public static Option<int?> Context()
    {
        var option = new Option<int?>("--ctx") { Description = "Context length in tokens", HelpName = "N" };
        return AtLeast(option, 1);
    }

    /// <summary>Takes one of some words, which are in lower case: whoever writes <c>Q4_K_M</c> means <c>q4_k_m</c>.</summary>
    public static Option<string> OneOf(Option<string> option, string[] words)
    {
        option.CustomParser = static result => result.Tokens[0].Value.ToLowerInvariant();
        return option.AcceptOnlyFromAmong(StringComparer.OrdinalIgnoreCase, words);
    }

    /// <summary>Refuses numbers below a bound.</summary>
    public static Option<T?> AtLeast<T>(Option<T?> option, T least)
        where T : struct, INumber<T>
    {
        option.Validators.Add(result =>
        {
            // Text that is no number of the type is reported by the parser itself.
            if (result.Tokens is [{ Value: string text }] && double.TryParse(text, NumberStyles.Float, CultureInfo.InvariantCulture, out double value)
                && value < double.CreateChecked(least))
            {
                result.AddError($"{option.Name} is {text}, which is less than {least}");
            }
        });
        return option;
    }
}
