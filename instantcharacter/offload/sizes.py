"""Sizes of models in bytes: of the released ones from a table, of loaded ones by measuring. Plans are made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn

Phase = Literal["text", "picture", "denoise", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)

GIB = 2**30
SLOTS = 2
"""Streamed blocks that are on the GPU at once: one computes while the next one's weights are copied."""


@dataclass(frozen=True)
class ModuleSize:
    """Size of a module that runs by itself, in bytes.

    Attributes:
        rest: weights outside of the blocks; they are on the GPU whenever the module runs.
        blocks: weights of each block that can stream, in the order in which the blocks run.
    """

    rest: int
    blocks: tuple[int, ...] = ()

    @property
    def onload_bytes(self) -> int:
        """Weights on the GPU at once while the module runs and its blocks stream."""
        return self.rest + min(SLOTS, len(self.blocks)) * max(self.blocks, default=0)


@dataclass(frozen=True)
class ComponentSize:
    """Size of a component, which is one model or a part of one, in bytes.

    Attributes:
        phase: when the component runs.
        modules: its modules; they run one at a time.
        largest_layer: weights of its largest layer.
        activation_bytes: memory for activations, whatever the size of the picture.
        activation_bytes_per_pixel: memory for activations that grows with the picture.
        dtype: the type that most of its weights are stored in, by torch's name.
    """

    phase: Phase
    modules: tuple[ModuleSize, ...]
    largest_layer: int
    activation_bytes: int
    activation_bytes_per_pixel: float = 0.0
    dtype: str = "bfloat16"

    @property
    def size(self) -> int:
        """All weights of the component."""
        return sum(module.rest + sum(module.blocks) for module in self.modules)

    @property
    def onload_bytes(self) -> int:
        """Weights on the GPU at once, for a component that is offloaded between its runs."""
        return max(module.onload_bytes for module in self.modules)

    def activations(self, pixels: int) -> int:
        """Memory for activations, for this number of pixels in all pictures together."""
        return self.activation_bytes + int(self.activation_bytes_per_pixel * pixels)


ComponentSizes: TypeAlias = Mapping[str, ComponentSize]
ComponentModules: TypeAlias = Mapping[str, Sequence[nn.Module]]
"""The modules of each component. Each module runs by itself, and the modules of a component run one at a time."""

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
"""When each component runs. The order of the names is the order in plans and tables."""
STREAMED_COMPONENTS = ("text_encoder", "text_encoder_2", "siglip", "dinov2", "transformer")
"""Components with blocks that stream. The others are small, or run one small module at a time."""
OUTSIDE_THE_PIPELINE = ("siglip", "dinov2", "fusion", "resampler")
"""Components that diffusers' and accelerate's offloading does not move, since no diffusers pipeline has them."""
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
"""Memory for activations, fixed and per pixel. Measured at the released sizes in bfloat16: benchmarks/RESULTS.md."""
TILED_ACTIVATION_BYTES = 630 << 20
"""Memory for the VAE's activations at most, if it decodes in tiles."""

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
RELEASED: ComponentSizes = {
    name: ComponentSize(PHASE[name], modules, largest_layer, *ACTIVATION_BYTES[name])
    for name, (modules, largest_layer) in _RELEASED.items()
}
"""FLUX.1-dev, its text encoders and VAE, InstantCharacter's encoders and adapter, in bfloat16."""


def measure(components: ComponentModules) -> ComponentSizes:
    """Sizes of loaded models, LoRAs included.

    Args:
        components: modules by the names in :data:`PHASE`.
    """
    return {name: _component_size(name, modules) for name, modules in components.items()}


def blocks_of(name: str, module: nn.Module) -> list[nn.Module]:
    """The blocks of a component's module that can stream, in the order in which they run.

    They are the children of the module's outermost ``ModuleList`` objects.
    """
    if name not in STREAMED_COMPONENTS:
        return []
    lists: list[nn.ModuleList] = []
    for child in module.modules():
        if isinstance(child, nn.ModuleList) and not any(child in outer.modules() for outer in lists):
            lists.append(child)
    return [block for blocks in lists for block in blocks]


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """The parameters and buffers of modules, each once."""
    return list(dict.fromkeys(tensor for module in modules for tensor in (*module.parameters(), *module.buffers())))


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in tensors_of(module))


def _component_size(name: str, modules: Sequence[nn.Module]) -> ComponentSize:
    sizes, largest_layer = [], 0
    for module in modules:
        blocks = tuple(map(module_bytes, blocks_of(name, module)))
        sizes.append(ModuleSize(module_bytes(module) - sum(blocks), blocks))
        layers = (child for child in module.modules() if not any(child.children()))
        largest_layer = max(largest_layer, *map(module_bytes, layers))
    bytes_in: Counter[str] = Counter()
    for parameter in tensors_of(*modules):
        bytes_in[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    dtype = bytes_in.most_common(1)[0][0]
    return ComponentSize(PHASE[name], tuple(sizes), largest_layer, *ACTIVATION_BYTES[name], dtype)
