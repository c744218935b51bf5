"""What a training is told, in a YAML file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..files.catalog import DINOV2, FLUX, SIGLIP
from ..model.adapter import AdapterConfig


@dataclass(frozen=True)
class Source:
    """Where samples come from.

    Attributes:
        path: an image folder with a ``metadata.jsonl``, WebDataset shards (``….tar``, a pattern or an address), or a
            dataset on the hub.
        pairs: whether each sample has another picture of its character as the reference; the picture itself is, if not.
        share: of the samples, against the other sources' shares; 0 leaves the source out.
        stream: read a hub's dataset or shards in their order while they are fetched, not shuffled.
    """

    path: str
    pairs: bool = False
    share: float = 1.0
    stream: bool = False

    def __post_init__(self) -> None:
        _check(self, ("share",), lambda value: 0 <= value < math.inf, "0 or more")


@dataclass(frozen=True)
class Preview:
    """A picture to draw while training goes on: of a reference, to a prompt."""

    reference: str
    prompt: str


@dataclass(frozen=True)
class TrainingConfig:
    """A training, one of the stages of arXiv 2504.12395; the files of all three are in ``stages/``.

    Attributes:
        output: the folder for all that is written: the adapter, the state to go on from, TensorBoard's files.
        data: where samples come from.
        model: FLUX.1, a diffusers folder or hub id.
        siglip: a folder, hub id or ``.safetensors``.
        dinov2: likewise.
        adapter: an adapter file to begin with, such as the stage's before; a new one if not given.
        sizes: of a new adapter, where they are not the released ones.
        resolution: pixels of a picture's side, a multiple of 16.
        steps: of the optimiser.
        batch_size: samples on one device in one pass.
        accumulate: passes to a step.
        learning_rate: after the warm-up, constant.
        warmup: steps from 0 to the learning rate.
        weight_decay: of AdamW.
        clip: largest norm of a step's gradient; ``.inf`` for any.
        optimizer: ``"adamw"``, or ``"adamw8bit"`` of bitsandbytes: a quarter of the memory for its state.
        drop_character: fraction of samples whose reference is a white picture: it then has nothing to say, and what is
            learned is to leave FLUX as it is.
        drop_text: fraction of samples without a caption.
        guidance: what FLUX is told; 1 is a picture as the data has it.
        ema: decay of the moving average of the weights, which is then the adapter that is written; 0 for none.
        precision: of the arithmetic and of FLUX; the adapter's own weights are float32 always.
        checkpointing: compute activations again in the backward pass, in place of keeping them.
        seed: of everything random, 0 to 2**64 - 1.
        cache: a folder for what models make of samples, computed once; nothing is kept if not given. At the released
            sizes and 512 pixels a sample's latents take 0.13 MB, its text 4 MB, its features 31 MB. Models with other
            weights have another part of it, also at the same path.
        cached: what of it is kept.
        held_gib: memory for what was computed or read, so that a small dataset is read once.
        held_in: whose memory that is.
        cuda_graph: record the passes through FLUX and the adapter on the GPU and replay them: for models so small that
            the host launches their kernels slower than they run. Not with checkpointing, several passes to a step, or
            several processes.
        workers: threads that read and decode.
        log_every: steps between two entries in TensorBoard.
        save_every: steps between two states to go on from; the end is one, too.
        previews: pictures to draw.
        preview_every: steps between two drawings of them.
        preview_steps: denoising steps of a drawing.
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
        every = ("log_every", "save_every", "preview_every", "preview_steps")
        _check(self, counts + every, lambda value: value >= 1, "at least 1")
        amounts = ("learning_rate", "warmup", "weight_decay", "guidance", "held_gib")
        _check(self, amounts, lambda value: 0 <= value < math.inf, "0 or more")
        _check(self, ("clip",), lambda value: value > 0, "more than 0")
        _check(self, ("drop_character", "drop_text", "ema"), lambda value: 0 <= value < 1, "0 or more, and less than 1")
        _check(self, ("seed",), lambda value: 0 <= value < 2**64, "0 to 2**64 - 1")
        if self.cuda_graph and self.checkpointing:
            raise ValueError("cuda_graph cannot record checkpointing: set one of them to false")
        if self.cuda_graph and self.accumulate > 1:
            raise ValueError("cuda_graph writes each pass's gradients where the last one's are: set accumulate to 1")


def read_config(path: str | Path) -> TrainingConfig:
    """Read a training's YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, a setting that is missing or not one, or a value of another kind.
    """
    try:
        told = yaml.safe_load(Path(path).read_bytes())  # it knows UTF-8 and UTF-16 by their marks
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return _made(TrainingConfig, told, str(path))


def _check(settings: Any, names: tuple[str, ...], fits: Callable[[float], bool], expected: str) -> None:
    """Raise ``ValueError`` for the first of these settings that is not as expected; NaN fits no range."""
    for name in names:
        if not fits(getattr(settings, name)):
            raise ValueError(f"{name} is {getattr(settings, name)}; expected {expected}")


def _made(kind: Any, told: Any, where: str) -> Any:
    """A dataclass of what a file says."""
    if not isinstance(told, Mapping):
        raise ValueError(f"{where}: expected settings, found {told!r}")
    hints = get_type_hints(kind)
    if unknown := [name for name in told if name not in hints]:
        raise ValueError(f"{where}: there is no setting {unknown[0]!r}; expected some of {', '.join(hints)}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in told]:
        raise ValueError(f"{where}: {missing[0]} is missing")
    settings = {name: _as(hints[name], value, f"{where}: {name}") for name, value in told.items()}
    try:
        return kind(**settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _as(kind: Any, value: Any, where: str) -> Any:
    """A value of the kind that its setting has."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _as(inner[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}; expected a list")
        return tuple(_as(inner[0], item, f"{where} {i}") for i, item in enumerate(value))
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{where} is {value!r}; expected {' or '.join(inner)}")
        return value
    if hasattr(kind, "__dataclass_fields__"):
        return _made(kind, value, where)
    simple = {int: (int,), float: (int, float, str), str: (str,), bool: (bool,), Path: (str,)}[kind]
    if not isinstance(value, simple) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} is {value!r}; expected {kind.__name__}")
    try:
        return kind(value)  # YAML takes 1e-4 for a text
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where} is {value!r}; expected {kind.__name__}") from error
