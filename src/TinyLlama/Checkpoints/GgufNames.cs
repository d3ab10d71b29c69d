namespace TinyLlama.Checkpoints;

/// <summary>What GGUF files call the tensors of a Llama, and which of them they store in another order of rows.</summary>
internal static class GgufNames
{
    /// <summary>What the frequencies of the rotary embedding are divided by, (D/2), where they are scaled one by one.</summary>
    public const string RopeDivisors = "rope_freqs.weight";

    /// <summary>The name in a GGUF file of a tensor of <see cref="ModelTensors"/>.</summary>
    public static string Of(string name)
    {
        switch (name)
        {
            case ModelTensors.Embedding:
                return "token_embd.weight";
            case ModelTensors.Norm:
                return "output_norm.weight";
            case ModelTensors.Head:
                return "output.weight";
        }

        // model.layers.N.PART.weight
        string[] parts = name.Split('.', 4);
        string part = parts[3][..^".weight".Length] switch
        {
            "input_layernorm" => "attn_norm",
            "self_attn.q_proj" => "attn_q",
            "self_attn.k_proj" => "attn_k",
            "self_attn.v_proj" => "attn_v",
            "self_attn.o_proj" => "attn_output",
            "post_attention_layernorm" => "ffn_norm",
            "mlp.gate_proj" => "ffn_gate",
            "mlp.up_proj" => "ffn_up",
            "mlp.down_proj" => "ffn_down",
            _ => throw new ArgumentException($"not a tensor of a Llama: {name}", nameof(name)),
        };
        return $"blk.{parts[2]}.{part}.weight";
    }
}
