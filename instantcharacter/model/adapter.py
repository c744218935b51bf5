"""The adapter: its modules, its files, and the characters it makes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files.errors import escaped
from ..files.pictures import Picture, thumbnail
from ..files.reading import check_finite, check_module
from .attention import CharacterAttention, FoldedCharacterAttention
from .character import Character
from .checkpoint import check_complete, read_checkpoint, write_checkpoint
from .config import RELEASED, AdapterConfig
from .features import CharacterFeatures
from .projector import CharacterProjector
from .resampler import FOLDED_CHANNELS

DAMAGED = "a file of weights is damaged: fetch the adapter, SigLIP and DINOv2 again"
SAMPLES = 16
"""Values of each weight that a fingerprint is computed from."""


class CharacterAdapter(nn.Module):
    """InstantCharacter's weights: a projector, and an attention module for each FLUX block.

    A folded adapter, see :func:`~.fold_adapter`, has a fifth of the weights: those that generate a picture of a
    character that the whole adapter has made.

    Args:
        config: the sizes, those of the released checkpoint if None.
        folded: whether it is folded.

    Attributes:
        config: the sizes.
        folded: whether it is folded.
        projector: features → tokens; its keys are the checkpoint's ``image_proj``. Folded, it is the resampler alone.
        attention: one :class:`CharacterAttention` a block, double-stream blocks first; keys of ``ip_adapter``. Folded,
            each is a :class:`FoldedCharacterAttention`.
    """

    attention: Sequence[CharacterAttention]
    _origin: tuple[str, dict[str, Tensor]] | None = None
    """The fingerprint of the file or adapter that the weights come from, and samples of the weights."""

    def __init__(self, config: AdapterConfig | None = None, folded: bool = False) -> None:
        super().__init__()
        self.config = config = config or RELEASED
        self.folded = folded
        self.projector = CharacterProjector(config, fusion=not folded)
        kind = FoldedCharacterAttention if folded else CharacterAttention
        token_dim = config.resampler_dim + FOLDED_CHANNELS if folded else config.token_dim
        self.attention = nn.ModuleList(  # type: ignore[assignment]
            kind(config.attention_dim, config.attention_heads, token_dim) for _ in range(config.num_attention_blocks)
        )

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        config: AdapterConfig | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> CharacterAdapter:
        """Load an adapter from the released ``.bin`` or from ``.safetensors``, whole or folded.

        The file is memory-mapped. Weights that keep its dtype, on the CPU, are not copied: the system reads them when
        they are used, and drops them when it needs the memory.

        Args:
            path: the file. A pickle may hold tensors only; code in it is not run.
            config: the sizes. If None: those stated in the file (of a ``.bin``, in the ``.json`` of its name beside
                it), or the released ones.
            device: of the weights.
            dtype: of the weights, the file's own if None.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is empty, cut off, of another kind, or lacks weights of these sizes; or those of the
                resampler, which every picture needs, are not finite. The others are checked where they are first used.
        """
        weights, saved_config, fingerprint, folded = read_checkpoint(Path(path))
        with torch.device("meta"):
            adapter = cls(config or saved_config, folded)
        check_complete(weights, adapter.state_dict(), path)
        in_file = {name: weights[f"projector.{name}"] for name, _ in adapter.projector.named_parameters()}
        state = {key: weights[key].to(device=device, dtype=dtype) for key in adapter.state_dict()}
        adapter.load_state_dict(state, assign=True)
        check_module(adapter.projector.resampler, f"{escaped(path)} has weights", "fetch the file again")
        adapter.keep_fingerprint(fingerprint or _digest(adapter.projector, _samples(in_file)))
        return adapter.eval()

    def save(self, path: str | Path) -> None:
        """Write the adapter, whole or not at all.

        Args:
            path: ``.safetensors``, with the sizes and the fingerprint in its metadata, or ``.bin`` in the released
                layout, which a folded adapter does not have.

        Raises:
            ValueError: another suffix, or a folded adapter as ``.bin``.
            OSError: the disk is full or read-only; a file that was there before is unchanged.
        """
        write_checkpoint(Path(path), self.state_dict(), self.config, self.fingerprint(), self.folded)

    @torch.no_grad()
    def create_character(self, *references: CharacterFeatures, picture: Picture | None = None) -> Character:
        """Fuse features into a :class:`Character`, on the projector's device and in its dtype.

        Args:
            references: features of one picture, or of several pictures of one character: the resampler then attends
                to all of them. It was trained with one, and time and memory grow with each.
            picture: saved with the character as its thumbnail.

        Raises:
            ValueError: no features, features of another width than this adapter's, a batch of pictures in one, a
                folded adapter, or weights that make no finite features.
        """
        self.check_whole("make a character")
        if not references:
            raise ValueError("a character is made of at least one picture's features")
        for features in references:
            if (pictures := len(features.low_res_deep)) != 1:
                raise ValueError(f"features are of one picture, not of {pictures}: pass each picture's as an argument")
        check_module(self.projector, "the adapter has weights", DAMAGED)
        weight = self.projector.proj.fc1.weight
        fused = [self.projector.fuse(*(tensor.to(weight) for tensor in features)) for features in references]
        for each in fused:
            check_finite(each, "the encoders and the adapter make features", DAMAGED)
        return Character(torch.cat(fused, dim=1), self.fingerprint(), None if picture is None else thumbnail(picture))

    def check_whole(self, purpose: str) -> None:
        """Raise ``ValueError`` if the adapter is folded.

        Args:
            purpose: what needs the whole adapter, for the error: "make a character".
        """
        if self.folded:
            raise ValueError(
                f"this adapter is folded: its weights generate pictures, but cannot {purpose}. Use the whole adapter, "
                "instantcharacter_ip-adapter.bin or the file that it was folded from"
            )

    def check_fits(self, width: int, heads: int, blocks: int) -> None:
        """Raise ``ValueError`` unless the adapter is for a FLUX of this width, with these heads and blocks."""
        for what, found, expected in (
            ("width", width, self.config.attention_dim),
            ("number of attention heads", heads, self.config.attention_heads),
            ("number of blocks", blocks, self.config.num_attention_blocks),
        ):
            if found != expected:
                raise ValueError(
                    f"FLUX's {what} is {found}, the adapter is made for {expected}: use FLUX.1-dev or a model of its "
                    "shape, with all of its blocks"
                )

    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify the projector's weights, from 16 samples of each, rounded to bfloat16.

        An adapter that was loaded has the fingerprint of its file, in any dtype and on any device; a copy saved as
        ``.safetensors`` in another dtype keeps it, and so does a folded one. Other weights have another one; a change
        to single weights that no sample meets goes unnoticed. The attention's weights do not count: a character does
        not depend on them.
        """
        samples = _samples(dict(self.projector.named_parameters()))
        if self._origin:
            fingerprint, before = self._origin
            if all(torch.equal(sample, before[name].to(sample.dtype)) for name, sample in samples.items()):
                return fingerprint
        return _digest(self.projector, samples)

    def keep_fingerprint(self, fingerprint: str) -> None:
        """Have the fingerprint of the file or adapter that the weights come from, until they change."""
        self._origin = fingerprint, _samples(dict(self.projector.named_parameters()))


def _samples(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """At most :data:`SAMPLES` values of each weight, in its own dtype, on the CPU."""
    return {
        name: weight.detach().flatten()[:: -(-weight.numel() // SAMPLES)].cpu().clone()
        for name, weight in weights.items()
    }


def _digest(projector: CharacterProjector, samples: Mapping[str, Tensor]) -> str:
    """The fingerprint of a projector's names, shapes and samples."""
    parameters = sorted(projector.named_parameters())
    digest = hashlib.blake2b(repr([(name, tuple(p.shape)) for name, p in parameters]).encode(), digest_size=16)
    rounded = torch.cat([samples[name].to(torch.bfloat16) for name, _ in parameters])
    digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
