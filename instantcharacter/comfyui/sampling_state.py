"""The state of one sampling with characters, and of each call of FLUX in it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..model.attention import check_query_scale
from ..model.character import Character
from ..model.conditioning import Subject, add_subjects
from ..offload.devices import current, same_device
from .conditioning import CharacterConditioning
from .hosting import HostedAdapter, HostedAttention
from .internals import block_and_image_start, compute_dtype, free_memory_beside, query_norms
from .regions import Regions
from .strengths import Strengths, timesteps_at, to_adapter

logger = logging.getLogger(__name__)

EVERY_TIMESTEP = (0.0, float("inf"))
"""The window of a character that is active in all steps."""
NOT_APPLIED = (
    "InstantCharacter: FLUX ran, but {} the character's patches, so the character is not in the picture. "
    "Another node replaces FLUX's attention (TeaCache or another speed-up node, Nunchaku, an older IP-Adapter pack): "
    "remove it. ComfyUI's own EasyCache and LazyCache work. With TorchCompileModel and another attention than torch's: "
    "restart ComfyUI, since it runs what it compiled before."
)


class SamplingState:
    """The conditionings of one sampling, on its device. A step reads nothing back from the GPU: it would wait.

    Args:
        conditionings: the characters.
        model: the MODEL that is sampled.
        noise: [B, C, h, w].
        sigmas: the sampler's schedule.

    Attributes:
        regions: the characters' masks.
    """

    def __init__(
        self, conditionings: Sequence[CharacterConditioning], model: Any, noise: Tensor, sigmas: Tensor
    ) -> None:
        self._model = model
        self._device: torch.device = model.load_device  # another than ComfyUI's own, where the user has several GPUs
        self._dtype = compute_dtype(model)
        sampling = model.get_model_object("model_sampling")
        timesteps = to_adapter(sampling.timestep(sigmas.cpu()))
        windows = {each: _timestep_window(sampling, each) for each in conditionings}
        self._windows = {
            each: (low, high)
            for each, (low, high) in windows.items()
            if low <= timesteps.max() and timesteps.min() <= high
        }
        self._conditionings = list(self._windows)
        self._strengths = {
            each: Strengths(each.scale, sampling, self._device, self._dtype) for each in self._conditionings
        }
        self._attention = {each.adapter: each.adapter.attention(self._device, self._dtype) for each in self._windows}
        masks = [each.mask for each in self._conditionings]
        self.regions = Regions(masks, noise.shape[-2:], self._device, self._dtype)
        self._fused: dict[Character, Tensor] = {}
        self._key_scales: dict[HostedAdapter, list[Tensor]] = {}
        self._steps = len(sigmas) - 1
        self._weights = ExitStack()
        self._attention_loaded = False
        self._one_timestep: Tensor | None = None
        self._any_block_called = False
        self._blocks_checked = False

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Context manager of the sampling, in which the characters' weights are on its device.

        The device is the current one: ComfyUI 0.20 waits for its copies of FLUX's weights on the current one alone.
        """
        with current(self._device), self._weights:
            for adapter in self._attention:
                self._weights.enter_context(adapter.resampler.on_device(self._device))
            self._fused = {each.character: self._to_resampler(each) for each in self._conditionings}
            yield

    def check_device(self, device: torch.device) -> None:
        """Raise ``RuntimeError`` if FLUX is called on another device than the MODEL's, where the characters are."""
        if not same_device(device, self._device):
            raise RuntimeError(
                f"InstantCharacter: FLUX runs on {device} too, and the character is on {self._device} alone: remove "
                "the node that spreads the prompts over several GPUs (MultiGPU CFG Split), or set KSampler's cfg to 1"
            )

    def load_attention(self, latents_shape: Sequence[int], compiled: bool) -> None:
        """Load the weights of the attention, if they are not; see :meth:`HostedAttention.on_device`.

        Args:
            latents_shape: of the pictures that FLUX is called with.
            compiled: whether FLUX is compiled: weights that come block by block would break its graph.
        """
        if self._attention_loaded:
            return
        self._attention_loaded = True
        room = math.inf if compiled else free_memory_beside(self._model, latents_shape)
        for attention in self._attention.values():
            self._weights.enter_context(attention.on_device(room / len(self._attention)))

    @property
    def graph_name(self) -> str:
        """A name for all that a graph of FLUX with these characters depends on, beside the pictures' size."""
        adapters = list(self._attention)
        parts = [
            (
                adapters.index(each.adapter),
                self._attention[each.adapter].resident,
                None if each.mask is None else len(each.mask),
                self._windows[each] != EVERY_TIMESTEP,
                self._strengths[each].changes,
            )
            for each in self._conditionings
        ]
        return f"instantcharacter {parts}"

    @torch.compiler.disable
    def step(self, flux: Any, latents: Tensor, timestep: Tensor, options: dict[str, Any]) -> StepState:
        """The state of one call of FLUX.

        Args:
            flux: ComfyUI's ``Flux``.
            latents: [B, C, h, w].
            timestep: [B] in [0, 1], all equal.
            options: ComfyUI's transformer options.
        """
        timestep = to_adapter(timestep)
        if self._conditionings:
            self._note_timesteps(timestep)
        now = timestep[:1]
        rows, columns = (-(-side // flux.patch_size) for side in latents.shape[-2:])
        tokens: dict[Character, Tensor] = {}
        subjects: dict[HostedAdapter, list[Subject]] = {}
        for i, each in enumerate(self._conditionings):
            if each.character not in tokens:
                tokens[each.character] = self._resample(each, now)
            mask = self.regions.token_mask(i, latents.shape, (rows, columns), options.get("uuids", ()))
            double, single = self._strengths[each].at(now)
            subject = Subject(tokens[each.character], double, self._in_window(each, now, mask), single)
            subjects.setdefault(each.adapter, []).append(subject)
        adapters = [
            AdapterState(each, self._attention[adapter], self.key_scales(flux, adapter))
            for adapter, each in subjects.items()
        ]
        return StepState(adapters, rows * columns, len(flux.double_blocks))

    def key_scales(self, flux: Any, adapter: HostedAdapter) -> list[Tensor]:
        """The scale of the adapter's keys in each block, [head_dim], for FLUX as it is loaded, LoRAs included.

        FLUX's own scale is the output of its query norm for a vector of ones, whatever type its weights have.
        """
        if adapter not in self._key_scales:
            ones = torch.ones(flux.hidden_size // flux.num_heads, device=self._device, dtype=self._dtype)
            scales = torch.stack([norm(ones) for norm in query_norms(flux)]).float().cpu()
            check_query_scale(scales)
            stacked = torch.stack(adapter.key_scales(scales)).to(self._device, self._dtype)
            self._key_scales[adapter] = list(stacked)
        return self._key_scales[adapter]

    def check_blocks(self, step: StepState, may_be_skipped: bool) -> None:
        """Check, after the first call of FLUX with a character, that FLUX's blocks called the patches.

        Args:
            step: the state of the call.
            may_be_skipped: whether another node may have skipped the call, as EasyCache does.

        Raises:
            RuntimeError: fewer than half of the blocks did. If a few did not, as when a node leaves them out, a warning
                is logged.
        """
        called = len(step.blocks_called)
        self._any_block_called |= bool(called)
        if self._blocks_checked or not step.adapters or (may_be_skipped and not called):
            return
        self._blocks_checked = True
        blocks = len(step.adapters[0].key_scales)
        if 2 * called < blocks:
            raise RuntimeError(NOT_APPLIED.format(f"only {called} of its {blocks} blocks called"))
        if called < blocks:
            logger.warning(
                "InstantCharacter: another node leaves out %d of FLUX's %d blocks; the others apply the character",
                blocks - called,
                blocks,
            )

    def check_applied(self) -> None:
        """Check the whole sampling, after it.

        Raises:
            RuntimeError: there were steps, and none of FLUX's blocks called the patches.
            ValueError: the pictures of a batch were at different timesteps.
        """
        if not self._conditionings or self._steps < 1:
            return
        if not self._any_block_called:
            raise RuntimeError(NOT_APPLIED.format("none of its blocks called"))
        if self._one_timestep is not None and not self._one_timestep:
            raise ValueError("InstantCharacter: the pictures of a batch are at different timesteps; sample them apart")

    def _note_timesteps(self, timestep: Tensor) -> None:
        """Compare the pictures' timesteps on the device; :meth:`check_applied` reads the result."""
        one = (timestep == timestep[0]).all()
        self._one_timestep = one if self._one_timestep is None else self._one_timestep & one

    def _to_resampler(self, conditioning: CharacterConditioning) -> Tensor:
        """A character's features, for the resampler on this device."""
        dtype = conditioning.adapter.adapter.projector.resampler.proj_in.weight.dtype
        return conditioning.character.fused.to(self._device, dtype)

    @torch.no_grad()
    def _resample(self, conditioning: CharacterConditioning, timestep: Tensor) -> Tensor:
        projector, fused = conditioning.adapter.adapter.projector, self._fused[conditioning.character]
        return projector.resample(fused, timestep, folded=True).to(self._dtype)

    def _in_window(self, conditioning: CharacterConditioning, timestep: Tensor, mask: Tensor | None) -> Tensor | None:
        """A conditioning's mask at a timestep: zeros outside of its window."""
        low, high = self._windows[conditioning]
        if (low, high) == EVERY_TIMESTEP:
            return mask
        active = ((low <= timestep) & (timestep <= high)).to(self._dtype).view(1, 1, 1)
        return active if mask is None else mask * active


@dataclass(frozen=True)
class AdapterState:
    """The characters of one adapter in one call of FLUX.

    Attributes:
        subjects: the characters.
        attention: the adapter's attention of each block.
        key_scales: the scale of the adapter's keys in each block.
    """

    subjects: list[Subject]
    attention: HostedAttention
    key_scales: list[Tensor]


@dataclass(frozen=True)
class StepState:
    """One call of FLUX.

    Attributes:
        adapters: the adapters with an active character.
        image_tokens: the number of the picture's own tokens; Kontext's references follow them.
        double_blocks: the number of FLUX's double blocks, which come first.
        blocks_called: the blocks that have called the patches.
    """

    adapters: list[AdapterState]
    image_tokens: int
    double_blocks: int
    blocks_called: set[int] = field(default_factory=set)

    def prefetch(self, extra_options: dict[str, Any]) -> None:
        """Have the weights for the next block come: before FLUX's attention in this one, while FLUX's own rest."""
        block, _ = block_and_image_start(extra_options, self.double_blocks)
        for adapter in self.adapters:
            adapter.attention.prefetch(block)

    def add(self, attn: Tensor, query: Tensor, extra_options: dict[str, Any]) -> None:
        """Add the characters to ``attn`` [B, tokens, H·D], for the image tokens of ``query`` [B, H, tokens, D]."""
        block, start = block_and_image_start(extra_options, self.double_blocks)
        image = slice(start, start + self.image_tokens)
        self.blocks_called.add(block)
        attend, single = partial(_attend, extra_options), block >= self.double_blocks
        for adapter in self.adapters:
            hidden, image_query = attn[:, image], query[:, :, image].transpose(1, 2)
            attention, key_scale = adapter.attention.load(block), adapter.key_scales[block]
            add_subjects(hidden, image_query, adapter.subjects, attention, key_scale, attend, single)


def _attend(options: dict[str, Any], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention kernel that ComfyUI is set to, on [B, S, H, D]."""
    by_head = (x.transpose(1, 2) for x in (query, key, value))
    settings = {"skip_reshape": True, "skip_output_reshape": True, "transformer_options": options}
    return optimized_attention(*by_head, query.shape[2], **settings).transpose(1, 2)


def _timestep_window(sampling: Any, conditioning: CharacterConditioning) -> tuple[float, float]:
    """The lowest and highest timestep at which a character is active."""
    low, high = timesteps_at(sampling, (conditioning.end, conditioning.start)).tolist()
    lowest, highest = EVERY_TIMESTEP
    return (low if conditioning.end < 1 else lowest, high if conditioning.start > 0 else highest)
