"""The adapter's weights: their sizes, the modules that hold them, and the files they come in."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files.pictures import Picture, thumbnail
from ..files.reading import atomic_write, read_pickle, read_safetensors
from .attention import CharacterAttention
from .character import Character
from .config import RELEASED, AdapterConfig
from .features import CharacterFeatures
from .projector import CharacterProjector

logger = logging.getLogger(__name__)

EXPECTED = (
    "an InstantCharacter adapter: instantcharacter_ip-adapter.bin of tencent/InstantCharacter, "
    "or what `convert` made of it"
)
FORMAT = "instantcharacter.adapter"
PARTS = {"image_proj": "projector", "ip_adapter": "attention"}
"""Part of a checkpoint file → attribute of :class:`CharacterAdapter`."""

OTHERS = {
    "InstantX's IP-Adapter for FLUX.1": (".proj.0.", ".proj.2."),
    "XLabs' IP-Adapter for FLUX.1": ("ip_adapter_proj_model.", ".processor.ip_adapter_"),
    "PuLID": ("pulid_",),
    "an IP-Adapter for Stable Diffusion": ("image_proj.proj.weight", "image_proj.latents"),
    "PhotoMaker": ("id_encoder",),
    "FLUX.1 Redux, a style model": ("redux_up.",),
    "a LoRA": ("lora_A.", "lora_down.", "lora_unet_"),
    "FLUX itself": ("double_blocks.", "transformer_blocks."),
}
"""What is taken for an InstantCharacter adapter, each with parts of keys that tell it; the first that fits counts."""


class CharacterAdapter(nn.Module):
    """What InstantCharacter adds to FLUX: a projector, and an attention module for each FLUX block.

    Attributes:
        config: the sizes.
        projector: features → tokens; its keys are the checkpoint's ``image_proj``.
        attention: one :class:`CharacterAttention` a block, double-stream blocks first; keys of ``ip_adapter``.
    """

    attention: Sequence[CharacterAttention]
    _loaded: tuple[str, dict[str, Tensor]] | None = None
    """The fingerprint of the file it is from, and the samples of that file's weights."""

    def __init__(self, config: AdapterConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RELEASED
        self.projector = CharacterProjector(config)
        self.attention = nn.ModuleList(  # type: ignore[assignment]
            CharacterAttention(config.attention_dim, config.attention_heads, config.token_dim)
            for _ in range(config.num_attention_blocks)
        )

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        config: AdapterConfig | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> CharacterAdapter:
        """Load an adapter: the released ``.bin``, or ``.safetensors``.

        The file is memory-mapped and goes tensor by tensor to where it belongs, so the host holds little beside it.

        Args:
            path: the file. A pickle in it may hold tensors only: nothing in it is run.
            config: its sizes; if not given, those written in the file (of a ``.bin``, in the ``.json`` of its name
                beside it), or else the released ones.
            device: where the weights go.
            dtype: what they become; the file's own if not given.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file that is empty, cut off, of another kind, or lacks weights of these sizes.
        """
        state, saved_config, fingerprint = _read(Path(path))
        with torch.device("meta"):
            adapter = cls(config or saved_config)
        _check_complete(adapter, state, path)
        samples = _samples({name: state[f"projector.{name}"] for name, _ in adapter.projector.named_parameters()})
        state = {key: state[key].to(device=device, dtype=dtype) for key in adapter.state_dict()}
        adapter.load_state_dict(state, assign=True)
        adapter._loaded = fingerprint or _digest(adapter.projector, samples), samples
        return adapter.eval()

    def save(self, path: str | Path) -> None:
        """Write the adapter: as ``.safetensors`` with its sizes and its fingerprint in the metadata, or as ``.bin`` in
        the released layout.

        Raises:
            ValueError: another file ending.
            OSError: the disk is full or cannot be written; what was there before is untouched.
        """
        parts = {part: getattr(self, attribute).state_dict() for part, attribute in PARTS.items()}
        suffix = Path(path).suffix
        if suffix not in (".safetensors", ".bin"):
            raise ValueError(f"an adapter is saved as .safetensors or .bin, not as {suffix or 'a name without ending'}")
        with atomic_write(path) as partial:
            if suffix == ".bin":
                torch.save(parts, partial)
            else:
                flat = {f"{part}.{key}": t.contiguous() for part, state in parts.items() for key, t in state.items()}
                config = json.dumps(asdict(self.config))
                save_file(flat, partial, {"format": FORMAT, "config": config, "fingerprint": self.fingerprint()})

    @torch.no_grad()
    def create_character(self, *views: CharacterFeatures, picture: Picture | None = None) -> Character:
        """Fuse features into a :class:`Character`; they are brought to the projector's device and dtype.

        Args:
            views: the features of one picture, or of several pictures of one character: the Q-former then reads all
                of them. It was trained with one, and each more takes its time and memory.
            picture: kept with the character as its thumbnail.

        Raises:
            ValueError: no features, features of another width than this adapter's, or of several pictures in one.
        """
        if not views:
            raise ValueError("a character is made of at least one picture's features")
        for features in views:
            if len(features.low_res_deep) != 1:
                raise ValueError(f"a view is made of one picture, not of {len(features.low_res_deep)}")
        weight = self.projector.proj.fc1.weight
        fused = [self.projector.fuse(*(tensor.to(weight) for tensor in features)) for features in views]
        return Character(torch.cat(fused, dim=1), self.fingerprint(), None if picture is None else thumbnail(picture))

    def fingerprint(self) -> str:
        """32 hexadecimal digits that name the projector's weights, from 16 samples of each, rounded to bfloat16.

        An adapter from a file has the file's, whatever dtype it was loaded in and whatever device each weight is on;
        in ``.safetensors`` a copy in another dtype keeps it. Other weights have another one; a change to single
        weights that no sample meets goes unnoticed.
        """
        samples = _samples(dict(self.projector.named_parameters()))
        if self._loaded:
            fingerprint, of_file = self._loaded
            if all(torch.equal(sample, of_file[name].to(sample.dtype)) for name, sample in samples.items()):
                return fingerprint
        return _digest(self.projector, samples)


def _samples(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """16 numbers, or a few less, of each weight, in its own dtype on the CPU."""
    return {
        name: weight.detach().flatten()[:: -(-weight.numel() // 16)].cpu().clone() for name, weight in weights.items()
    }


def _digest(projector: CharacterProjector, samples: Mapping[str, Tensor]) -> str:
    """The fingerprint of a projector with these samples."""
    parameters = sorted(projector.named_parameters())
    digest = hashlib.blake2b(repr([(name, tuple(p.shape)) for name, p in parameters]).encode(), digest_size=16)
    rounded = torch.cat([samples[name].to(torch.bfloat16) for name, _ in parameters])
    digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], AdapterConfig | None, str | None]:
    """A file's tensors under the adapter's own keys, and the sizes and the fingerprint written in it, if any."""
    fingerprint = None
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path, EXPECTED)
        config = _config(metadata["config"], path) if "config" in metadata else None
        fingerprint = metadata.get("fingerprint")
    else:
        tensors, beside = _read_pickle(path), path.with_suffix(".json")
        config = _config(beside.read_text(encoding="utf-8"), beside) if beside.is_file() else None
    state = {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        state[f"{PARTS.get(part, part)}.{rest}"] = tensor
    return state, config, fingerprint


def _config(text: str, path: Path) -> AdapterConfig:
    try:
        return AdapterConfig(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} states sizes that cannot be read ({error}). Expected {EXPECTED}.") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    parts = read_pickle(path, EXPECTED)
    if not isinstance(parts, dict) or not all(isinstance(parts.get(part), dict) for part in PARTS):
        found = list(parts)[:5] if isinstance(parts, dict) else [type(parts).__name__]
        raise ValueError(f"{path} holds {found}, not {list(PARTS)}.{_likeness(found)} Expected {EXPECTED}.")
    flat = {f"{part}.{key}": tensor for part in PARTS for key, tensor in parts[part].items()}
    if other := [key for key, tensor in flat.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"{path} holds what is not a tensor: {_first(other)}. Expected {EXPECTED}.")
    return flat


def _check_complete(adapter: CharacterAdapter, state: dict[str, Tensor], path: str | Path) -> None:
    expected = adapter.state_dict()
    missing = [key for key in expected if key not in state]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(expected)} weights: {_first(missing)}.{_likeness(state)} "
            f"Expected {EXPECTED}."
        )
    wrong = [
        f"{key} is {list(state[key].shape)}, not {list(tensor.shape)}"
        for key, tensor in expected.items()
        if state[key].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{path} has {len(wrong)} weights of other sizes: {_first(wrong)}. Expected {EXPECTED}.")
    if unexpected := [key for key in state if key not in expected]:
        logger.warning("%s has %d weights that are not used: %s", path, len(unexpected), _first(unexpected))


def _likeness(keys: Iterable[Any]) -> str:
    """A sentence that says which of :data:`OTHERS` a file with these keys looks like, if any."""
    names = [re.sub("^projector", "image_proj", str(key)) for key in keys]
    for name, parts in OTHERS.items():
        if any(part in key for key in names for part in parts):
            return f" It looks like {name}."
    return ""


def _first(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", …" if len(items) > 3 else "")
