"""Trains TinyLlama's 1.1-billion-parameter shape in plain PyTorch on one GPU, on random tokens, and prints one JSON object.

The same model, micro-batch and step as `tinyllama bench train --device cuda`: fp32 weights and moments, products in bf16
with sums in fp32, gradients in fp32, clipping, AdamW. Each choice that PyTorch leaves open takes what is fastest there:
torch.compile of a block (compiled once, used by all) and of the head with the loss, scaled_dot_product_attention with
grouped queries, fused AdamW, the residual stream in bf16, gradients set to None.
"""
import argparse
import json
import math
import time

import torch
from torch import nn
from torch.nn import functional as F

LAYERS, CHANNELS, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 22, 2048, 32, 4, 5632, 32000


class RmsNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * self.weight).to(x.dtype)


def rotate(x, cos, sin):
    low, high = x.float().chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, channels, heads, kv_heads, hidden):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, channels // heads
        self.norm1, self.norm2 = RmsNorm(channels), RmsNorm(channels)
        self.qkv = nn.Linear(channels, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.gate_up = nn.Linear(channels, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, channels, bias=False)

    def forward(self, x, cos, sin):
        b, t, c = x.shape
        heads = self.qkv(self.norm1(x)).view(b, t, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Head(nn.Module):
    def __init__(self, channels, vocabulary):
        super().__init__()
        self.norm = RmsNorm(channels)
        self.linear = nn.Linear(channels, vocabulary, bias=False)

    def forward(self, x, targets):
        return F.cross_entropy(self.linear(self.norm(x)).float().flatten(0, 1), targets.flatten())


class Llama(nn.Module):
    def __init__(self, layers, channels, heads, kv_heads, hidden, vocabulary, context):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, channels)
        self.blocks = nn.ModuleList(Block(channels, heads, kv_heads, hidden) for _ in range(layers))
        self.head = Head(channels, vocabulary)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=math.sqrt(0.4 / channels))
        head_dim = channels // heads
        angles = torch.outer(torch.arange(context).float(), 10000 ** (-torch.arange(0, head_dim, 2) / head_dim))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens, targets):
        x = self.embedding(tokens).bfloat16()
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(x, targets)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    arguments = parser.parse_args()
    torch.manual_seed(1)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"

    with device:
        model = Llama(arguments.layers, CHANNELS, HEADS, KV_HEADS, HIDDEN, VOCABULARY, arguments.context)
        tokens, targets = torch.randint(VOCABULARY, (2, arguments.sequences, arguments.context))
    if not arguments.eager:
        for part in (*model.blocks, model.head):
            part.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu)

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    begin = time.perf_counter()
    losses = [step() for _ in range(2)]
    compile_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    while time.perf_counter() - begin < arguments.seconds / 4:
        losses.append(step())

    times = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < arguments.seconds:
        start = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - start)

    times.sort()
    count = arguments.sequences * arguments.context
    print(json.dumps({
        "version": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "compiled": not arguments.eager,
        "first_steps_seconds": compile_seconds,
        "steps": len(times),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "best_tokens_per_second": count / times[0],
        "median_tokens_per_second": count / times[len(times) // 2],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
    }))


main()
