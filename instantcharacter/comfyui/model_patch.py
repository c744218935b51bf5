"""Characters on a ComfyUI MODEL, through ComfyUI's own patch points.

A patched MODEL carries its conditionings: which characters, how strongly, when and where. At the start of sampling they
become a :class:`_Run`, which holds the tokens of the whole schedule; at each step the run gives a :class:`_Step`; in
each block two patches remember the query and add to the attention. Run and step travel in ComfyUI's
``transformer_options``, so nothing outlives a sampling, and no ``forward`` is replaced.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.ldm.flux.model
import comfyui_version
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..flux.variants import variant
from ..model.attention import check_query_scale
from ..model.character import Character
from ..model.conditioning import Subject, add_subjects, mask_to_tokens
from .hosting import HostedAdapter

logger = logging.getLogger(__name__)

KEY = "instantcharacter"
"""Under which everything of this pack is found on a MODEL."""
REQUIRED_COMFYUI = (0, 17)
NOT_DRAWN = (
    "InstantCharacter: FLUX was called, but {} the character's patches, so the character is not in the picture. "
    "Another node replaces FLUX's attention (TeaCache or another speed-up node, Nunchaku, an older IP-Adapter pack): "
    "take it out. ComfyUI's own EasyCache and LazyCache work."
)


@dataclass(frozen=True, eq=False)
class CharacterConditioning:
    """One character's part in a picture.

    Attributes:
        adapter: the adapter that made it.
        character: who.
        scale: how strongly it is drawn.
        start: fraction of the denoising, as ComfyUI's samplers count it, before which it is left out, 0 to 1.
        end: fraction after which it is left out, 0 to 1.
        mask: [H, W] or [B, H, W], 1 where in the picture it may be; everywhere if not given.
    """

    adapter: HostedAdapter
    character: Character
    scale: float
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None


def apply(model: Any, part: CharacterConditioning) -> Any:
    """A clone of a MODEL that draws a character, beside those it draws already.

    Args:
        model: a ComfyUI ``ModelPatcher`` of FLUX.1, in any storage type, with any other patches.
        part: who, how strongly, when and where. At scale 0, or with no time between start and end, the clone is the
            MODEL as it was.

    Raises:
        RuntimeError: a ComfyUI older than its patch points.
        ValueError: not FLUX.1, a FLUX of another size than the adapter's, a character of another adapter, a start
            past the end, or an empty mask.
    """
    _check_comfyui()
    _check_flux(model.model.diffusion_model, part.adapter)
    part.character.check_made_by(part.adapter.fingerprint)
    if not 0 <= part.start <= part.end <= 1:
        raise ValueError(f"start {part.start} and end {part.end}; expected 0 ≤ start ≤ end ≤ 1")
    if part.mask is not None:
        mask_to_tokens(part.mask, 1, 1)
    patched = model.clone()
    if part.scale == 0 or part.start == part.end:
        return patched
    earlier: tuple[CharacterConditioning, ...] = patched.get_attachment(KEY) or ()
    conditionings = (*earlier, part)
    patched.set_attachments(KEY, conditionings)
    if not earlier:
        patched.set_model_attn1_patch(_remember_query)
        patched.set_model_attn1_output_patch(_add_characters)
    for point, wrapper in (
        (WrappersMP.OUTER_SAMPLE, partial(_sample, conditionings)),
        (WrappersMP.CALC_COND_BATCH, _note_areas),
        (WrappersMP.DIFFUSION_MODEL, _draw_step),
    ):
        patched.remove_wrappers_with_key(point, KEY)
        patched.add_wrapper_with_key(point, KEY, wrapper)
    return patched


def _check_comfyui() -> None:
    if tuple(int(number) for number in comfyui_version.__version__.split(".")[:2]) < REQUIRED_COMFYUI:
        raise RuntimeError(
            f"InstantCharacter Apply needs ComfyUI {'.'.join(map(str, REQUIRED_COMFYUI))} or newer, this is "
            f"{comfyui_version.__version__}: update ComfyUI, or use InstantCharacter Sampler"
        )


def _check_flux(flux: Any, adapter: HostedAdapter) -> None:
    kind = variant({name: weight.shape for name, weight in flux.named_parameters()})
    if kind and not kind.native:
        raise ValueError(f"this MODEL is {kind.name}: {kind.advice}")
    if not isinstance(flux, comfy.ldm.flux.model.Flux) or flux.params.global_modulation:
        raise ValueError(
            f"this MODEL is {type(flux).__name__}; InstantCharacter needs FLUX.1 (dev, schnell, Krea, Kontext) "
            "from a loader that builds ComfyUI's own, such as Load Diffusion Model or ComfyUI-GGUF's"
        )
    adapter.adapter.check_fits(flux.hidden_size, flux.num_heads, len(list(_query_norms(flux))))


def _query_norms(flux: Any) -> Iterator[torch.nn.Module]:
    """The query norm of every block's image stream, in the adapter's order."""
    yield from (block.img_attn.norm.query_norm for block in flux.double_blocks)
    yield from (block.norm.query_norm for block in flux.single_blocks)


def _sample(
    conditionings: tuple[CharacterConditioning, ...],
    executor: Any,
    noise: Tensor,
    latent_image: Any,
    sampler: Any,
    sigmas: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around the whole sampling, before ComfyUI loads the MODEL and what the conditionings need beside it."""
    guider = executor.class_obj
    run = _Run(conditionings, guider.model_patcher, noise, sigmas)
    for i, blocks in enumerate(run.attention.values()):
        guider.model_patcher.set_additional_models(f"{KEY} {i}", [blocks])
    guider.model_options["transformer_options"][KEY] = run
    out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    run.check_drawn()
    return out


def _note_areas(executor: Any, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, options: dict[str, Any]) -> Any:
    """Around the prompts of a step, which may be for areas of the picture: the run keeps where each is."""
    run = options.get("transformer_options", {}).get(KEY)
    if isinstance(run, _Run):
        run.areas = {cond["uuid"]: cond.get("area") for prompts in conds for cond in prompts or () if "uuid" in cond}
    return executor(model, conds, x_in, timestep, options)


def _draw_step(executor: Any, latents: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Around each call of FLUX."""
    at = list(inspect.signature(executor.original).parameters).index("transformer_options") - 2
    options = args[at] if at < len(args) else kwargs["transformer_options"]
    if not isinstance(options.get(KEY), _Run):
        raise RuntimeError(
            "InstantCharacter: this sampler calls the MODEL without ComfyUI's own sampling around it, so the schedule "
            "is not known. Use KSampler, SamplerCustom or SamplerCustomAdvanced."
        )
    step = options[KEY].step(executor.class_obj, latents, timestep, options)
    options = {**options, KEY: step}
    if at < len(args):
        args = (*args[:at], options, *args[at + 1 :])
    else:
        kwargs["transformer_options"] = options
    out = executor(latents, timestep, *args, **kwargs)
    step.run.note(step, may_be_skipped=executor.idx + 1 < len(executor.wrappers))  # by EasyCache, inside this one
    return out


def _remember_query(q: Tensor, k: Tensor, v: Tensor, *_: Any, extra_options: dict[str, Any], **__: Any) -> dict:
    """ComfyUI's attention patch: keeps this block's normalised query, before RoPE, for after the attention."""
    extra_options[f"{KEY} query"] = q
    return {}


def _add_characters(attn: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """ComfyUI's attention output patch: adds the characters to the picture's own tokens."""
    step = extra_options.get(KEY)
    if isinstance(step, _Step) and step.drawn:
        step.add(attn, extra_options.pop(f"{KEY} query"), extra_options)
    return attn


class _Run:
    """One sampling: what is computed once for it."""

    def __init__(
        self, conditionings: tuple[CharacterConditioning, ...], model: Any, noise: Tensor, sigmas: Tensor
    ) -> None:
        self.conditionings = conditionings
        self.picture = noise.shape[-2:]
        self.areas: dict[Any, Any] = {}
        self.looked = False
        self.due = False
        self.checked = False
        self._device: torch.device = model.load_device
        self._dtype = _compute_dtype(model)
        self.attention = {part.adapter: part.adapter.attention(self._dtype) for part in conditionings}
        sampling = model.get_model_object("model_sampling")
        self._windows = [_window(sampling, part) for part in conditionings]
        timesteps = _timesteps(sampling.timestep(sigmas[:-1].cpu()))
        self._tokens = self._schedule(timesteps)
        self._regions: dict[tuple, Tensor] = {}
        self._scales: dict[HostedAdapter, list[Tensor]] = {}

    def _schedule(self, timesteps: list[float]) -> list[dict[float, Tensor]]:
        """Each part's tokens at each timestep: of a character with several parts, computed once for all of them."""
        due: dict[tuple[HostedAdapter, Character], set[float]] = {}
        for part, (low, high) in zip(self.conditionings, self._windows):
            due.setdefault((part.adapter, part.character), set()).update(t for t in timesteps if low <= t <= high)
        made = {who: self._resample(*who, [t for t in timesteps if t in when]) for who, when in due.items()}
        return [made[part.adapter, part.character] for part in self.conditionings]

    def _resample(self, adapter: HostedAdapter, character: Character, timesteps: list[float]) -> dict[float, Tensor]:
        request = (character, timesteps, self._device, self._dtype)
        with adapter.resampling() if adapter.tokens.missing(*request) else nullcontext():
            return dict(zip(timesteps, adapter.tokens.tokens(*request)))

    def step(self, flux: Any, latents: Tensor, timestep: Tensor, options: dict[str, Any]) -> _Step:
        """What is drawn in a call of FLUX with [B, C, h, w] latents at one timestep, [B] in [0, 1]."""
        now, *others = _timesteps(timestep)
        if others:
            raise ValueError("InstantCharacter: the pictures of a batch are at different timesteps; sample them apart")
        rows, columns = (-(-side // flux.patch_size) for side in latents.shape[-2:])
        drawn: dict[HostedAdapter, list[Subject]] = {}
        for i, (part, (low, high)) in enumerate(zip(self.conditionings, self._windows)):
            if low <= now <= high:
                where = self._region(i, latents, (rows, columns), options.get("uuids", ()))
                subject = Subject(self._at(i, now), torch.tensor(part.scale), where)
                drawn.setdefault(part.adapter, []).append(subject)
        self.due |= bool(drawn)
        blocks = [
            _Drawn(subjects, self.attention[adapter].model, self._key_scales(flux, adapter))
            for adapter, subjects in drawn.items()
        ]
        return _Step(self, blocks, rows * columns, len(flux.double_blocks))

    def note(self, step: _Step, may_be_skipped: bool) -> None:
        """After a call of FLUX: count the blocks that looked at the characters, the first time that they had to.

        Raises:
            RuntimeError: fewer than half of them. A few that another node leaves out on purpose are a warning.
        """
        self.looked |= bool(step.looked)
        if self.checked or not step.drawn or (may_be_skipped and not step.looked):
            return
        self.checked = True
        looked, blocks = len(step.looked), len(step.drawn[0].key_scales)
        if 2 * looked < blocks:
            raise RuntimeError(NOT_DRAWN.format(f"only {looked} of its {blocks} blocks called"))
        if looked < blocks:
            logger.warning(
                "InstantCharacter: another node leaves out %d of FLUX's %d blocks; the others draw the character",
                blocks - looked,
                blocks,
            )

    def check_drawn(self) -> None:
        """After the sampling: raise ``RuntimeError`` if a character was due in some step, and no block looked."""
        if self.due and not self.looked:
            raise RuntimeError(NOT_DRAWN.format("none of its blocks called"))

    def _at(self, i: int, timestep: float) -> Tensor:
        """A character's tokens now; samplers may look between the schedule's timesteps."""
        if timestep not in self._tokens[i]:
            part = self.conditionings[i]
            (tokens,) = part.adapter.tokens.resample(part.character, [timestep], self._device, self._dtype)
            self._tokens[i][timestep] = tokens
        return self._tokens[i][timestep]

    def _region(self, i: int, latents: Tensor, grid: tuple[int, int], prompts: Sequence[Any]) -> Tensor | None:
        """Where a part is, for each picture of each prompt in the latents; a prompt may be for an area."""
        mask = self.conditionings[i].mask
        if mask is None:
            return None
        areas = [self.areas.get(prompt) for prompt in prompts] or [None]
        if not any(areas) and latents.shape[-2:] != self.picture:
            raise ValueError(
                "InstantCharacter: a mask on Apply needs latents of the whole picture, and another node draws a part "
                "of it. Take that node out, or the mask."
            )
        masks, pictures = 1 if mask.ndim == 2 else len(mask), len(latents) // len(areas)
        if pictures % masks:
            raise ValueError(f"InstantCharacter: {masks} masks on Apply for a batch of {pictures}; give one")
        regions = []
        for area in areas:
            key = (i, grid, None if area is None else tuple(area))
            if key not in self._regions:
                cut = mask if area is None else _cut(mask, self.picture, area)
                self._regions[key] = mask_to_tokens(cut, *grid, may_be_empty=area is not None).to(
                    self._device, self._dtype
                )
            regions.append(self._regions[key].expand(pictures if masks == 1 else -1, -1, -1))
        repeats = 1 if masks == 1 else pictures // masks
        return torch.cat([each.repeat(repeats, 1, 1) for each in regions])

    def _key_scales(self, flux: Any, adapter: HostedAdapter) -> list[Tensor]:
        """The scale on the adapter's keys in each block, for FLUX as it is loaded now, LoRAs and all.

        FLUX's own scale is what its query norm makes of ones, whatever its weights are stored as.
        """
        if adapter not in self._scales:
            ones = torch.ones(flux.hidden_size // flux.num_heads, device=self._device, dtype=self._dtype)
            scales = torch.stack([norm(ones) for norm in _query_norms(flux)]).float().cpu()
            check_query_scale(scales)
            self._scales[adapter] = [scale.to(self._device, self._dtype) for scale in adapter.key_scales(scales)]
        return self._scales[adapter]


@dataclass(frozen=True)
class _Drawn:
    """One adapter's characters in one step."""

    subjects: list[Subject]
    attention: Any
    key_scales: list[Tensor]


@dataclass(frozen=True)
class _Step:
    """One call of FLUX."""

    run: _Run
    drawn: list[_Drawn]
    picture_tokens: int
    double_blocks: int
    looked: set[int] = field(default_factory=set)

    def add(self, attn: Tensor, query: Tensor, extra_options: dict[str, Any]) -> None:
        """Add to ``attn`` [B, tokens, H·D] what the picture's tokens in ``query`` [B, H, tokens, D] see."""
        block = extra_options["block_index"] + (self.double_blocks if extra_options["block_type"] == "single" else 0)
        first = extra_options["img_slice"][0]
        picture = slice(first, first + self.picture_tokens)
        self.looked.add(block)
        for drawn in self.drawn:
            hidden, rows = attn[:, picture], query[:, :, picture].transpose(1, 2)
            attend = partial(_attend, extra_options)
            add_subjects(hidden, rows, drawn.subjects, drawn.attention[block], drawn.key_scales[block], attend)


def _attend(options: dict[str, Any], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention that the user chose for ComfyUI, on [B, S, H, D]."""
    heads = query.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    seen = optimized_attention(query, key, value, heads, skip_reshape=True, transformer_options=options)
    return seen.unflatten(-1, (heads, -1))


def _compute_dtype(model: Any) -> torch.dtype:
    """The type that a MODEL computes in, a node's for it (Model Compute Dtype) included, which is not on it yet."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def _cut(mask: Tensor, picture: Sequence[int], area: Sequence[int]) -> Tensor:
    """A mask [..., H, W] at the size of the latents, and of it an area: height, width, and from where, in latents."""
    height, width, top, left = area
    masks = mask.float().reshape(-1, 1, *mask.shape[-2:])
    masks = F.interpolate(masks, tuple(picture), mode="area")[..., top : top + height, left : left + width]
    return masks.reshape(*mask.shape[:-2], *masks.shape[-2:])


def _timesteps(timestep: Tensor) -> list[float]:
    """FLUX's timesteps in [0, 1], each once, as the adapter counts them, in [0, 1000]."""
    return list(dict.fromkeys((timestep.float() * 1000).tolist()))


def _window(sampling: Any, part: CharacterConditioning) -> tuple[float, float]:
    """The lowest and the highest timestep in which a character is drawn."""
    percents = (part.end, part.start)
    low, high = (_timesteps(sampling.timestep(torch.tensor([sampling.percent_to_sigma(p)])))[0] for p in percents)
    return (low if part.end < 1 else 0.0, high if part.start > 0 else float("inf"))
