"""Trains the shapes of `tinyllama bench train` in PyTorch on random tokens and prints one JSON object.

The model is the Llama of TinyLlama (RMSNorm, rotary positions, grouped queries, SwiGLU, untied head) with q, k and v
in one product and gate and up in one, as in the program that it is compared with. Each choice that PyTorch leaves open
takes what is fastest there: fused AdamW where the version has it, scaled_dot_product_attention in fp32 where it exists
(in bf16 without MKL it is several times slower than products and a softmax), subnormal numbers flushed to zero.
"""
import argparse
import contextlib
import json
import math
import time

import torch
from torch import nn
from torch.nn import functional as F

# layers, channels, heads, key/value heads, hidden, vocabulary; sequences, context
SHAPES = {
    "S": ((6, 256, 8, 2, 704, 4096), (8, 256)),
    "M": ((12, 512, 8, 2, 1408, 32000), (4, 512)),
    "L": ((22, 2048, 32, 4, 5632, 32000), (1, 512)),
}


class RmsNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Block(nn.Module):
    def __init__(self, channels, heads, kv_heads, hidden, fused_attention):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, channels // heads
        self.fused_attention = fused_attention
        self.norm1, self.norm2 = RmsNorm(channels), RmsNorm(channels)
        self.qkv = nn.Linear(channels, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.gate_up = nn.Linear(channels, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, channels, bias=False)

    def forward(self, x, cos, sin, mask):
        x = x + self.out(self.attention(self.qkv(self.norm1(x)), cos, sin, mask))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def attention(self, qkv, cos, sin, mask):
        b, t, _ = qkv.shape
        heads = qkv.view(b, t, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.heads // self.kv_heads
        if self.fused_attention:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            # The queries that share keys are rows of one product: nothing is repeated.
            q = q.reshape(b * self.kv_heads, group * t, self.head_dim)
            k, v = k.reshape(-1, t, self.head_dim), v.reshape(-1, t, self.head_dim)
            scores = torch.bmm(q, k.transpose(1, 2)).view(-1, group, t, t) / math.sqrt(self.head_dim) + mask
            y = torch.bmm(scores.softmax(-1).view(-1, group * t, t).to(v.dtype), v).view(b, self.heads, t, self.head_dim)
        return y.transpose(1, 2).reshape(b, t, -1)


def rotate(x, cos, sin):
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)


class Llama(nn.Module):
    def __init__(self, layers, channels, heads, kv_heads, hidden, vocabulary, context, fused_attention):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, channels)
        self.blocks = nn.ModuleList(Block(channels, heads, kv_heads, hidden, fused_attention) for _ in range(layers))
        self.norm = RmsNorm(channels)
        self.head = nn.Linear(channels, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=math.sqrt(0.4 / channels))
        head_dim = channels // heads
        angles = torch.outer(torch.arange(context).float(), 10000 ** (-torch.arange(0, head_dim, 2) / head_dim))
        self.cos, self.sin = angles.cos(), angles.sin()
        self.mask = torch.full((context, context), -math.inf).triu(1)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin, self.mask)
        return self.head(self.norm(x))


def adamw(parameters):
    settings = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    for fast in ({"fused": True}, {"foreach": True}):
        with contextlib.suppress(RuntimeError, TypeError):
            return torch.optim.AdamW(parameters, **settings, **fast), next(iter(fast))
    return torch.optim.AdamW(parameters, **settings), "loop"


def peak_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SHAPES, default="S")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(1)

    shape, (sequences, context) = SHAPES[arguments.model]
    fused_attention = arguments.precision == "fp32" and hasattr(F, "scaled_dot_product_attention")
    model = Llama(*shape, context, fused_attention)
    optimizer, optimizer_kind = adamw(list(model.parameters()))
    tokens, targets = torch.randint(shape[-1], (2, sequences, context))
    bf16 = arguments.precision == "bf16"

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
            logits = model(tokens)
        loss = F.cross_entropy(logits.float().view(-1, shape[-1]), targets.view(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None
        return loss.item()

    begin = time.perf_counter()
    while time.perf_counter() - begin < arguments.seconds / 4:
        step()

    times = []
    processor = time.process_time()
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < arguments.seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)

    processor = time.process_time() - processor
    times.sort()
    print(json.dumps({
        "version": torch.__version__,
        "optimizer": optimizer_kind,
        "fused_attention": fused_attention,
        "steps": len(times),
        "best_tokens_per_second": sequences * context / times[0],
        "median_tokens_per_second": sequences * context / times[len(times) // 2],
        "processor_seconds": processor / len(times),
        "peak_bytes": peak_bytes(),
    }))


main()
