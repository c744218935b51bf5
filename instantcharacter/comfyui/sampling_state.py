"""The state of one sampling with characters, and of each call of FLUX in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..model.attention import check_query_scale
from ..model.character import Character
from ..model.conditioning import Subject, add_subjects
from .conditioning import CharacterConditioning
from .hosting import HostedAdapter
from .internals import block_and_image_start, compute_dtype, query_norms
from .regions import Regions

logger = logging.getLogger(__name__)

NOT_APPLIED = (
    "InstantCharacter: FLUX ran, but {} the character's patches, so the character is not in the picture. "
    "Another node replaces FLUX's attention (TeaCache or another speed-up node, Nunchaku, an older IP-Adapter pack): "
    "remove it. ComfyUI's own EasyCache and LazyCache work."
)


class SamplingState:
    """The tokens, masks and scales of one sampling, each computed once.

    Args:
        conditionings: the characters.
        model: the MODEL that is sampled.
        noise: [B, C, h, w].
        sigmas: the sampler's schedule.

    Attributes:
        attention: each adapter's attention as a ``ModelPatcher``, for ComfyUI to load with the MODEL.
        regions: the characters' masks.
    """

    def __init__(
        self, conditionings: Sequence[CharacterConditioning], model: Any, noise: Tensor, sigmas: Tensor
    ) -> None:
        self._conditionings = conditionings
        self._device: torch.device = model.load_device
        self._dtype = compute_dtype(model)
        self.attention = {each.adapter: each.adapter.attention(self._dtype) for each in conditionings}
        masks = [each.mask for each in conditionings]
        self.regions = Regions(masks, noise.shape[-2:], self._device, self._dtype)
        sampling = model.get_model_object("model_sampling")
        self._windows = [_timestep_window(sampling, each) for each in conditionings]
        self._tokens = self._schedule_tokens(_timesteps(sampling.timestep(sigmas[:-1].cpu())))
        self._key_scales: dict[HostedAdapter, list[Tensor]] = {}
        self._any_active = False
        self._any_block_called = False
        self._blocks_checked = False

    def step(self, flux: Any, latents: Tensor, timestep: Tensor, options: dict[str, Any]) -> StepState:
        """The state of one call of FLUX.

        Args:
            flux: ComfyUI's ``Flux``.
            latents: [B, C, h, w].
            timestep: [B] in [0, 1], all equal.
            options: ComfyUI's transformer options.
        """
        now, *others = _timesteps(timestep)
        if others:
            raise ValueError("InstantCharacter: the pictures of a batch are at different timesteps; sample them apart")
        rows, columns = (-(-side // flux.patch_size) for side in latents.shape[-2:])
        subjects: dict[HostedAdapter, list[Subject]] = {}
        for i, (conditioning, (low, high)) in enumerate(zip(self._conditionings, self._windows)):
            if low <= now <= high:
                mask = self.regions.token_mask(i, latents.shape, (rows, columns), options.get("uuids", ()))
                subject = Subject(self._tokens_at(i, now), torch.tensor(conditioning.scale), mask)
                subjects.setdefault(conditioning.adapter, []).append(subject)
        self._any_active |= bool(subjects)
        adapters = [
            AdapterState(each, self.attention[adapter].model, self.key_scales(flux, adapter))
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
            self._key_scales[adapter] = [scale.to(self._device, self._dtype) for scale in adapter.key_scales(scales)]
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
        """After the sampling, raise ``RuntimeError`` if a character was active in a step, and no block called it."""
        if self._any_active and not self._any_block_called:
            raise RuntimeError(NOT_APPLIED.format("none of its blocks called"))

    def _schedule_tokens(self, timesteps: list[float]) -> list[dict[float, Tensor]]:
        """Each conditioning's tokens by timestep. A character of several conditionings is resampled once."""
        active: dict[tuple[HostedAdapter, Character], set[float]] = {}
        for each, (low, high) in zip(self._conditionings, self._windows):
            active.setdefault((each.adapter, each.character), set()).update(t for t in timesteps if low <= t <= high)
        tokens = {key: self._resample(*key, [t for t in timesteps if t in when]) for key, when in active.items()}
        return [tokens[each.adapter, each.character] for each in self._conditionings]

    def _resample(self, adapter: HostedAdapter, character: Character, timesteps: list[float]) -> dict[float, Tensor]:
        request = (character, timesteps, self._device, self._dtype)
        with adapter.resampling() if adapter.tokens.missing(*request) else nullcontext():
            return dict(zip(timesteps, adapter.tokens.tokens(*request)))

    def _tokens_at(self, i: int, timestep: float) -> Tensor:
        """A conditioning's tokens at a timestep. Some samplers use timesteps between those of the schedule."""
        if timestep not in self._tokens[i]:
            each = self._conditionings[i]
            (tokens,) = each.adapter.tokens.resample(each.character, [timestep], self._device, self._dtype)
            self._tokens[i][timestep] = tokens
        return self._tokens[i][timestep]


@dataclass(frozen=True)
class AdapterState:
    """The characters of one adapter in one call of FLUX.

    Attributes:
        subjects: the characters.
        attention: the adapter's attention of each block.
        key_scales: the scale of the adapter's keys in each block.
    """

    subjects: list[Subject]
    attention: Any
    key_scales: list[Any]


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

    def add(self, attn: Tensor, query: Tensor, extra_options: dict[str, Any]) -> None:
        """Add the characters to ``attn`` [B, tokens, H·D], for the image tokens of ``query`` [B, H, tokens, D]."""
        block, start = block_and_image_start(extra_options, self.double_blocks)
        image = slice(start, start + self.image_tokens)
        self.blocks_called.add(block)
        attend = partial(_attend, extra_options)
        for adapter in self.adapters:
            hidden_states, image_query = attn[:, image], query[:, :, image].transpose(1, 2)
            attention, key_scale = adapter.attention[block], adapter.key_scales[block]
            add_subjects(hidden_states, image_query, adapter.subjects, attention, key_scale, attend)


def _attend(options: dict[str, Any], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention kernel that ComfyUI is set to, on [B, S, H, D]."""
    heads = query.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = optimized_attention(query, key, value, heads, skip_reshape=True, transformer_options=options)
    return out.unflatten(-1, (heads, -1))


def _timesteps(timestep: Tensor) -> list[float]:
    """The distinct timesteps of a tensor, from FLUX's range [0, 1] to the adapter's, [0, 1000]."""
    return list(dict.fromkeys((timestep.float() * 1000).tolist()))


def _timestep_window(sampling: Any, conditioning: CharacterConditioning) -> tuple[float, float]:
    """The lowest and highest timestep at which a character is active."""
    percents = (conditioning.end, conditioning.start)
    low, high = (_timesteps(sampling.timestep(torch.tensor([sampling.percent_to_sigma(p)])))[0] for p in percents)
    return (low if conditioning.end < 1 else 0.0, high if conditioning.start > 0 else float("inf"))
