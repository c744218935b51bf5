"""Memory plans: which weights stay on the GPU, which come when they are needed, and what that takes.

A picture is drawn in phases: text, reference picture, denoising, decoding. What stays on the GPU is there in all of
them; beside it, each phase has its own weights, for as long as it lasts, and its working memory. A plan keeps as many
of FLUX's blocks on the GPU as the hungriest phase leaves room for. The others stream, see :mod:`.streaming`, spread so
that the link to the host is evenly busy: then they cost nothing until the link is the slower of the two.

A plan is arithmetic on sizes; :class:`~instantcharacter.offload.offloader.Offloader` carries it out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from .streaming import SLOTS

Strategy = Literal["auto", "none", "model", "stream", "sequential"]
Phase = Literal["text", "picture", "denoise", "decode"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
PHASES: tuple[Phase, ...] = get_args(Phase)

GIB = 2**30
RESERVED_FOR_DESKTOP = GIB // 2
"""Bytes of free GPU memory that ``auto`` leaves to other programs."""
RESERVED_FRACTION, RESERVED_BYTES = 0.03, GIB // 5
"""Of GPU memory, what no plan uses: memory is handed out in pieces, and CUDA's libraries want some."""
MAX_PINNED_FRACTION = 0.85
"""Of host memory, what may be pinned."""
REDUCTION = 0.8
"""Of a plan's GPU memory, what the next smaller one may use."""


@dataclass(frozen=True)
class ModuleSize:
    """A module of a component that runs by itself, in bytes.

    Attributes:
        rest: what is there while any of it runs.
        blocks: what may stream, in the order in which it runs.
    """

    rest: int
    blocks: tuple[int, ...] = ()

    @property
    def visit(self) -> int:
        """On the GPU while it runs, its blocks streaming."""
        return self.rest + min(SLOTS, len(self.blocks)) * max(self.blocks, default=0)


@dataclass(frozen=True)
class Component:
    """A model of the pipeline's, in bytes.

    Attributes:
        phase: when it runs.
        parts: what it consists of; they run one at a time.
        layer: its largest layer.
        work: memory that it works in, beside its weights.
        work_per_pixel: the same, for each pixel of a picture.
        dtype: what its weights are stored in.
    """

    phase: Phase
    parts: tuple[ModuleSize, ...]
    layer: int
    work: int
    work_per_pixel: float = 0.0
    dtype: str = "bfloat16"

    @property
    def size(self) -> int:
        """All its weights."""
        return sum(part.rest + sum(part.blocks) for part in self.parts)

    @property
    def visit(self) -> int:
        """Its weights that are on the GPU at once, if they are there only while they are needed."""
        return max(part.visit for part in self.parts)

    def working(self, pixels: int) -> int:
        """Working memory, for pictures of so many pixels together."""
        return self.work + int(self.work_per_pixel * pixels)


Components = Mapping[str, Component]

PHASE: Mapping[str, Phase] = {
    "text_encoder": "text",
    "text_encoder_2": "text",
    "siglip": "picture",
    "dinov2": "picture",
    "fusion": "picture",
    "resampler": "denoise",
    "transformer": "denoise",
    "vae": "decode",
}
"""When each component runs."""
ACTIVATION_BYTES = {
    "text_encoder": (16 << 20, 0.0),
    "text_encoder_2": (240 << 20, 0.0),
    "siglip": (330 << 20, 0.0),
    "dinov2": (330 << 20, 0.0),
    "fusion": (80 << 20, 0.0),
    "resampler": (275 << 20, 0.0),
    "transformer": (132 << 20, 442.0),
    "vae": (16 << 20, 2436.0),
}
"""Working memory and that per pixel, measured at the released sizes in bfloat16; see benchmarks/RESULTS.md."""
TILED_ACTIVATION_BYTES = 630 << 20
"""The VAE's, for tiles."""

_RELEASED: dict[str, tuple[tuple[ModuleSize, ...], int]] = {
    "text_encoder": ((ModuleSize(76_012_648, (14_175_744,) * 12),), 75_890_688),
    "text_encoder_2": ((ModuleSize(263_200_768, (385_896_448, *(385_892_352,) * 23)),), 263_192_576),
    "siglip": ((ModuleSize(3_047_112, (30_479_008,) * 27),), 9_925_024),
    "dinov2": ((ModuleSize(6_030_336, (56_673_280,) * 40),), 12_591_104),
    "fusion": ((ModuleSize(289_105_152),) * 8 + (ModuleSize(57_818_880),) * 3, 115_648_512),
    "resampler": ((ModuleSize(233_934_336),), 13_117_440),
    "transformer": ((ModuleSize(128_249_984, (695_502_080,) * 19 + (299_023_104,) * 38),), 113_283_072),
    "vae": ((ModuleSize(68_548_416), ModuleSize(99_090_950)), 4_719_616),
}
RELEASED: Components = {
    name: Component(PHASE[name], parts, layer, *ACTIVATION_BYTES[name]) for name, (parts, layer) in _RELEASED.items()
}
"""FLUX.1-dev, its text encoders and VAE, InstantCharacter's encoders and adapter, in bfloat16."""


@dataclass(frozen=True)
class MemoryPlan:
    """What is where while a picture is drawn; ``str()`` of it is a table.

    Attributes:
        strategy: ``"none"``: all of it stays on the GPU; ``"stream"``: as much as fits; ``"model"``: one component at
            a time is there; ``"sequential"``: one layer at a time.
        components: what is planned for.
        resolution: width and height of a picture in pixels.
        batch: pictures at once.
        vram_bytes: GPU memory that there is.
        ram_bytes: host memory that there is.
        staying: names of the components that stay on the GPU whole.
        streamed: which of FLUX's blocks stream, in the order in which they run.
        tiled: whether the VAE decodes in tiles, whose seams can show: only where there is no other way.
    """

    strategy: Strategy
    components: Components
    resolution: tuple[int, int]
    batch: int
    vram_bytes: int
    ram_bytes: int
    staying: frozenset[str] = frozenset()
    streamed: tuple[int, ...] = ()
    tiled: bool = False

    @property
    def name(self) -> str:
        """In a few words."""
        blocks = f", {self.streamed_blocks} of {len(self.blocks)} blocks streaming" if self.strategy == "stream" else ""
        return f"{self.strategy}{blocks}, {_gib(self.predicted_peak)}"

    @property
    def blocks(self) -> tuple[int, ...]:
        """The sizes of FLUX's blocks, with the adapter's attention in them, in bytes."""
        return self.components["transformer"].parts[0].blocks

    @property
    def resident_blocks(self) -> int:
        """How many of FLUX's blocks stay on the GPU."""
        return len(self.blocks) - len(self.streamed)

    @property
    def streamed_blocks(self) -> int:
        """How many of FLUX's blocks stream."""
        return len(self.streamed)

    @property
    def fp8(self) -> bool:
        """Whether FLUX's weights are stored in 8 bits."""
        return "float8" in self.components["transformer"].dtype

    @property
    def resident(self) -> int:
        """Bytes of weights that stay on the GPU from phase to phase."""
        whole = sum(self.components[name].size for name in self.staying)
        return whole - sum(self.blocks[i] for i in self.streamed)

    @cached_property
    def peaks(self) -> dict[Phase, int]:
        """Bytes on the GPU at the most in each phase."""
        return {
            phase: self.resident + max((self._beside(name) for name in self._of(phase)), default=0) for phase in PHASES
        }

    @property
    def predicted_peak(self) -> int:
        """Bytes on the GPU at the most, as ``torch.cuda.max_memory_allocated`` counts them."""
        return max(self.peaks.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory."""
        return sum(component.size for component in self.components.values()) - self.resident

    @property
    def pinned(self) -> bool:
        """Whether the host can lock these weights in memory; if not, they come slowly, and the system may swap them."""
        return self.host_bytes <= MAX_PINNED_FRACTION * self.ram_bytes

    @property
    def fits(self) -> bool:
        """Whether the GPU memory suffices."""
        return self.predicted_peak <= _usable(self.vram_bytes)

    def smaller(self) -> MemoryPlan | None:
        """The next plan that needs less GPU memory, if there is one."""
        if self.strategy == "sequential":
            return None
        if self.strategy in ("none", "stream"):
            less = _streaming(dataclasses.replace(self, vram_bytes=_that_gives(REDUCTION * self.predicted_peak)))
        else:
            less = _all_streams(self)
        if less.predicted_peak < self.predicted_peak:
            return less
        return dataclasses.replace(less, strategy="sequential", staying=frozenset(), streamed=())

    def for_pictures(self, resolution: tuple[int, int], batch: int) -> MemoryPlan:
        """This plan for other pictures."""
        other = dataclasses.replace(self, resolution=resolution, batch=batch)
        return _streaming(other) if self.strategy in ("none", "stream") and not other.fits else other

    def __str__(self) -> str:
        width, height = self.resolution
        kind = self.components["transformer"].dtype
        lines = [
            f"{self.strategy}: {_gib(self.vram_bytes)} of GPU memory, {_gib(self.ram_bytes)} of host memory, "
            f"{width}×{height}, {self.batch} at once",
            f"FLUX in {kind}: {self.resident_blocks if self.staying else 0} of {len(self.blocks)} blocks stay on the "
            f"GPU, {self.streamed_blocks} stream",
            f"weights: {_gib(self.resident)} on the GPU for good, {_gib(self.host_bytes)} in host memory, "
            + ("pinned" if self.pinned else "not pinned, since there is too little of it: slow"),
            "phase     stays there | comes for it | most in it",
        ]
        for phase in PHASES:
            stays = [name for name in self._of(phase) if name in self.staying]
            comes = [name for name in self._of(phase) if name not in stays]
            if phase == "denoise" and self.streamed:
                comes.append(f"{self.streamed_blocks} blocks")
            lines.append(
                f"{phase:9s} {', '.join(stays) or '-'} | {', '.join(comes) or '-'} | {_gib(self.peaks[phase])}"
            )
        lines.append(f"predicted peak {_gib(self.predicted_peak)}" + (", the VAE in tiles" if self.tiled else ""))
        return "\n".join(lines)

    def _of(self, phase: Phase) -> list[str]:
        return [name for name, component in self.components.items() if component.phase == phase]

    def _beside(self, name: str) -> int:
        """What a component takes beside what stays, while it runs."""
        component, (width, height) = self.components[name], self.resolution
        at_once = 1 if name == "vae" else self.batch
        work = component.working(width * height * at_once)
        if name == "vae" and self.tiled:
            work = min(work, TILED_ACTIVATION_BYTES)
        if name in self.staying:
            slots = SLOTS * max((self.blocks[i] for i in self.streamed), default=0)
            return work + (slots if component.phase == "denoise" else 0)
        if self.strategy == "model" and component.phase != "picture" and name != "resampler":
            return work + component.size
        return work + (component.layer if self.strategy == "sequential" else component.visit)


def plan(
    components: Components = RELEASED,
    vram_bytes: int = 24 * GIB,
    ram_bytes: int = 64 * GIB,
    resolution: tuple[int, int] | int = (1024, 1024),
    batch: int = 1,
    strategy: Strategy = "auto",
) -> MemoryPlan:
    """Work out what stays on the GPU; nothing is moved.

    Args:
        components: sizes, see :func:`~.offloader.measure`; those of the released models if not given.
        vram_bytes: GPU memory for all of it, weights and working memory.
        ram_bytes: host memory for weights.
        resolution: width and height of a picture in pixels; one number for a square.
        batch: pictures at once.
        strategy: ``"auto"`` keeps on the GPU what fits; ``"stream"`` as little as streaming can; the others as in
            :class:`MemoryPlan`, whether it fits or not.

    Raises:
        ValueError: another strategy, sizes that are not positive, or too little memory for any plan.
    """
    resolution = (resolution, resolution) if isinstance(resolution, int) else resolution
    if strategy not in STRATEGIES:
        raise ValueError(f"offload strategy {strategy!r}; expected one of {', '.join(STRATEGIES)}")
    if min(vram_bytes, ram_bytes, batch, *resolution) <= 0:
        raise ValueError(
            f"{vram_bytes} bytes of GPU memory, {ram_bytes} of host memory, resolution {resolution}, batch {batch}; "
            "expected positive numbers"
        )
    empty = MemoryPlan("stream", components, resolution, batch, vram_bytes, ram_bytes)
    if strategy == "none":
        return dataclasses.replace(empty, strategy="none", staying=frozenset(components))
    if strategy == "stream":
        return _all_streams(empty)
    if strategy != "auto":
        return dataclasses.replace(empty, strategy=strategy)
    found = _streaming(empty)
    if not found.fits:
        raise ValueError(
            f"{_gib(vram_bytes)} of GPU memory are too little: {resolution[0]}×{resolution[1]}, {batch} at once, takes "
            f"{_gib(_that_gives(found.predicted_peak))} at the least. Draw smaller or fewer pictures, store FLUX in "
            'fp8, or try strategy "sequential".'
        )
    return found


def _streaming(empty: MemoryPlan) -> MemoryPlan:
    """The plan that keeps the most on the GPU of those that fit, or the smallest."""
    candidates = [_staying(empty, keep) for keep in _keeps(empty.components)]
    for candidate in candidates:
        if candidate.fits:
            return candidate
    for candidate in _streamed(candidates[-1]):
        if candidate.fits:
            return candidate
    return dataclasses.replace(_all_streams(empty), tiled=True)


def _keeps(components: Components) -> Iterator[frozenset[str]]:
    """What may stay, from all to FLUX alone; what runs once a reference goes first, then what runs once a prompt."""
    names = list(components)
    order: tuple[Phase, ...] = ("picture", "text", "decode")
    for gone in range(len(order) + 1):
        yield frozenset(
            name for name in names if components[name].phase not in order[:gone] and (name != "resampler" or gone == 0)
        )


def _staying(empty: MemoryPlan, keep: frozenset[str]) -> MemoryPlan:
    whole = len(keep) == len(empty.components)
    return dataclasses.replace(empty, strategy="none" if whole else "stream", staying=keep, streamed=(), tiled=False)


def _streamed(candidate: MemoryPlan) -> Iterator[MemoryPlan]:
    """More and more of FLUX's blocks streaming; then the VAE in tiles, too."""
    rates = [max(candidate.blocks, default=0) * i / 256 for i in range(1, 257)]
    for tiled in (False, True):
        for rate in rates:
            yield dataclasses.replace(candidate, streamed=spread(candidate.blocks, rate), tiled=tiled)


def _all_streams(empty: MemoryPlan) -> MemoryPlan:
    blocks = len(empty.components["transformer"].parts[0].blocks)
    keep = frozenset({"transformer"})
    return dataclasses.replace(empty, strategy="stream", staying=keep, streamed=tuple(range(blocks)))


def spread(blocks: Sequence[int], rate: float) -> tuple[int, ...]:
    """Which blocks stream, if about ``rate`` bytes are to cross the link in the time of each block.

    FLUX's blocks all take about as long, whatever their size, so this keeps the link evenly busy.
    """
    streamed, due = [], 0.0
    for i, size in enumerate(blocks):
        due += rate
        if due >= size:
            streamed.append(i)
            due = min(due - size, rate)
    return tuple(streamed)


def _usable(vram_bytes: int) -> int:
    return int(vram_bytes * (1 - RESERVED_FRACTION)) - RESERVED_BYTES


def _that_gives(usable: float) -> int:
    return math.ceil((usable + RESERVED_BYTES) / (1 - RESERVED_FRACTION))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
