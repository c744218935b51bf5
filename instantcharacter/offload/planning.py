"""Memory plans: which weights stay on the GPU, which are moved there when they are needed, and the peak of that.

A picture is generated in phases: text, reference picture, denoising, decoding. Resident weights are on the GPU in all
of them. Beside those, each phase needs its own weights for as long as it lasts, and memory for activations. A plan
keeps as many of FLUX's blocks on the GPU as the phase that needs the most leaves room for. The other blocks stream, see
:mod:`.streaming`, spread so that the link to the host is evenly busy: they cost no time until the link is slower than
the GPU.

A plan is arithmetic on sizes; :class:`~instantcharacter.offload.offloader.Offloader` carries it out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from ..values import check_choice, check_count, check_number, is_number, shown
from .sizes import GIB, OUTSIDE_THE_PIPELINE, PHASES, RELEASED, SLOTS, TILED_ACTIVATION_BYTES, ComponentSizes, Phase

Strategy = Literal["auto", "none", "model", "stream", "sequential"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

RESERVED_FOR_DESKTOP = GIB // 2
"""Bytes of free GPU memory that ``auto`` leaves to other programs."""
RESERVED_FRACTION, RESERVED_BYTES = 0.03, GIB // 5
"""Fraction and bytes of GPU memory that no plan uses: for fragmentation, and for CUDA's libraries."""
MAX_PINNED_FRACTION = 0.85
"""Fraction of host memory that may be pinned."""
REDUCTION = 0.8
"""Fraction of a plan's predicted peak that the next smaller plan may use."""

MAX_BYTES, MAX_COUNT = 2**50, 2**20
"""Most memory, and most pixels of a side or pictures, that a plan is computed for."""


@dataclass(frozen=True)
class MemoryPlan:
    """Which weights are on the GPU while a picture is generated; ``str()`` of a plan is a table.

    Attributes:
        strategy: ``"none"``: all weights are resident on the GPU; ``"stream"``: as many as fit; ``"model"``: one
            component at a time is on the GPU; ``"sequential"``: one layer at a time.
        components: sizes of the components.
        resolution: width and height of a picture in pixels.
        batch: pictures at once.
        vram_bytes: GPU memory for all of it.
        ram_bytes: host memory for weights.
        resident_components: names of the components that are resident, FLUX without its streamed blocks.
        streamed: indices of FLUX's blocks that stream, in the order in which they run.
        tiled: whether the VAE decodes in tiles, whose seams can show: only if nothing else fits.
    """

    strategy: Strategy
    components: ComponentSizes
    resolution: tuple[int, int]
    batch: int
    vram_bytes: int
    ram_bytes: int
    resident_components: frozenset[str] = frozenset()
    streamed: tuple[int, ...] = ()
    tiled: bool = False

    @property
    def name(self) -> str:
        """The plan in a few words."""
        blocks = f", {self.streamed_blocks} of {len(self.blocks)} blocks streaming" if self.strategy == "stream" else ""
        return f"{self.strategy}{blocks}, {_gib(self.predicted_peak)}"

    @property
    def blocks(self) -> tuple[int, ...]:
        """The sizes of FLUX's blocks, with the adapter's attention in them, in bytes."""
        return self.components["transformer"].modules[0].blocks

    @property
    def resident_blocks(self) -> int:
        """Number of FLUX's blocks that are resident on the GPU."""
        return len(self.blocks) - len(self.streamed)

    @property
    def streamed_blocks(self) -> int:
        """Number of FLUX's blocks that stream."""
        return len(self.streamed)

    @property
    def fp8(self) -> bool:
        """Whether FLUX's weights are stored in 8 bits."""
        return "float8" in self.components["transformer"].dtype

    @property
    def resident(self) -> int:
        """Bytes of weights that are on the GPU in every phase."""
        whole = sum(self.components[name].size for name in self.resident_components)
        return whole - sum(self.blocks[i] for i in self.streamed)

    @cached_property
    def peaks(self) -> dict[Phase, int]:
        """Most bytes on the GPU in each phase."""
        return {
            phase: self.resident + max((self._beside_resident(name) for name in self._components_of(phase)), default=0)
            for phase in PHASES
        }

    @property
    def predicted_peak(self) -> int:
        """Most bytes on the GPU, as ``torch.cuda.max_memory_allocated`` counts them."""
        return max(self.peaks.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory."""
        return sum(component.size for component in self.components.values()) - self.resident

    @property
    def pinned(self) -> bool:
        """Whether the host can lock its weights in memory; if not, copies are slow, and the system may swap them."""
        return self.host_bytes <= MAX_PINNED_FRACTION * self.ram_bytes

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the GPU memory that plans may use."""
        return self.predicted_peak <= usable_vram(self.vram_bytes)

    def smaller(self) -> MemoryPlan | None:
        """The next plan that needs less GPU memory; None if this is the smallest."""
        if self.strategy == "sequential":
            return None
        if self.strategy in ("none", "stream"):
            less = _streaming(dataclasses.replace(self, vram_bytes=vram_for(REDUCTION * self.predicted_peak)))
        else:
            less = _all_streams(self)
        if less.predicted_peak < self.predicted_peak:
            return less
        return dataclasses.replace(less, strategy="sequential", resident_components=frozenset(), streamed=())

    def for_pictures(self, resolution: tuple[int, int], batch: int) -> MemoryPlan:
        """The plan for pictures of another size or number: this one, or one that fits."""
        other = dataclasses.replace(self, resolution=resolution, batch=batch)
        return _streaming(other) if self.strategy in ("none", "stream") and not other.fits else other

    def __str__(self) -> str:
        width, height = self.resolution
        resident_blocks = self.resident_blocks if self.resident_components else 0
        lines = [
            f"{self.strategy}: {_gib(self.vram_bytes)} of GPU memory, {_gib(self.ram_bytes)} of host memory, "
            f"{width}×{height}, {self.batch} at once",
            f"FLUX in {self.components['transformer'].dtype}: {resident_blocks} of {len(self.blocks)} blocks stay on "
            f"the GPU, {self.streamed_blocks} stream",
            f"weights: {_gib(self.resident)} on the GPU for good, {_gib(self.host_bytes)} in host memory, "
            + ("pinned" if self.pinned else "not pinned, since there is too little of it: slow"),
            "phase     resident | onloaded | peak",
            *map(self._row, PHASES),
            f"predicted peak {_gib(self.predicted_peak)}" + (", the VAE in tiles" if self.tiled else ""),
        ]
        return "\n".join(lines)

    def _row(self, phase: Phase) -> str:
        """A phase's line in the table."""
        resident = [name for name in self._components_of(phase) if name in self.resident_components]
        onloaded = [name for name in self._components_of(phase) if name not in resident]
        if phase == "denoise" and self.streamed:
            onloaded.append(f"{self.streamed_blocks} blocks")
        return f"{phase:9s} {', '.join(resident) or '-'} | {', '.join(onloaded) or '-'} | {_gib(self.peaks[phase])}"

    def _components_of(self, phase: Phase) -> list[str]:
        return [name for name, component in self.components.items() if component.phase == phase]

    def _beside_resident(self, name: str) -> int:
        """Bytes on the GPU beside the resident weights while a component runs."""
        component, (width, height) = self.components[name], self.resolution
        at_once = 1 if name == "vae" else self.batch
        activations = component.activations(width * height * at_once)
        if name == "vae" and self.tiled:
            activations = min(activations, TILED_ACTIVATION_BYTES)
        if name in self.resident_components:
            slots = SLOTS * max((self.blocks[i] for i in self.streamed), default=0)
            return activations + (slots if component.phase == "denoise" else 0)
        if self.strategy == "model" and name not in OUTSIDE_THE_PIPELINE:
            return activations + component.size
        return activations + (component.largest_layer if self.strategy == "sequential" else component.onload_bytes)


def plan(
    components: ComponentSizes = RELEASED,
    vram_bytes: int = 24 * GIB,
    ram_bytes: int = 64 * GIB,
    resolution: tuple[int, int] | int = (1024, 1024),
    batch: int = 1,
    strategy: Strategy = "auto",
) -> MemoryPlan:
    """Compute which weights stay on the GPU; nothing is moved.

    Args:
        components: sizes of the models, see :func:`~.sizes.measure`; those of the released models if not given.
        vram_bytes: GPU memory for weights and activations.
        ram_bytes: host memory for weights.
        resolution: width and height of a picture in pixels; one number for a square.
        batch: pictures at once.
        strategy: ``"auto"`` keeps as many weights on the GPU as fit; ``"stream"`` as few as streaming can; the others
            as in :class:`MemoryPlan`, whether the plan fits or not.

    Raises:
        ValueError: another strategy, sizes that are no positive numbers, or too little memory for any plan.
    """
    check_choice("the offload strategy", strategy, STRATEGIES)
    if not isinstance(components, Mapping) or "transformer" not in components:
        raise ValueError(f"components is {shown(components)}; expected the sizes of models, FLUX's among them")
    sides: Any = [resolution, resolution] if is_number(resolution) else resolution
    if not isinstance(sides, (list, tuple)) or len(sides) != 2:
        raise ValueError(f"resolution is {shown(resolution)}; expected width and height in pixels")
    for name, size in (("vram_bytes", vram_bytes), ("ram_bytes", ram_bytes)):
        check_number(name, size, 1, MAX_BYTES)
    for name, count in (("width", sides[0]), ("height", sides[1]), ("batch", batch)):
        check_count(name, count, 1, MAX_COUNT)
    width, height = sides
    empty = MemoryPlan("stream", components, (width, height), batch, vram_bytes, ram_bytes)
    if strategy == "none":
        return dataclasses.replace(empty, strategy="none", resident_components=frozenset(components))
    if strategy == "stream":
        return _all_streams(empty)
    if strategy != "auto":
        return dataclasses.replace(empty, strategy=strategy)
    found = _streaming(empty)
    if not found.fits:
        raise ValueError(
            f"{_gib(vram_bytes)} of GPU memory are too little: {width}×{height}, {batch} at once, takes "
            f"{_gib(vram_for(found.predicted_peak))} at the least. Draw smaller or fewer pictures, store FLUX in "
            'fp8, or try strategy "sequential".'
        )
    return found


def _streaming(empty: MemoryPlan) -> MemoryPlan:
    """The first plan that fits, of those from most to least on the GPU; the smallest if none does."""
    candidates = [_with_resident(empty, names) for names in _resident_sets(empty.components)]
    for candidate in candidates:
        if candidate.fits:
            return candidate
    for candidate in _with_streamed_blocks(candidates[-1]):
        if candidate.fits:
            return candidate
    return dataclasses.replace(_all_streams(empty), tiled=True)


def _resident_sets(components: ComponentSizes) -> Iterator[frozenset[str]]:
    """Candidate sets of resident components, largest first.

    Components that run once a reference picture leave first, then those that run once a prompt, then the VAE.
    """
    order: tuple[Phase, ...] = ("picture", "text", "decode")
    for count in range(len(order) + 1):
        offloaded = order[:count]
        yield frozenset(
            name
            for name, component in components.items()
            if component.phase not in offloaded and (name != "resampler" or not offloaded)
        )


def _with_resident(empty: MemoryPlan, names: frozenset[str]) -> MemoryPlan:
    strategy: Strategy = "none" if len(names) == len(empty.components) else "stream"
    return dataclasses.replace(empty, strategy=strategy, resident_components=names, streamed=(), tiled=False)


def _with_streamed_blocks(candidate: MemoryPlan) -> Iterator[MemoryPlan]:
    """Plans in which more and more of FLUX's blocks stream; then the same with the VAE in tiles."""
    rates = [max(candidate.blocks, default=0) * i / 256 for i in range(1, 257)]
    for tiled in (False, True):
        for rate in rates:
            yield dataclasses.replace(candidate, streamed=spread(candidate.blocks, rate), tiled=tiled)


def _all_streams(empty: MemoryPlan) -> MemoryPlan:
    blocks = len(empty.components["transformer"].modules[0].blocks)
    return dataclasses.replace(
        empty, strategy="stream", resident_components=frozenset({"transformer"}), streamed=tuple(range(blocks))
    )


def spread(blocks: Sequence[int], rate: float) -> tuple[int, ...]:
    """Choose blocks to stream, so that about ``rate`` bytes cross the link in the time of each block.

    FLUX's blocks all take about the same time, whatever their size, so this keeps the link evenly busy.

    Args:
        blocks: the sizes of all blocks in bytes, in the order in which they run.

    Returns:
        Indices of the blocks that stream.
    """
    streamed, due = [], 0.0
    for i, size in enumerate(blocks):
        due += rate
        if due >= size:
            streamed.append(i)
            due = min(due - size, rate)
    return tuple(streamed)


def usable_vram(vram_bytes: int) -> int:
    """Bytes that a plan may use of this much GPU memory."""
    return int(vram_bytes * (1 - RESERVED_FRACTION)) - RESERVED_BYTES


def vram_for(usable: float) -> int:
    """Bytes of GPU memory of which a plan may use this many; the inverse of :func:`usable_vram`."""
    return math.ceil((usable + RESERVED_BYTES) / (1 - RESERVED_FRACTION))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
