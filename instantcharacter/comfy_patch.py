"""Characters on a ComfyUI MODEL, through ComfyUI's own patch points.

A patched MODEL carries its cast: who is drawn, how strongly, when and where. At the start of sampling the cast becomes
a :class:`_Run`, which holds the tokens of the whole schedule; at each step the run gives a :class:`_Step`; in each
block two patches remember the query and add to the attention. Run and step travel in ComfyUI's ``transformer_options``,
so nothing outlives a sampling, and no ``forward`` is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.ldm.flux.model
import comfyui_version
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .attention import Subject, add_subjects, region
from .character import Character
from .comfy_host import HostedAdapter, load, release

KEY = "instantcharacter"
"""Under which everything of this pack is found on a MODEL."""
REQUIRED_COMFYUI = (0, 17)


@dataclass(frozen=True, eq=False)
class Part:
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


def apply(model: Any, part: Part) -> Any:
    """A clone of a MODEL that draws a character, beside those it draws already.

    Args:
        model: a ComfyUI ``ModelPatcher`` of FLUX.1, in any storage type, with any other patches.
        part: who, how strongly, when and where. At scale 0 the clone is the MODEL as it was.

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
        region(part.mask, 1, 1)
    patched = model.clone()
    if part.scale == 0:
        return patched
    earlier: tuple[Part, ...] = patched.get_attachment(KEY) or ()
    cast = (*earlier, part)
    patched.set_attachments(KEY, cast)
    if not earlier:
        patched.set_model_attn1_patch(_remember_query)
        patched.set_model_attn1_output_patch(_add_characters)
    for point, wrapper in (
        (WrappersMP.OUTER_SAMPLE, partial(_sample, cast)),
        (WrappersMP.DIFFUSION_MODEL, _draw_step),
    ):
        patched.remove_wrappers_with_key(point, KEY)
        patched.add_wrapper_with_key(point, KEY, wrapper)
    dtype = model.model.get_dtype_inference()
    patched.set_additional_models(f"{KEY} {id(part.adapter)}", [part.adapter.attention(dtype)])
    return patched


def _check_comfyui() -> None:
    if tuple(int(number) for number in comfyui_version.__version__.split(".")[:2]) < REQUIRED_COMFYUI:
        raise RuntimeError(
            f"InstantCharacter Apply needs ComfyUI {'.'.join(map(str, REQUIRED_COMFYUI))} or newer, this is "
            f"{comfyui_version.__version__}: update ComfyUI, or use InstantCharacter Sampler"
        )


def _check_flux(flux: Any, adapter: HostedAdapter) -> None:
    if not isinstance(flux, comfy.ldm.flux.model.Flux) or flux.params.global_modulation:
        raise ValueError(
            f"this MODEL is {type(flux).__name__}; InstantCharacter needs FLUX.1 (dev, schnell, Krea, Kontext) "
            "from a loader that builds ComfyUI's own, such as Load Diffusion Model or ComfyUI-GGUF's"
        )
    config = adapter.config
    for what, found, expected in (
        ("width", flux.hidden_size, config.attention_dim),
        ("number of attention heads", flux.num_heads, config.attention_heads),
        ("number of blocks", len(list(_query_norms(flux))), config.num_attention_blocks),
    ):
        if found != expected:
            raise ValueError(
                f"this MODEL's {what} is {found}, the adapter is made for {expected}: use FLUX.1, whole, with it"
            )


def _query_norms(flux: Any) -> Iterator[torch.nn.Module]:
    """The query norm of every block's image stream, in the adapter's order."""
    yield from (block.img_attn.norm.query_norm for block in flux.double_blocks)
    yield from (block.norm.query_norm for block in flux.single_blocks)


def _sample(
    cast: tuple[Part, ...], executor: Any, noise: Tensor, latent_image: Any, sampler: Any, sigmas: Tensor, *args: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """Around the whole sampling, before ComfyUI loads the MODEL."""
    guider = executor.class_obj
    run = _Run(cast, guider.model_patcher, noise, sigmas)
    guider.model_options["transformer_options"][KEY] = run
    out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    run.check_drawn()
    return out


def _draw_step(executor: Any, latents: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Around each call of FLUX."""
    at = list(inspect.signature(executor.original).parameters).index("transformer_options") - 2
    options = args[at] if at < len(args) else kwargs["transformer_options"]
    if not isinstance(options.get(KEY), _Run):
        raise RuntimeError(
            "InstantCharacter: this sampler calls the MODEL without ComfyUI's own sampling around it, so the schedule "
            "is not known. Use KSampler, SamplerCustom or SamplerCustomAdvanced."
        )
    step = options[KEY].step(executor.class_obj, latents, timestep)
    options = {**options, KEY: step}
    if at < len(args):
        args = (*args[:at], options, *args[at + 1 :])
    else:
        kwargs["transformer_options"] = options
    return executor(latents, timestep, *args, **kwargs)


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

    def __init__(self, cast: tuple[Part, ...], model: Any, noise: Tensor, sigmas: Tensor) -> None:
        self.cast = cast
        self.picture = noise.shape[-2:]
        self.added = False
        self.due = False
        self._device: torch.device = model.load_device
        self._dtype: torch.dtype = model.model.get_dtype_inference()
        sampling = model.get_model_object("model_sampling")
        self._windows = [_window(sampling, part) for part in cast]
        timesteps = _timesteps(sampling.timestep(sigmas[:-1].cpu()))
        self._tokens = [
            self._schedule(part, [t for t in timesteps if low <= t <= high])
            for part, (low, high) in zip(cast, self._windows)
        ]
        self._regions: dict[tuple[int, int, int], Tensor] = {}
        self._scales: dict[HostedAdapter, list[Tensor]] = {}

    def _schedule(self, part: Part, timesteps: list[float]) -> dict[float, Tensor]:
        """The character's tokens at each timestep; the resampler is gone from the GPU afterwards."""
        what = (part.adapter.projector, timesteps, self._device, self._dtype)
        if not part.character.missing(*what):
            return dict(zip(timesteps, part.character.tokens(*what)))
        load(part.adapter.resampler)
        try:
            return dict(zip(timesteps, part.character.tokens(*what)))
        finally:
            release(part.adapter.resampler)

    def step(self, flux: Any, latents: Tensor, timestep: Tensor) -> _Step:
        """What is drawn in a call of FLUX with [B, C, h, w] latents at one timestep, [B] in [0, 1]."""
        now, *others = _timesteps(timestep)
        if others:
            raise ValueError("InstantCharacter: the pictures of a batch are at different timesteps; sample them apart")
        rows, columns = (-(-side // flux.patch_size) for side in latents.shape[-2:])
        drawn: dict[HostedAdapter, list[Subject]] = {}
        for i, (part, (low, high)) in enumerate(zip(self.cast, self._windows)):
            if low <= now <= high:
                subject = Subject(self._at(i, now), torch.tensor(part.scale), self._region(i, latents, rows, columns))
                drawn.setdefault(part.adapter, []).append(subject)
        self.due |= bool(drawn)
        blocks = [
            _Drawn(subjects, adapter.attention(self._dtype).model, self._key_scales(flux, adapter))
            for adapter, subjects in drawn.items()
        ]
        return _Step(self, blocks, rows * columns, len(flux.double_blocks))

    def check_drawn(self) -> None:
        """Raise ``RuntimeError`` if a character was due in some step, and no block called the patches."""
        if self.due and not self.added:
            raise RuntimeError(
                "InstantCharacter: FLUX was sampled, but none of its blocks called the character's patches, so the "
                "character is not in the picture. Another node replaces FLUX's attention (a cache or speed-up node, "
                "Nunchaku, an older IP-Adapter pack): take it out, or put it before Apply and try again."
            )

    def _at(self, i: int, timestep: float) -> Tensor:
        """A character's tokens now; samplers may look between the schedule's timesteps."""
        if timestep not in self._tokens[i]:
            part = self.cast[i]
            (tokens,) = part.character.resample(part.adapter.projector, [timestep], self._device, self._dtype)
            self._tokens[i][timestep] = tokens
        return self._tokens[i][timestep]

    def _region(self, i: int, latents: Tensor, rows: int, columns: int) -> Tensor | None:
        mask = self.cast[i].mask
        if mask is None:
            return None
        if latents.shape[-2:] != self.picture:
            raise ValueError(
                "InstantCharacter: a mask on Apply goes with prompts for the whole picture, and this prompt is for an "
                "area of it (Conditioning Set Area). Use Conditioning Set Mask, or no mask on Apply."
            )
        batch = 1 if mask.ndim == 2 else len(mask)
        if len(latents) % batch:
            raise ValueError(f"InstantCharacter: {batch} masks on Apply for a batch of {len(latents)}; give one")
        key = (i, rows, columns)
        if key not in self._regions:
            self._regions[key] = region(mask, rows, columns).to(self._device, self._dtype)
        return self._regions[key].repeat(len(latents) // batch if batch > 1 else 1, 1, 1)

    def _key_scales(self, flux: Any, adapter: HostedAdapter) -> list[Tensor]:
        """The scale on the adapter's keys in each block, for FLUX as it is loaded now, LoRAs and all.

        FLUX's own scale is what its query norm makes of ones, whatever its weights are stored as.
        """
        if adapter not in self._scales:
            ones = torch.ones(flux.hidden_size // flux.num_heads, device=self._device, dtype=self._dtype)
            scales = torch.stack([norm(ones) for norm in _query_norms(flux)]).float().cpu()
            if not scales.all():
                raise ValueError(
                    "FLUX's query norm has a scale of 0 in a channel, which character attention cannot undo"
                )
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

    def add(self, attn: Tensor, query: Tensor, extra_options: dict[str, Any]) -> None:
        """Add to ``attn`` [B, tokens, H·D] what the picture's tokens in ``query`` [B, H, tokens, D] see."""
        block = extra_options["block_index"] + (self.double_blocks if extra_options["block_type"] == "single" else 0)
        first = extra_options["img_slice"][0]
        picture = slice(first, first + self.picture_tokens)
        for drawn in self.drawn:
            see = _bind(drawn.attention[block], drawn.key_scales[block])
            hidden, rows = attn[:, picture], query[:, :, picture].transpose(1, 2)
            add_subjects(hidden, rows, drawn.subjects, see, partial(_attend, extra_options))
        self.run.added = True


def _bind(attention: Callable, key_scale: Tensor) -> Any:
    return lambda query, tokens, attend: attention(query, tokens, key_scale, attend)


def _attend(options: dict[str, Any], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention that the user chose for ComfyUI, on [B, S, H, D]."""
    heads = query.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    seen = optimized_attention(query, key, value, heads, skip_reshape=True, transformer_options=options)
    return seen.unflatten(-1, (heads, -1))


def _timesteps(timestep: Tensor) -> list[float]:
    """FLUX's timesteps in [0, 1], each once, as the adapter counts them, in [0, 1000]."""
    return list(dict.fromkeys((timestep.float() * 1000).tolist()))


def _window(sampling: Any, part: Part) -> tuple[float, float]:
    """The lowest and the highest timestep in which a character is drawn."""
    percents = (part.end, part.start)
    low, high = (_timesteps(sampling.timestep(torch.tensor([sampling.percent_to_sigma(p)])))[0] for p in percents)
    return (low if part.end < 1 else 0.0, high if part.start > 0 else float("inf"))
