"""Samples as FLUX learns from them: latents, text embeddings, features; each computed once, if there is a cache."""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import save_file
from torch import Tensor

from ..character.encoders import CharacterEncoder, image_to_crops
from ..character.image import open_picture
from ..files.atomic import atomic_write
from ..files.reading import read_safetensors
from ..offload import GIB
from .config import Preview, TrainingConfig
from .fingerprint import fingerprint
from .objective import pack
from .samples import BadSample, Encoded, Sample, Samples, Tally

Given = TypeVar("Given")
Tensors = dict[str, Tensor]
PREPARATION = 1
"""Of the cache: another one for each change to what the models are given of a picture or a text, or to what is kept."""
AHEAD = 3
"""Batches that are read while one is learned from."""


@dataclass(frozen=True)
class Batch:
    """What a step learns from.

    Attributes:
        latents: [B, S, C], image tokens without noise.
        prompts: [B, T, W], T5's.
        pooled: [B, V], CLIP's.
        features: of the references: [B, 3·N, F], [B, N, F] and [B, 4·N, F].
    """

    latents: Tensor
    prompts: Tensor
    pooled: Tensor
    features: tuple[Tensor, Tensor, Tensor]


class Computed(Generic[Given]):
    """Something a model makes of a part of a sample, read from the cache where it is.

    Args:
        name: of what is made, by which models and with which settings; nothing else has it.
        cache: where a folder of that name is the cache; nothing is kept if not given.
        held: what is in memory already.
        prepare: in a thread of its own: decodes what was given. Raises ``BadSample``.
        compute: on the device: what was decoded, several at once, to the tensors of each.
    """

    def __init__(
        self,
        name: str,
        cache: Path | None,
        held: Held,
        prepare: Callable[[Given], Any],
        compute: Callable[[list[Any]], list[Tensors]],
    ) -> None:
        self._name = name
        self._folder = cache / name if cache else None
        self._held = held
        self._prepare = prepare
        self._compute = compute

    def begin(self, given: Given) -> _Begun:
        """What the cache has of it, or else what has to be computed."""
        key = (self._name, given)
        if held := self._held.tensors.get(key):
            return _Begun(key, None, held, None)
        file = None
        if self._folder:
            file = self._folder / f"{_digest(given)}.safetensors"
            if kept := _kept(file):
                return _Begun(key, file, kept, None)
        return _Begun(key, file, None, self._prepare(given))

    def finish(self, begun: list[_Begun]) -> list[Tensors]:
        """The tensors of each; those not in the cache are computed together, and kept."""
        missing = [part for part in begun if part.tensors is None]
        computed = iter(self._compute([part.prepared for part in missing]) if missing else [])
        finished = []
        for part in begun:
            tensors = next(computed) if part.tensors is None else part.tensors
            if part.tensors is None and part.file:
                with atomic_write(part.file) as partial:
                    save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, partial)
            finished.append(self._held.add(part.key, tensors))
        return finished


class Held:
    """What was computed or read, in memory while there is room; it is never forgotten.

    Args:
        config: says how much room there is, and whether in host memory or on the device.
        device: that.
    """

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self.tensors: dict[Hashable, Tensors] = {}
        self._room = int(config.held_gib * GIB)
        self._device = device if config.held_in == "device" else torch.device("cpu")

    def add(self, key: Hashable, tensors: Tensors) -> Tensors:
        """Hold these if there is room; returns them where they then are."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if key in self.tensors or size > self._room:
            return tensors
        self.tensors[key] = _on(tensors, self._device)
        self._room -= size
        return self.tensors[key]


class _Begun(NamedTuple):
    key: Hashable
    file: Path | None
    tensors: Tensors | None
    prepared: Any


class Examples:
    """Samples, read ahead by threads, as batches on a device.

    The models that they need are loaded when the first is not in the cache, and no sooner.

    Args:
        config: of the training.
        device: where the models run and the batches are.
        rank: which of the processes that train together this is.
        processes: how many those are.
        held: what trainings before this one hold in memory.

    Attributes:
        tally: of bad samples.
    """

    def __init__(
        self,
        config: TrainingConfig,
        device: torch.device,
        rank: int = 0,
        processes: int = 1,
        held: Held | None = None,
    ) -> None:
        self._config, self._device = config, device
        self._rank, self._processes = rank, processes
        self._dtype = getattr(torch, config.precision)
        self._samples = Samples(config.data, config.seed)
        self.tally = Tally()
        held = held or Held(config, device)
        vae, texts = fingerprint(config.model, "vae"), fingerprint(config.model, *TEXT_PARTS)
        encoders = fingerprint(config.siglip), fingerprint(config.dinov2)
        self._latents = Computed(*self._named("latents", vae, config.resolution), held, self._crop, self._encode)
        self._texts: Computed[str] = Computed(*self._named("texts", texts), held, str, self._read)
        self._features = Computed(*self._named("features", *encoders), held, _squares, self._look)

    def batches(self, position: int) -> Iterator[tuple[Batch, int]]:
        """Batches without end, from a position in the samples on, each with the position after it."""
        numbered = enumerate(self._samples.from_position(position), position + 1)
        own = islice(numbered, (self._rank - position) % self._processes, None, self._processes)
        threads = ThreadPoolExecutor(self._config.workers)
        waiting: deque[tuple[int, Future]] = deque()
        begun: list[tuple[_Begun, _Begun, _Begun]] = []
        try:
            while True:
                while len(waiting) < AHEAD * self._config.batch_size:
                    after, sample = next(own)
                    waiting.append((after, threads.submit(self._begin, sample)))
                after, future = waiting.popleft()
                try:
                    begun.append(future.result())
                    self.tally.count()
                except BadSample as error:
                    self.tally.count(error)
                if len(begun) == self._config.batch_size:
                    yield self._batch(begun), after
                    begun = []
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def fill_always(self) -> None:
        """Have in the cache what no sample brings: no text, nobody, the previews."""
        self._text("")
        self._character(_white())
        for preview in self._config.previews:
            self.told(preview)

    @cached_property
    def without_text(self) -> Tensors:
        """What FLUX is told when nothing is said."""
        return self._text("")

    @cached_property
    def without_character(self) -> Tensors:
        """The features of a white picture."""
        return self._character(_white())

    def told(self, preview: Preview) -> tuple[Tensors, Tensors]:
        """A preview's text, and the features of its reference."""
        return self._text(preview.prompt), self._character(Path(preview.reference))

    def _text(self, text: str) -> Tensors:
        return _on(self._texts.finish([self._texts.begin(text)])[0], self._device)

    def _character(self, reference: Encoded) -> Tensors:
        return _on(self._features.finish([self._features.begin(reference)])[0], self._device)

    def _begin(self, sample: Sample | BadSample) -> tuple[_Begun, _Begun, _Begun]:
        if isinstance(sample, BadSample):
            raise sample
        try:
            picture, text = self._latents.begin(sample.picture), self._texts.begin(sample.text)
            return picture, text, self._features.begin(sample.reference)
        except (ValueError, OSError) as error:
            raise BadSample(f"{sample.name}: {error}") from error

    def _batch(self, begun: Sequence[tuple[_Begun, _Begun, _Begun]]) -> Batch:
        pictures, texts, references = (list(part) for part in zip(*begun))
        latents = _together(self._latents.finish(pictures), self._device)
        text = _together(self._texts.finish(texts), self._device)
        features = _together(self._features.finish(references), self._device)
        return Batch(latents["tokens"], text["prompt"], text["pooled"], in_order(features))

    def _named(self, kind: str, *settings: Any) -> tuple[str, Path | None]:
        """Its name, another one for other models and settings, and its cache."""
        digest = _digest(json.dumps([PREPARATION, *settings, str(self._dtype)]))
        return f"{kind}-{digest[:8]}", self._config.cache if kind in self._config.cached else None

    def _crop(self, picture: Encoded) -> Tensor:
        """The middle square at the training's resolution, [3, R, R] from -1 to 1."""
        square = ImageOps.fit(_decoded(picture), (self._config.resolution,) * 2)
        return (
            torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
            .view(*square.size, 3)
            .permute(2, 0, 1)
            .float()
            / 127.5
            - 1
        )

    @torch.no_grad()
    def _encode(self, pictures: list[Tensor]) -> list[Tensors]:
        vae = self.vae
        latents = vae.encode(torch.stack(pictures).to(self._device, vae.dtype)).latent_dist.mode()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return [{"tokens": tokens} for tokens in pack(latents).to(self._dtype)]

    @torch.no_grad()
    def _read(self, texts: list[str]) -> list[Tensors]:
        prompts, pooled, _ = self._text_encoders.encode_prompt(
            texts, None, device=self._device, max_sequence_length=self._text_encoders.tokenizer_2.model_max_length
        )
        return [{"prompt": prompt, "pooled": row} for prompt, row in zip(prompts, pooled)]

    def _look(self, pictures: list[Tensor]) -> list[Tensors]:
        features = self._encoder.encode_images(torch.stack(pictures))
        return [dict(zip(FEATURES, rows)) for rows in zip(*features)]

    @cached_property
    def vae(self) -> AutoencoderKL:
        """FLUX's, in float32: in fewer bits it loses what a picture has."""
        vae = AutoencoderKL.from_pretrained(self._config.model, subfolder="vae", torch_dtype=torch.float32)
        return vae.to(self._device).requires_grad_(False)

    @cached_property
    def _text_encoders(self) -> FluxPipeline:
        return FluxPipeline.from_pretrained(self._config.model, transformer=None, vae=None, torch_dtype=self._dtype).to(
            self._device
        )

    @cached_property
    def _encoder(self) -> CharacterEncoder:
        config = self._config
        return CharacterEncoder.from_pretrained(config.siglip, config.dinov2, self._dtype, self._device)


TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
FEATURES = ("low_res_shallow", "low_res_deep", "high_res_deep")


def in_order(features: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """As :meth:`CharacterProjector.fuse` takes them."""
    shallow, deep, tiles = (features[name] for name in FEATURES)
    return shallow, deep, tiles


def _white() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")
    return file.getvalue()


def _squares(picture: Encoded) -> Tensor:
    return image_to_crops(_decoded(picture))


def _decoded(picture: Encoded) -> Image.Image:
    """A picture as :func:`~instantcharacter.character.image.open_picture` has it; no file of it stays open."""
    data = picture.read_bytes() if isinstance(picture, Path) else picture
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return open_picture(image)
    except UnidentifiedImageError as error:
        raise BadSample("not a picture that can be read") from error
    except (OSError, Image.DecompressionBombError, SyntaxError, EOFError, RuntimeError) as error:
        raise BadSample(f"not a whole picture: {error}") from error


def _kept(file: Path) -> Tensors | None:
    """What is in a file of the cache; one that is cut off or cannot be read is made again."""
    try:
        return read_safetensors(file, "what the training keeps")[0]
    except (OSError, ValueError):
        return None


def _digest(given: Any) -> str:
    """Of the contents, so that a picture that was changed is looked at again."""
    data = given.read_bytes() if isinstance(given, Path) else given.encode() if isinstance(given, str) else given
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _together(parts: list[Tensors], device: torch.device) -> Tensors:
    return {key: _stacked([part[key] for part in parts], device) for key in parts[0]}


def _stacked(tensors: list[Tensor], device: torch.device) -> Tensor:
    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.to(device) for tensor in tensors]
    return torch.stack(tensors).to(device)


def _on(tensors: Tensors, device: torch.device) -> Tensors:
    return {key: tensor.to(device) for key, tensor in tensors.items()}
