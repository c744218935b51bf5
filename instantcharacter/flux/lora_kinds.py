"""Kinds of files that are no LoRA for FLUX.1, by their keys, and what an error says of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..files.errors import first_few
from .variants import NATIVE


class Kind(NamedTuple):
    """A kind of file that is no LoRA for FLUX.1.

    Attributes:
        name: as in "this looks like …".
        pattern: a regular expression that is found in one of its keys.
        advice: which node reads it, or which file to take instead.
    """

    name: str
    pattern: str
    advice: str


OTHER_MODEL = "take one that was made for FLUX.1"
READ_NATIVELY = f"ComfyUI's own Load LoRA reads it: {NATIVE}"
CONTROL = Kind(
    "a control LoRA (FLUX.1 Canny or Depth)",
    r"(query|key)_norm\.scale$|\.norm_(added_)?[qk]\.weight$",
    f"{READ_NATIVELY} and InstructPixToPixConditioning",
)
KINDS = (
    Kind("a LoRA for FLUX.2", r"(double|single)_stream_modulation|to_qkv_mlp_proj|\.ff\.linear_in", OTHER_MODEL),
    Kind("a LoRA for Chroma", r"distilled_guidance_layer", OTHER_MODEL),
    Kind("a LoRA for Stable Diffusion or SDXL", r"(down|up|mid|input|output|middle)_blocks?[._]", OTHER_MODEL),
    Kind("a LoRA for Wan", r"blocks[._]\d+[._](self|cross)_attn[._][qkvo]\b", OTHER_MODEL),
    Kind(
        "a LoRA for HunyuanVideo",
        r"blocks\.\d+\.(img|txt)_attn_(qkv|proj)|(img|txt)_mlp[._]fc|(img|txt)_mod[._]linear|modulation[._]linear",
        OTHER_MODEL,
    ),
    Kind("a LoRA for Qwen-Image", r"transformer_blocks[._]\d+[._](img|txt)_(mod|mlp)[._]", OTHER_MODEL),
    Kind("a LoRA for LTX-Video or PixArt", r"transformer_blocks[._]\d+[._]attn[12][._]", OTHER_MODEL),
    Kind("a LoRA for Z-Image or Lumina", r"layers[._]\d+[._](attention|feed_forward)[._]", OTHER_MODEL),
    Kind("an IP-Adapter", r"ip_adapter|to_[kv]_ip", "Load Character Adapter reads InstantCharacter's own"),
    CONTROL,
    Kind("a LoKr (LyCORIS)", r"\.lokr_", READ_NATIVELY),
    Kind("a LoHa (LyCORIS)", r"\.hada_", READ_NATIVELY),
    Kind("an OFT (LyCORIS)", r"\.oft_", READ_NATIVELY),
    Kind("a GLoRA (LyCORIS)", r"\.[ab][12]\.weight$", READ_NATIVELY),
)
"""The first match counts. Other models come before other forms: a LoKr for Wan is not for FLUX.1 in any form."""


def kind_of(keys: Iterable[str]) -> Kind | None:
    """The kind of a file with these keys; None if it may be a LoRA for FLUX.1."""
    names = list(keys)
    return next((kind for kind in KINDS if any(re.search(kind.pattern, key) for key in names)), None)


def refusal(path: Path, keys: Iterable[str], kind: Kind) -> str:
    """The message of an error for a file of a kind, with the keys by which it is known."""
    names = sorted(keys)
    return (
        f"{path} looks like {kind.name}, by {first_few([k for k in names if re.search(kind.pattern, k)] or names)}; "
        + kind.advice
    )
