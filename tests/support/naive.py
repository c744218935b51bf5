"""The adapter's mathematics, written out step by step from the paper and the checkpoint's keys; slow, and on purpose
without anything from the package: what the package does is held against it at other sizes than the recorded ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def part(state: State, prefix: str) -> State:
    return {key[len(prefix) + 1 :]: value for key, value in state.items() if key.startswith(prefix + ".")}


def linear(state: State, name: str, x: Tensor) -> Tensor:
    out = x @ state[f"{name}.weight"].T
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def layer_norm(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]
    )


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """[B, N, heads · d] each."""
    out = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value))):
        out.append((q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    return torch.cat(out, dim=-1)


def fuse(state: State, heads: int, low_shallow: Tensor, low_deep: Tensor, high_deep: Tensor) -> Tensor:
    layers = mlp(state, "proj_cross_layer", blocks(state, "cross_layer_blocks", low_deep, low_shallow, heads))
    scales = mlp(state, "proj_cross_scale", blocks(state, "cross_scale_blocks", low_deep, high_deep, heads))
    return torch.cat([mlp(state, "proj", low_deep) + scales, layers], dim=1)


def blocks(state: State, name: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
    i = 0
    while block := part(state, f"{name}.{i}"):
        for norm, attn, other in (("norm1", "attn1", None), ("norm2", "attn2", context)):
            y = layer_norm(block, norm, x, eps=1e-6)
            source = y if other is None else other
            q, k, v = (linear(block, f"{attn}.{n}", s) for n, s in (("to_q", y), ("to_k", source), ("to_v", source)))
            x = x + linear(block, f"{attn}.to_out.0", attention(q, k, v, heads))
        up, gate = linear(block, "ff.net.0.proj", layer_norm(block, "norm3", x, eps=1e-6)).chunk(2, dim=-1)
        x = x + linear(block, "ff.net.2", up * F.gelu(gate))
        i += 1
    return x


def mlp(state: State, name: str, x: Tensor) -> Tensor:
    return linear(state, f"{name}.fc2", F.gelu(linear(state, f"{name}.fc1", x), approximate="tanh"))


def resample(state: State, heads: int, fused: Tensor, timestep: float) -> Tensor:
    state = part(state, "resampler")
    frequencies = torch.exp(-math.log(10000) * torch.arange(160) / 160)
    sinusoid = torch.cat([(timestep * frequencies).cos(), (timestep * frequencies).sin()])[None]
    time = linear(state, "time_embedding.linear_2", F.silu(linear(state, "time_embedding.linear_1", sinusoid)))[:, None]
    x, queries = linear(state, "proj_in", fused) + time, state["latents"]
    i = 0
    while layer := part(state, f"layers.{i}"):
        shift_attn, scale_attn, shift_ff, scale_ff = linear(layer, "2.1", F.silu(time)).chunk(4, dim=-1)
        y = layer_norm(layer, "0.norm2", queries) * (1 + scale_attn) + shift_attn
        keys, values = linear(layer, "0.to_kv", torch.cat([layer_norm(layer, "0.norm1", x), y], dim=1)).chunk(2, dim=-1)
        queries = queries + linear(layer, "0.to_out", attention(linear(layer, "0.to_q", y), keys, values, heads))
        y = layer_norm(layer, "1.0", queries) * (1 + scale_ff) + shift_ff
        queries = queries + linear(layer, "1.3", F.gelu(linear(layer, "1.1", y)))
        i += 1
    return layer_norm(state, "norm_out", linear(state, "proj_out", queries))


def head_norm(x: Tensor, scale: Tensor, heads: int) -> Tensor:
    x = x.unflatten(-1, (heads, -1))
    return (x / (x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) + 1e-6) * scale).flatten(-2)


def character_attention(state: State, heads: int, raw_query: Tensor, tokens: Tensor) -> Tensor:
    """``raw_query`` [B, S, dim] is FLUX's before its own norm."""
    query = head_norm(raw_query, state["norm_ip_q.scale"], heads)
    key = head_norm(linear(state, "to_k_ip", tokens), state["norm_ip_k.scale"], heads)
    return attention(query, key, linear(state, "to_v_ip", tokens), heads)


class Processor:
    """FLUX's attention with the character's, on the raw query; for diffusers' FluxAttention."""

    def __init__(self, state: State, tokens: Tensor, scale: float, image_tokens: int) -> None:
        self.state, self.tokens, self.scale, self.image_tokens = state, tokens, scale, image_tokens

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        heads, weights = attn.heads, dict(attn.named_parameters())
        image = hidden_states[:, -self.image_tokens :]
        seen = character_attention(self.state, heads, linear(weights, "to_q", image), self.tokens)
        q, k, v = (linear(weights, name, hidden_states) for name in ("to_q", "to_k", "to_v"))
        q, k = rms(q, weights["norm_q.weight"], heads), rms(k, weights["norm_k.weight"], heads)
        if encoder_hidden_states is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            tq, tk, tv = (linear(weights, name, encoder_hidden_states) for name in names)
            tq, tk = rms(tq, weights["norm_added_q.weight"], heads), rms(tk, weights["norm_added_k.weight"], heads)
            q, k, v = (torch.cat(pair, dim=1) for pair in ((tq, q), (tk, k), (tv, v)))
        out = attention(rotate(q, image_rotary_emb, heads), rotate(k, image_rotary_emb, heads), v, heads)
        out[:, -self.image_tokens :] += self.scale * seen
        if encoder_hidden_states is None:
            return out
        text = encoder_hidden_states.shape[1]
        return linear(weights, "to_out.0", out[:, text:]), linear(weights, "to_add_out", out[:, :text])


def rms(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    x = x.unflatten(-1, (heads, -1))
    return (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight).flatten(-2)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor], heads: int) -> Tensor:
    cos, sin = (table[None, :, None] for table in rotary)
    x = x.unflatten(-1, (heads, -1))
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).flatten(-2)
