"""diffusers' FLUX pipelines, with a character in the picture."""

from __future__ import annotations

import hashlib
import inspect
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from torch import Tensor, nn

from ..character.encoders import CharacterEncoder
from ..character.tokens import TokenCache
from ..files.pictures import Picture, ResizeMode, open_mask, open_picture
from ..model.adapter import CharacterAdapter
from ..model.character import Character
from ..model.conditioning import Subject, mask_to_tokens
from ..offload.offloader import Offloader, default_device, free_memory, host_memory, measure, shares_memory
from ..offload.planning import GIB, RESERVED_FOR_DESKTOP, MemoryPlan, Strategy, plan
from ..offload.streaming import on_device
from ..versions import warn_if_newer
from .attn_processor import attach, attached, check_fits, detach

_Pipeline: Any = FluxPipeline if TYPE_CHECKING else object

Made = TypeVar("Made")
SubjectImage: TypeAlias = "Picture | Character | Sequence[Picture | Character] | None"
SubjectMask: TypeAlias = "Picture | Sequence[Picture | None] | None"

RECENT = 4
"""How many pictures' characters, and how many prompts' embeddings, a pipeline remembers."""


class CharacterPipelineMixin(_Pipeline):
    """Put before a diffusers FLUX pipeline in a class's bases, it lets that pipeline draw characters.

    Its own settings come on top of the pipeline's; everything else is the pipeline's, which is called, not copied.
    """

    _first: CharacterPipelineMixin | None = None
    """The pipeline that this one shares its state with."""

    def set_character_adapter(self, adapter: CharacterAdapter, device: str | torch.device | None = None) -> None:
        """Put an adapter into the transformer, in its dtype and where it is; set it again if its weights change.

        Args:
            adapter: which. One that is refused leaves the one before in its place.
            device: where it is folded, see :mod:`.folding`; :func:`~.default_device` if
                not given.

        Raises:
            ValueError: an adapter for a transformer of another width or number of blocks.
        """
        check_fits(self.transformer, adapter)
        warn_if_newer("diffusers")
        with self._offload_lifted():
            attach(self.transformer, adapter, compute_on=torch.device(device or default_device()))
            self._state.adapter = adapter
        self._state.tokens = TokenCache(adapter.projector)
        self._state.fingerprint = attached(self.transformer)
        self._state.characters = _Recent()

    def share_character_adapter(self, other: CharacterPipelineMixin) -> None:
        """Be one with a pipeline of the same models: what either sets, offloads or remembers, both have."""
        self._first = other._first or other
        self._state = other._state

    def remove_character_adapter(self) -> None:
        """Make this a plain FLUX pipeline again."""
        with self._offload_lifted():
            detach(self.transformer)
            self._state.adapter = self._state.tokens = None
        self._state.characters = _Recent()

    def set_character_encoder(self, encoder: CharacterEncoder | None) -> None:
        """Set what looks at reference pictures; not needed where only :class:`Character` objects are drawn."""
        with self._offload_lifted():
            self._state.encoder = encoder
        self._state.characters = _Recent()

    @property
    def character_adapter(self) -> CharacterAdapter | None:
        """What :meth:`set_character_adapter` set."""
        return self._state.adapter

    @property
    def character_encoder(self) -> CharacterEncoder | None:
        """What :meth:`set_character_encoder` set."""
        return self._state.encoder

    @property
    def adapter_host(self) -> AdapterHost | None:
        """Who manages the adapter's weights in place of this pipeline's offloading, if anybody does."""
        return self._state.host

    @adapter_host.setter
    def adapter_host(self, host: AdapterHost | None) -> None:
        self._state.host = host

    def enable_character_offload(
        self, strategy: Strategy = "auto", vram_gb: float | None = None, device: str | torch.device | None = None
    ) -> MemoryPlan:
        """Keep on the GPU what fits, and have the rest come when it is needed; in place of diffusers' offloading.

        The plan follows what happens to the pipeline: another adapter or encoder, LoRAs, larger pictures. If the GPU
        is out of memory all the same, what ran is run again under the next smaller plan, with a warning.

        Args:
            strategy: ``"auto"``: as much stays on the GPU as fits. ``"none"``: all of it. ``"stream"``: as little as
                streaming can. ``"model"``: one model at a time, by diffusers. ``"sequential"``: one layer at a time,
                by accelerate: the least memory, and by far the slowest.
            vram_gb: GiB of GPU memory to use at the most; all that is free now, but for what a desktop needs, if not
                given.
            device: where to run; :func:`~.default_device` if not given. On a Mac, whose
                GPU computes in host memory, everything stays.

        Returns:
            The plan; print it.

        Raises:
            ValueError: another strategy, or too little memory for any plan.
            torch.OutOfMemoryError: not even the smallest plan's weights find room; nothing is offloaded then.
        """
        where = torch.device(device or default_device())
        first = self._first or self
        self.disable_character_offload()
        free = max(free_memory(where, first) - (0 if shares_memory(where) else RESERVED_FOR_DESKTOP), 1)
        vram = free if vram_gb is None else min(free, int(vram_gb * GIB))
        possible = "none" if where.type == "mps" and strategy in ("auto", "stream") else strategy
        found = plan(measure(first), vram, host_memory(), strategy=possible)
        arrangement = Offloader(found, first, where)
        self._state.offload = Offload(strategy, vram_gb, where, arrangement)
        return arrangement.plan

    def maybe_free_model_hooks(self) -> None:
        """As the diffusers pipeline's, which leaves a cycle in the transformer."""
        super().maybe_free_model_hooks()
        _forget_empty_hooks(self.transformer)

    def disable_character_offload(self) -> None:
        """Have the weights stay where they are now, between pictures and while one is drawn."""
        if self._offload:
            self._offload.arrangement.undo()
            self._state.offload = None

    def enable_character_compile(self) -> bool:
        """Have torch compile FLUX's blocks, with the character in them, when they first run; see :mod:`.compiling`.

        Returns:
            Whether they will be; a warning says why not. Should compiling fail later, a warning says so, too, and FLUX
            runs as it is.
        """
        from .compile import compile_blocks

        return compile_blocks(self.transformer)

    def create_character(self, picture: Picture, fit: ResizeMode = "pad") -> Character:
        """Make a character of a reference picture, on the pipeline's device; recent pictures are remembered.

        The encoder and the projector are on that device only for their part of it, unless they are there anyway.

        Args:
            picture: anything :func:`~instantcharacter.character.image.open_picture` takes.
            fit: how it becomes a square: ``"pad"`` with white, or ``"stretch"``.

        Raises:
            ValueError: not a picture, or no adapter or encoder set.
        """
        adapter = self._adapter()
        if self.character_encoder is None:
            raise ValueError("no character encoder: call set_character_encoder, or pass a Character for the picture")
        image = open_picture(picture)
        look = self.character_encoder

        def make() -> Character:
            with on_device(look, self._execution_device) as encoder:
                features = encoder(image, fit)
            with on_device(adapter.projector, self._execution_device):
                return adapter.create_character(features, picture=image)

        return self._state.characters((hashlib.blake2b(image.tobytes()).digest(), image.size, fit), make)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As the diffusers pipeline's; recent prompts are remembered, so that other seeds need no text encoder.

        A prompt is never longer than T5's tokenizer allows, whatever ``max_sequence_length`` is.
        """
        encode = super().encode_prompt
        bound = inspect.signature(encode).bind(*args, **kwargs)
        bound.apply_defaults()
        if self.tokenizer_2 is not None:
            longest = self.tokenizer_2.model_max_length
            bound.arguments["max_sequence_length"] = min(bound.arguments["max_sequence_length"], longest)
        args, kwargs, given = bound.args, bound.kwargs, bound.arguments
        if any(isinstance(value, Tensor) for value in given.values()):
            return encode(*args, **kwargs)
        encoders = (self.text_encoder, self.text_encoder_2)
        key = (repr(sorted(given.items())), str(self._execution_device), *map(_identity, encoders))
        return self._state.prompts(key, lambda: encode(*args, **kwargs))

    def __call__(
        self,
        *args: Any,
        subject_image: SubjectImage = None,
        subject_scale: float | Sequence[float] = 0.9,
        subject_mask: SubjectMask = None,
        subject_fit: ResizeMode = "pad",
        subject_start: float = 0.0,
        subject_end: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        """Draw; the arguments are those of the diffusers pipeline, and these.

        Args:
            subject_image: the character: a picture, a :class:`Character`, or a list of either for several in one
                picture. Without one this is the plain pipeline.
            subject_scale: how strongly the character is drawn, about 0.6 to 1; less leaves more to the prompt, 0 is
                plain FLUX. One for all, or one for each.
            subject_mask: where in the picture the character may be: a picture or array, white there, of any size. One
                for all, or a list with one (or None) for each; everywhere if not given.
            subject_fit: how a reference picture becomes a square: ``"pad"`` with white, or ``"stretch"``.
            subject_start: fraction of the steps before which the character is left out, 0 to 1.
            subject_end: fraction of the steps after which it is left out, 0 to 1.

        Raises:
            ValueError: an empty list, scales that are not finite, scales or masks that are not one a character, an
                empty mask, start past end, no adapter or encoder set, or a character that another adapter made.
        """
        if not 0 <= subject_start <= subject_end <= 1:
            raise ValueError(
                f"subject_start {subject_start} and subject_end {subject_end}; expected 0 ≤ start ≤ end ≤ 1"
            )
        if kwargs.get("num_images_per_prompt", 1) is None:  # diffusers allows it, and multiplies by it
            del kwargs["num_images_per_prompt"]
        subjects = [
            _Part(self._character(picture, subject_fit), scale, mask)
            for picture, scale, mask in _cast(subject_image, subject_scale, subject_mask)
            if scale != 0
        ]
        drawing = self._drawing(subjects, subject_start, subject_end) if subjects else nullcontext()
        try:
            with drawing:
                return self._planned(super().__call__, args, kwargs)
        finally:
            _forget_empty_hooks(self.transformer)

    def _adapter(self) -> CharacterAdapter:
        """The adapter, which the transformer still carries: other pipelines may have set theirs in it."""
        if self.character_adapter is None or attached(self.transformer) != self._state.fingerprint:
            raise ValueError(
                "this pipeline's transformer does not carry its character adapter: call set_character_adapter"
            )
        return self.character_adapter

    def _character(self, picture: Picture | Character, fit: ResizeMode) -> Character:
        if not isinstance(picture, Character):
            return self.create_character(picture, fit)
        self._adapter()
        picture.check_made_by(self._state.fingerprint)
        return picture

    @contextmanager
    def _drawing(self, subjects: list[_Part], start: float, end: float) -> Iterator[None]:
        """Within this block, the transformer gets the subjects of the step at every call."""
        schedule: list[list[Subject]] = []

        def add_subjects(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            latents = kwargs["hidden_states"]
            if not schedule:
                schedule.extend(self._schedule(subjects, start, end, latents, kwargs["img_ids"]))
            joint = dict(kwargs.get("joint_attention_kwargs") or {})
            joint |= {"subjects": schedule[self._step], "image_tokens": latents.shape[1]}
            return args, {**kwargs, "joint_attention_kwargs": joint}

        hook = self.transformer.register_forward_pre_hook(add_subjects, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _schedule(
        self, subjects: list[_Part], start: float, end: float, latents: Tensor, positions: Tensor
    ) -> list[list[Subject]]:
        """The subjects to draw at each step of the scheduler's: the one time that the host waits for the GPU."""
        cache = self._state.tokens
        assert cache is not None, "set with the adapter"
        timesteps = self.scheduler.timesteps.to(latents.dtype).tolist()
        drawn = _window(len(timesteps), self._first_step, start, end)
        schedule: list[list[Subject]] = [[] for _ in timesteps]
        for character, scale, mask in subjects:
            where = None if mask is None else _region(mask, positions).to(latents)
            at = [timesteps[i] for i in drawn]
            request = (character, at, latents.device, latents.dtype)
            host = self.adapter_host if cache.missing(*request) else None
            with host.resampling() if host else nullcontext():
                tokens = cache.tokens(*request)
            for step, step_tokens in zip(drawn, tokens):
                schedule[step].append(Subject(step_tokens, torch.tensor(scale), where))
        return schedule

    @cached_property
    def _state(self) -> _State:
        return _State()

    @property
    def _offload(self) -> Offload | None:
        return self._state.offload

    @property
    def _execution_device(self) -> torch.device:
        return self._offload.device if self._offload else super()._execution_device

    def _planned(self, draw: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Draw, under a memory plan that is one for these pictures."""
        if self._offload is None:
            return draw(*args, **kwargs)
        given = inspect.signature(draw).bind(*args, **kwargs).arguments
        default = self.default_sample_size * self.vae_scale_factor
        prompts = given["prompt"] if isinstance(given.get("prompt"), list) else given.get("prompt_embeds")
        arrangement = self._offload.arrangement
        arrangement.begin(
            (given.get("width") or default, given.get("height") or default),
            (1 if prompts is None else len(prompts)) * given.get("num_images_per_prompt", 1),
        )
        if arrangement.retries_module:
            return draw(*args, **kwargs)
        noise = _listed(given.get("generator"))
        states = [generator and generator.get_state() for generator in noise]
        try:
            return draw(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        arrangement.reduce_memory(reason)
        for generator, state in zip(noise, states):
            if generator:
                generator.set_state(state)
        return draw(*args, **kwargs)

    @contextmanager
    def _offload_lifted(self) -> Iterator[None]:
        """Within this block the pipeline's models may be changed; afterwards they are offloaded as before."""
        before = self._offload
        self.disable_character_offload()
        try:
            yield
        finally:
            if before:
                self.enable_character_offload(before.strategy, before.vram_gb, before.device)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As the diffusers pipeline's; it ends the offload of :meth:`enable_character_offload`."""
        if self._offload and self._offload.arrangement.retries_module:
            self.disable_character_offload()
        return super().to(*args, **kwargs)

    @property
    def _first_step(self) -> int:
        """The index in the schedule that this run began with: above 0 where it began with a picture."""
        return self.scheduler.begin_index or 0

    @property
    def _step(self) -> int:
        """The index in the schedule now, which the scheduler counts on the host."""
        return self._first_step if self.scheduler.step_index is None else self.scheduler.step_index


def _lifting(name: str) -> Callable:
    """A method of the diffusers pipeline's that changes models, made to work while they are offloaded."""

    def change(self: CharacterPipelineMixin, *args: Any, **kwargs: Any) -> Any:
        self._state.prompts = _Recent()
        with self._offload_lifted():
            return getattr(super(CharacterPipelineMixin, self), name)(*args, **kwargs)

    return wraps(getattr(FluxPipeline, name))(change)


for _name in ("load_lora_weights", "unload_lora_weights", "delete_adapters", "fuse_lora", "unfuse_lora"):
    setattr(CharacterPipelineMixin, _name, _lifting(_name))


class InstantCharacterPipeline(CharacterPipelineMixin, FluxPipeline):
    """Text to image, see :class:`CharacterPipelineMixin`."""


class InstantCharacterImg2ImgPipeline(CharacterPipelineMixin, FluxImg2ImgPipeline):
    """Image to image, see :class:`CharacterPipelineMixin`."""


class InstantCharacterInpaintPipeline(CharacterPipelineMixin, FluxInpaintPipeline):
    """Inpainting, see :class:`CharacterPipelineMixin`."""


class Offload(NamedTuple):
    """How a pipeline was asked to be offloaded, and what came of it."""

    strategy: Strategy
    vram_gb: float | None
    device: torch.device
    arrangement: Offloader


class AdapterHost(Protocol):
    """Who manages an adapter's weights in place of a pipeline's offloading."""

    def resampling(self) -> AbstractContextManager[Any]:
        """Within this block, the adapter's resampler is on the device."""


class _Recent(Generic[Made]):
    """What was made lately, of what it was made of."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, Made] = OrderedDict()

    def __call__(self, key: tuple, make: Callable[[], Made]) -> Made:
        if key not in self._kept:
            self._kept[key] = make()
        self._kept.move_to_end(key)
        while len(self._kept) > RECENT:
            self._kept.popitem(last=False)
        return self._kept[key]


@dataclass(eq=False)
class _State:
    """What pipelines of the same models share."""

    adapter: CharacterAdapter | None = None
    encoder: CharacterEncoder | None = None
    host: AdapterHost | None = None
    fingerprint: str | None = None
    tokens: TokenCache | None = None
    offload: Offload | None = None
    characters: _Recent[Character] = field(default_factory=_Recent)
    prompts: _Recent[tuple[Tensor, ...]] = field(default_factory=_Recent)


class _Part(NamedTuple):
    """What a character has in one drawing."""

    character: Character
    scale: float
    mask: Picture | None


def _cast(
    subject_image: SubjectImage, subject_scale: float | Sequence[float], subject_mask: SubjectMask
) -> list[tuple[Picture | Character, float, Picture | None]]:
    """The pictures or characters, each with its finite scale and its mask."""
    pictures, scales, masks = _listed(subject_image), _listed(subject_scale), _listed(subject_mask)
    if not all(math.isfinite(scale) for scale in scales):
        raise ValueError(f"subject_scale is {subject_scale}; expected finite numbers")
    if subject_image is None:
        return []
    if not pictures or any(picture is None for picture in pictures):
        raise ValueError("subject_image is a list that is empty or has a None in it; expected pictures or characters")
    for name, given in (("subject_scale", scales), ("subject_mask", masks)):
        if len(given) not in (1, len(pictures)):
            raise ValueError(f"{len(given)} {name} for {len(pictures)} characters; expected one for all or one each")
    return list(zip(pictures, scales * len(pictures), masks * len(pictures)))


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _identity(text_encoder: Any) -> tuple:
    """Which text encoder it is, in which dtype, and how strong its LoRAs are."""
    if text_encoder is None:
        return ()
    layers = [module for module in text_encoder.modules() if hasattr(module, "lora_A")]
    loras = [(m.active_adapters, m.scaling, m.disable_adapters, m.merged) for m in layers]
    return weakref.ref(text_encoder), text_encoder.dtype, repr(loras)


def _forget_empty_hooks(transformer: nn.Module) -> None:
    """Break the cycle that diffusers leaves in a transformer that it drew with.

    Gigabytes would stay until Python collects what is in cycles.
    """
    registry = getattr(transformer, "_diffusers_hook", None)
    if registry is not None and not registry.hooks:
        del transformer._diffusers_hook


def _region(mask: Picture, positions: Tensor) -> Tensor:
    """A mask over FLUX's image tokens, whose ``positions`` [..., S, 3] end in row and column."""
    white = np.asarray(open_mask(mask), dtype=np.float32) / 255
    rows, columns = (int(positions[..., axis].max()) + 1 for axis in (1, 2))
    return mask_to_tokens(torch.from_numpy(white), rows, columns)


def _window(steps: int, first: int, start: float, end: float) -> list[int]:
    """The steps, from ``first`` on, that lie wholly between two fractions of them."""
    count = steps - first
    return [i for i in range(first, steps) if start <= (i - first) / count and (i - first + 1) / count <= end]
