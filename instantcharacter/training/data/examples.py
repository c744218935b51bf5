"""Samples as batches for the adapter: latents, text embeddings and features, read ahead by threads."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.fingerprint import content_digest, fingerprint
from ...offload.planning import GIB
from ..config import Preview, TrainingConfig
from .cache import CachedEncoder, MemoryCache, PendingItem, Tensors, stack, to_device
from .frozen_models import FEATURES, FrozenModels
from .pictures import reference_crops, target_pixels, white_picture
from .samples import BadSample, Encoded, Sample, Samples
from .tally import Tally

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
PREPARATION = 1
"""Version of the cache: raise it with every change to how pictures and texts reach the models, or to what is cached."""
READ_AHEAD = 3
"""Batches that threads read while one is trained on."""

Pending = tuple[PendingItem, PendingItem, PendingItem]


@dataclass(frozen=True)
class Batch:
    """The tensors of a training step.

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


def new_memory_cache(config: TrainingConfig, device: torch.device) -> MemoryCache:
    """A cache of the config's size, in host memory or on the device."""
    return MemoryCache(int(config.held_gib * GIB), device if config.held_in == "device" else torch.device("cpu"))


def features_in_order(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """The features as :meth:`CharacterProjector.fuse` takes them."""
    shallow, deep, tiles = (tensors[name] for name in FEATURES)
    return shallow, deep, tiles


class Examples:
    """Batches of a training's samples on a device.

    Threads read and decode, not ``torch.utils.data.DataLoader``: its worker processes share neither the cache in memory
    nor the models, and it resumes at a sample only with torchdata.

    Args:
        config: the training's.
        device: where the models run and the batches are.
        rank: index of this process.
        processes: processes that train together; each takes every ``processes``-th sample.
        memory: cache in memory, such as the former stage's; a new one without it.
        transform: changes each batch.

    Attributes:
        tally: counts bad samples.
        models: the frozen models, loaded when a sample is not in the cache.
    """

    def __init__(
        self,
        config: TrainingConfig,
        device: torch.device,
        rank: int = 0,
        processes: int = 1,
        memory: MemoryCache | None = None,
        transform: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self._config, self._device = config, device
        self._rank, self._processes = rank, processes
        self._transform = transform
        self._samples = Samples(config.data, config.seed)
        self.tally = Tally()
        self.models = models = FrozenModels(config, device)
        memory = new_memory_cache(config, device) if memory is None else memory
        vae, texts = fingerprint(config.model, "vae"), fingerprint(config.model, *TEXT_PARTS)
        vision = fingerprint(config.siglip), fingerprint(config.dinov2)
        to_pixels = partial(target_pixels, resolution=config.resolution)
        self._targets: CachedEncoder[Encoded] = CachedEncoder(
            *self._cache("latents", vae, config.resolution), memory, to_pixels, models.encode_targets
        )
        self._texts: CachedEncoder[str] = CachedEncoder(*self._cache("texts", texts), memory, str, models.encode_texts)
        self._references: CachedEncoder[Encoded] = CachedEncoder(
            *self._cache("features", *vision), memory, reference_crops, models.encode_references
        )

    def batches(self, position: int) -> Iterator[tuple[Batch, int]]:
        """Batches without end from a position among the samples on, each with the position after it."""
        numbered = enumerate(self._samples.from_position(position), position + 1)
        own = islice(numbered, (self._rank - position) % self._processes, None, self._processes)
        threads = ThreadPoolExecutor(self._config.workers)
        queue: deque[tuple[int, Future[Pending]]] = deque()
        pending: list[Pending] = []
        try:
            while True:
                while len(queue) < READ_AHEAD * self._config.batch_size:
                    after, sample = next(own)
                    queue.append((after, threads.submit(self._begin, sample)))
                after, future = queue.popleft()
                try:
                    pending.append(future.result())
                    self.tally.count()
                except BadSample as error:
                    self.tally.count(error)
                if len(pending) == self._config.batch_size:
                    yield self._finish(pending), after
                    pending = []
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def warm_fixed_entries(self) -> None:
        """Cache what every training needs beside its samples: the empty prompt, the white picture, the previews."""
        self._text("")
        self._character(white_picture())
        for preview in self._config.previews:
            self.encode_preview(preview)

    @cached_property
    def without_text(self) -> Tensors:
        """The empty prompt's embeddings."""
        return self._text("")

    @cached_property
    def without_character(self) -> Tensors:
        """The features of a white picture."""
        return self._character(white_picture())

    def encode_preview(self, preview: Preview) -> tuple[Tensors, Tensors]:
        """A preview's text embeddings, and the features of its reference."""
        return self._text(preview.prompt), self._character(Path(preview.reference))

    def _text(self, text: str) -> Tensors:
        return to_device(self._texts.encode(text), self._device)

    def _character(self, reference: Encoded) -> Tensors:
        return to_device(self._references.encode(reference), self._device)

    def _begin(self, sample: Sample | BadSample) -> Pending:
        if isinstance(sample, BadSample):
            raise sample
        try:
            target, text = self._targets.begin(sample.picture), self._texts.begin(sample.text)
            return target, text, self._references.begin(sample.reference)
        except (ValueError, OSError) as error:
            raise BadSample(f"{sample.name}: {error}") from error

    def _finish(self, pending: list[Pending]) -> Batch:
        targets, texts, references = (list(part) for part in zip(*pending))
        latents = stack(self._targets.finish(targets), self._device)
        text = stack(self._texts.finish(texts), self._device)
        features = stack(self._references.finish(references), self._device)
        batch = Batch(latents["tokens"], text["prompt"], text["pooled"], features_in_order(features))
        return self._transform(batch) if self._transform else batch

    def _cache(self, kind: str, *settings: Any) -> tuple[str, Path | None]:
        """A cache's name, which differs for other models and settings, and its parent folder."""
        digest = content_digest(json.dumps([PREPARATION, *settings, str(getattr(torch, self._config.precision))]))
        return f"{kind}-{digest[:8]}", self._config.cache if kind in self._config.cached else None
