"""The settings of a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..files.catalog import DINOV2, FLUX, SIGLIP
from ..model.adapter import AdapterConfig


@dataclass(frozen=True)
class Source:
    """A source of samples.

    Attributes:
        path: an image folder with a ``metadata.jsonl``, WebDataset shards (``….tar``, a pattern or a URL), or a dataset
            on the hub.
        pairs: each sample brings another picture of its character as the reference; otherwise the picture itself is.
        share: weight of this source among the others; 0 leaves it out.
        stream: read a hub dataset or shards in their own order while they download, not shuffled.
    """

    path: str
    pairs: bool = False
    share: float = 1.0
    stream: bool = False

    def __post_init__(self) -> None:
        _check(self, ("share",), lambda value: 0 <= value < math.inf, "0 or more")


@dataclass(frozen=True)
class Preview:
    """A picture that a training generates of itself: the character of a reference file, and a prompt."""

    reference: str
    prompt: str


@dataclass(frozen=True)
class TrainingConfig:
    """One training, such as a stage of arXiv 2504.12395; the files of its three stages are in ``stages/``.

    Attributes:
        output: folder of the adapter, the state to resume from, and TensorBoard's files.
        data: sources of samples.
        model: FLUX.1, a diffusers folder or hub id.
        siglip: a folder, hub id or ``.safetensors``.
        dinov2: a folder, hub id or ``.safetensors``.
        adapter: an adapter file to begin from, such as the previous stage's; without it a new adapter.
        sizes: sizes of a new adapter; the released ones by default.
        resolution: pixels of a picture's side, a multiple of 16.
        steps: optimizer steps.
        batch_size: samples of one device in one pass.
        accumulate: passes per step.
        learning_rate: constant after the warm-up.
        warmup: steps from 0 to the learning rate.
        weight_decay: AdamW's.
        clip: largest norm of a step's gradient; ``.inf`` turns clipping off.
        optimizer: ``"adamw"``, or bitsandbytes' ``"adamw8bit"`` with a quarter of the optimizer state's memory.
        drop_character: fraction of samples whose reference is replaced by a white picture: the unconditional case.
        drop_text: fraction of samples whose caption is replaced by the empty prompt.
        guidance: FLUX's guidance input; 1 means pictures as the data has them.
        ema: decay of the moving average of the weights, which then is the adapter that is written; 0 for none.
        precision: dtype of the arithmetic and of FLUX; the adapter's own weights are always float32.
        checkpointing: gradient checkpointing: recompute activations in the backward pass instead of storing them.
        seed: seed of everything random, 0 to 2**64 - 1.
        cache: folder for the outputs of the VAE, text and vision encoders, so that each is computed once; none without
            it. At the released sizes and 512 pixels a sample's latents take 0.13 MB, its text 4 MB, its features 31 MB.
            Other weights at the same path get another part of the cache.
        cached: kinds of outputs that go into the cache.
        held_gib: GiB of memory for outputs that were computed or read, so that a small dataset is read once.
        held_in: host memory, or the device's.
        cuda_graph: capture the passes through FLUX and the adapter as CUDA graphs and replay them, for models so small
            that launching their kernels takes longer than running them. Excludes checkpointing, several passes per
            step, and several processes.
        workers: threads that read and decode.
        log_every: steps between two entries in TensorBoard.
        save_every: steps between two states to resume from; the end writes one, too.
        keep_states: how many states stay on disk; if the newest is broken, the training goes on from the one before.
        previews: pictures to generate for TensorBoard.
        preview_every: steps between two times that previews are generated.
        preview_steps: denoising steps of a preview.
    """

    output: Path
    data: tuple[Source, ...]
    model: str = FLUX
    siglip: str = SIGLIP
    dinov2: str = DINOV2
    adapter: Path | None = None
    sizes: AdapterConfig = field(default_factory=AdapterConfig)
    resolution: int = 512
    steps: int = 10_000
    batch_size: int = 1
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 500
    weight_decay: float = 0.01
    clip: float = 1.0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    drop_character: float = 0.05
    drop_text: float = 0.1
    guidance: float = 1.0
    ema: float = 0.0
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    checkpointing: bool = True
    seed: int = 0
    cache: Path | None = None
    cached: tuple[Literal["latents", "texts", "features"], ...] = ("latents", "texts", "features")
    held_gib: float = 0.0
    held_in: Literal["host", "device"] = "host"
    cuda_graph: bool = False
    workers: int = 4
    log_every: int = 50
    save_every: int = 1000
    keep_states: int = 2
    previews: tuple[Preview, ...] = ()
    preview_every: int = 1000
    preview_steps: int = 28

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data names no source: a training needs one at least")
        if not sum(source.share for source in self.data):
            raise ValueError("all sources have a share of 0: give one of them more")
        if self.resolution % 16 or self.resolution < 16:
            raise ValueError(f"resolution is {self.resolution}; expected a multiple of 16")
        counts = ("steps", "batch_size", "accumulate", "workers")
        every = ("log_every", "save_every", "keep_states", "preview_every", "preview_steps")
        _check(self, counts + every, lambda value: value >= 1, "at least 1")
        amounts = ("learning_rate", "warmup", "weight_decay", "guidance", "held_gib")
        _check(self, amounts, lambda value: 0 <= value < math.inf, "0 or more")
        _check(self, ("clip",), lambda value: value > 0, "more than 0")
        _check(self, ("drop_character", "drop_text", "ema"), lambda value: 0 <= value < 1, "0 or more, and less than 1")
        _check(self, ("seed",), lambda value: 0 <= value < 2**64, "0 to 2**64 - 1")
        if self.cuda_graph and self.checkpointing:
            raise ValueError("cuda_graph cannot record checkpointing: set one of them to false")
        if self.cuda_graph and self.accumulate > 1:
            raise ValueError("cuda_graph overwrites the gradients of the pass before: set accumulate to 1")


def _check(settings: Any, names: tuple[str, ...], fits: Callable[[float], bool], expected: str) -> None:
    """Raise ``ValueError`` for the first of these settings outside its range; NaN is outside of every range."""
    for name in names:
        if not fits(getattr(settings, name)):
            raise ValueError(f"{name} is {getattr(settings, name)}; expected {expected}")
