"""Adapter files: the released ``.bin`` and ``.safetensors``, read and written.

Keys in a file begin with ``image_proj`` and ``ip_adapter``, those of :class:`~.CharacterAdapter` with ``projector`` and
``attention``. A ``.safetensors`` file carries its sizes and its fingerprint in its metadata, which also says whether it
is folded, see :func:`~.fold_adapter`; the sizes of a ``.bin`` may lie in a ``.json`` of its name beside it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..files.errors import first_few, first_line, quoted
from ..files.reading import check_weights, parse_json, read_json, read_pickle, read_safetensors, unexpected
from ..files.writing import write_pickle, write_safetensors
from .character import is_fingerprint
from .config import AdapterConfig

logger = logging.getLogger(__name__)

EXPECTED = (
    "an InstantCharacter adapter: instantcharacter_ip-adapter.bin of tencent/InstantCharacter, "
    "or a file that `convert` made from it"
)
FORMAT = "instantcharacter.adapter"
FOLDED_FORMAT = "instantcharacter.folded_adapter"
SUFFIXES = (".safetensors", ".bin")
PREFIXES = {"image_proj": "projector", "ip_adapter": "attention"}
"""Prefix of a key in a file → prefix in :class:`~.CharacterAdapter`."""

OTHER_FORMATS = {
    "InstantX's IP-Adapter for FLUX.1": (".proj.0.", ".proj.2."),
    "XLabs' IP-Adapter for FLUX.1": ("ip_adapter_proj_model.", ".processor.ip_adapter_"),
    "PuLID": ("pulid_",),
    "an IP-Adapter for Stable Diffusion": ("image_proj.proj.weight", "image_proj.latents"),
    "PhotoMaker": ("id_encoder",),
    "FLUX.1 Redux, a style model": ("redux_up.",),
    "a LoRA": ("lora_A.", "lora_down.", "lora_unet_"),
    "FLUX itself": ("double_blocks.", "transformer_blocks."),
}
"""Files that are mistaken for an adapter → parts of their keys; the first match counts."""


class Checkpoint(NamedTuple):
    """The contents of an adapter file.

    Attributes:
        weights: memory-mapped, under the keys of :class:`~.CharacterAdapter`.
        config: the sizes, if the file states them.
        fingerprint: see :meth:`~.CharacterAdapter.fingerprint`, if the file states it.
        folded: whether they are of a folded adapter.
    """

    weights: dict[str, Tensor]
    config: AdapterConfig | None
    fingerprint: str | None
    folded: bool


def read_checkpoint(path: Path) -> Checkpoint:
    """Read an adapter file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, cut off, or of another kind; or it is folded and states no fingerprint.
    """
    fingerprint, folded = None, False
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path, EXPECTED)
        config = _config(parse_json, metadata["config"], path) if "config" in metadata else None
        fingerprint, folded = metadata.get("fingerprint"), metadata.get("format") == FOLDED_FORMAT
        if fingerprint and not is_fingerprint(fingerprint):
            raise unexpected(path, f"states the fingerprint {quoted(fingerprint)}", EXPECTED)
        if folded and not fingerprint:
            raise ValueError(
                f"{path} does not state the fingerprint of the adapter that it was folded from: fold again"
            )
    else:
        tensors, sizes = _read_bin(path), path.with_suffix(".json")
        config = _config(read_json, sizes, sizes) if sizes.is_file() else None
    weights = {}
    check_weights(tensors, path, EXPECTED)
    for key, tensor in tensors.items():
        prefix, _, rest = key.partition(".")
        weights[f"{PREFIXES.get(prefix, prefix)}.{rest}"] = tensor
    return Checkpoint(weights, config, fingerprint, folded)


def write_checkpoint(
    path: Path, weights: Mapping[str, Tensor], config: AdapterConfig, fingerprint: str, folded: bool = False
) -> None:
    """Write an adapter file, whole or not at all.

    Args:
        path: ``.safetensors``, or ``.bin`` for the released layout, a pickle of two dictionaries.
        weights: under the keys of :class:`~.CharacterAdapter`.
        config: the sizes.
        fingerprint: see :meth:`~.CharacterAdapter.fingerprint`.
        folded: whether the weights are of a folded adapter.

    Raises:
        ValueError: another suffix, or a folded adapter as ``.bin``.
        OSError: the disk is full or read-only; a file that was there before is unchanged.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"an adapter is saved as .safetensors or .bin, not as {path.suffix or 'a name without ending'}"
        )
    if folded and path.suffix == ".bin":
        raise ValueError(
            "a folded adapter is saved as .safetensors: the released layout of a .bin is the whole adapter's"
        )
    parts = {
        prefix: {key.partition(".")[2]: tensor for key, tensor in weights.items() if key.startswith(f"{module}.")}
        for prefix, module in PREFIXES.items()
    }
    if path.suffix == ".bin":
        write_pickle(path, parts)
        return
    flat = {f"{prefix}.{key}": t.contiguous() for prefix, part in parts.items() for key, t in part.items()}
    kind = FOLDED_FORMAT if folded else FORMAT
    metadata = {"format": kind, "config": json.dumps(asdict(config)), "fingerprint": fingerprint}
    write_safetensors(path, flat, metadata)


def check_complete(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise ``ValueError`` unless a file has all expected weights in their shapes; warn of weights beyond them."""
    if missing := [key for key in expected if key not in weights]:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(expected)} weights: {first_few(missing)}.{_likeness(weights)} "
            f"Expected {EXPECTED}."
        )
    wrong = [
        f"{key} is {list(weights[key].shape)}, not {list(tensor.shape)}"
        for key, tensor in expected.items()
        if weights[key].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{path} has {len(wrong)} weights of other sizes: {first_few(wrong)}. Expected {EXPECTED}.")
    if unexpected := [key for key in weights if key not in expected]:
        logger.warning("%s has %d weights that are not used: %s", path, len(unexpected), first_few(unexpected))


def _config(read: Callable[[Any], dict[str, Any]], source: Any, path: Path) -> AdapterConfig:
    """The sizes in a JSON that ``read`` reads, of the file ``path``."""
    try:
        return AdapterConfig(**read(source))
    except (TypeError, ValueError) as error:
        raise unexpected(path, f"states sizes that cannot be read ({first_line(error)})", EXPECTED) from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    parts = read_pickle(path, EXPECTED)
    if not isinstance(parts, dict) or not all(isinstance(parts.get(prefix), dict) for prefix in PREFIXES):
        found = [quoted(key) for key in parts][:5] if isinstance(parts, dict) else [type(parts).__name__]
        raise ValueError(f"{path} holds {found}, not {list(PREFIXES)}.{_likeness(found)} Expected {EXPECTED}.")
    return {f"{prefix}.{key}": tensor for prefix in PREFIXES for key, tensor in parts[prefix].items()}


def _likeness(keys: Iterable[Any]) -> str:
    """A sentence that names the one of :data:`OTHER_FORMATS` that has such keys, or nothing."""
    names = [re.sub("^projector", "image_proj", str(key)) for key in keys]
    for name, parts in OTHER_FORMATS.items():
        if any(part in key for key in names for part in parts):
            return f" It looks like {name}."
    return ""
