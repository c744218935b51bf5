"""FLUX's layers by their two sets of names: the released file's, which ComfyUI keeps, and diffusers'."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

PREFIX = "model.diffusion_model."
"""Prefix of FLUX's keys in ComfyUI's files, and in checkpoints with text encoders and VAE."""
QKV, TEXT_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE_BLOCK = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": QKV,
    "txt_attn.qkv": TEXT_QKV,
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE_BLOCK = {
    "modulation.lin": ("norm.linear",),
    "linear1": (*QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
AROUND_BLOCKS: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
BLOCKS = {
    "double_blocks": ("transformer_blocks", DOUBLE_BLOCK),
    "single_blocks": ("single_transformer_blocks", SINGLE_BLOCK),
}
"""Released name of each kind of block; diffusers' name of it, and the layers in a block."""
SWAPPED = "final_layer.adaLN_modulation.1"
"""The layer whose rows are shift, then scale; in diffusers scale, then shift."""
OWN = {*BLOCKS, *(name.split(".")[0] for name in AROUND_BLOCKS)}
"""First parts of FLUX's keys in the released layout."""


def own_part(state: Mapping[str, Any]) -> dict[str, Any]:
    """FLUX's weights in a file, without the prefix; other models in the file are left out."""
    inside = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    return inside or dict(state)


def diffusers_layers(layer: str) -> tuple[str, ...]:
    """diffusers' names of a layer of the released layout; none if the layer is unknown.

    Several layers of diffusers' have the rows of one released layer, in this order.
    ``"double_blocks.3.img_attn.proj"`` is ``("transformer_blocks.3.attn.to_out.0",)``.
    """
    kind, _, rest = layer.partition(".")
    index, _, name = rest.partition(".")
    if kind not in BLOCKS or not index.isdecimal():
        return AROUND_BLOCKS.get(layer, ())
    theirs, names = BLOCKS[kind]
    return tuple(f"{theirs}.{index}.{name}" for name in names.get(name, ()))


def split_rows(layer: str, rows: Any, sizes: Sequence[int]) -> Sequence[Any]:
    """Split the rows of a layer of the released layout into those of diffusers' layers; views but for :data:`SWAPPED`.

    Args:
        layer: its released name.
        rows: a weight, bias or LoRA matrix with a row for each output of the layer.
        sizes: number of rows of each of diffusers' layers.
    """
    return [torch.cat([*rows.chunk(2)][::-1])] if layer == SWAPPED else rows.split(list(sizes))


def to_diffusers(state: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Rename FLUX's weights to diffusers' names. Weights that have such a name, or no known one, keep theirs.

    ComfyUI calls the scale of FLUX's query and key norms ``weight``, the released file ``scale``: both are renamed.

    Args:
        state: by released names, ComfyUI's or diffusers'.
        width: of FLUX, 3072: the rows of each of the query, key and value projections.
    """
    out: dict[str, Any] = {}
    for key, value in state.items():
        layer, _, kind = re.sub(r"(query|key)_norm\.scale$", r"\1_norm.weight", key).rpartition(".")
        if not (names := diffusers_layers(layer)):
            out[key] = value
            continue
        first = [width] * (len(names) - 1)
        parts = split_rows(layer, value, [*first, len(value) - sum(first)])
        out |= {f"{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
    return out
