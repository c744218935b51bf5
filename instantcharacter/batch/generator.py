"""Generates the batches of one process with its pipeline."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from ..files.errors import reason
from ..flux.lora import load_lora
from ..flux.parallel import context_parallel
from ..flux.pipeline import InstantCharacterPipeline
from .cache import Embeddings, JobCache, Loras, Prompt
from .folder import OutputFolder
from .groups import Batch
from .jobs import Job, Reference, Source


class Generator:
    """Generates batches into an output folder.

    Args:
        pipeline: with its adapter; LoRAs of jobs are loaded into it.
        cache: has the characters of all batches whose references could be encoded.
        output: where pictures and errors are written.
        cache_threshold: see :meth:`~instantcharacter.InstantCharacterPipeline.__call__`.
        shared: settings of all pictures that each carries.

    Attributes:
        together: whether all processes generate each picture together, of which the main one then writes it.
    """

    def __init__(
        self,
        pipeline: InstantCharacterPipeline,
        cache: JobCache,
        output: OutputFolder,
        cache_threshold: float,
        shared: Mapping[str, Any],
    ) -> None:
        self._pipeline, self._cache, self._output = pipeline, cache, output
        self._cache_threshold, self._shared = cache_threshold, shared
        self.together = context_parallel(pipeline.transformer) is not None
        self._writes = not self.together or PartialState().is_main_process
        self._loaded: set[Source] = set()
        self._unfit: dict[Source, str] = {}
        self._active: Loras = ()

    def load_loras(self, batches: Iterable[Batch]) -> None:
        """Load the LoRAs of some batches; those of one that does not fit FLUX fail."""
        with self._pipeline.models_changing():
            for source in dict.fromkeys(source for batch in batches for source, _ in batch.settings.lora):
                try:
                    load_lora(self._pipeline, source.path, _name(source))
                    self._loaded.add(source)
                except (ValueError, OSError) as error:
                    self._unfit[source] = reason(error)
            if self._loaded:
                self._pipeline.disable_lora()

    def encode_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Encode prompts that are not in the cache; the batches of one that fails fail later."""
        for prompt in prompts:
            with suppress(ValueError, RuntimeError):  # its batches fail for the same reason, and write it down
                self._embeddings(prompt)

    def generate(self, batches: Iterable[Batch], present: Collection[str]) -> None:
        """Generate batches, and write the pictures that are not present; what fails is written down.

        Raises:
            OSError: a picture cannot be written.
            RuntimeError, MemoryError: this process fails at a picture that others generate with it.
        """
        for batch in batches:
            jobs, begin = batch.jobs, time.perf_counter()
            if self._cache.missing(batch.settings.reference):
                written = {entry["output"] for entry in self._output.entries(jobs)}  # why it could not be made
                for job in (job for job in jobs if job.output not in written):
                    self._save_error(job, "its character is not there: run the same command again")
                continue
            try:
                images: Sequence[Image.Image | None] = self._images(batch)
            except (ValueError, RuntimeError, MemoryError, OSError) as error:
                if self.together and not isinstance(error, ValueError):  # which the others do not meet
                    raise
                for job in jobs:
                    self._save_error(job, reason(error))
                continue
            seconds = (time.perf_counter() - begin) / len(jobs)
            for job, image in zip(jobs, images):
                if image is None:
                    self._save_error(job, "the picture has values that are not finite (NaN)")
                elif job.output not in present and self._writes:
                    self._output.save(job, image, seconds, self._shared)

    def _save_error(self, job: Job, error: str) -> None:
        if self._writes:
            self._output.save_error(job, error)

    def _images(self, batch: Batch) -> list[Image.Image | None]:
        """The pictures of a batch; None for one whose values are not finite."""
        settings = batch.settings
        width, height = settings.size
        inputs: dict[str, Any] = self._stacked([Prompt(job.prompt, settings.lora) for job in batch.jobs])
        if settings.true_cfg > 1:
            negative = self._stacked([Prompt(job.negative_prompt or "", settings.lora) for job in batch.jobs])
            inputs |= {f"negative_{name}": tensor for name, tensor in negative.items()}
        self._set_loras(settings.lora)
        sources: tuple[Reference | Source, ...] = (*settings.reference, *settings.character)
        images = self._pipeline(
            subject_image=[self._cache.character(source) for source in sources],
            subject_scale=list(settings.scale),
            subject_mask=[region.path if region else None for region in settings.region],
            width=width,
            height=height,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            true_cfg_scale=settings.true_cfg,
            cache_threshold=self._cache_threshold,
            generator=[torch.Generator().manual_seed(job.seed) for job in batch.jobs],
            output_type="np",
            **inputs,
        ).images
        to_pil = self._pipeline.image_processor.numpy_to_pil
        return [to_pil(image)[0] if np.isfinite(image).all() else None for image in images]

    def _stacked(self, prompts: Sequence[Prompt]) -> Embeddings:
        """The embeddings of several prompts, on the pipeline's device."""
        pipeline = self._pipeline
        device = pipeline.offloader.device if pipeline.offloader else pipeline.device
        each = [self._embeddings(prompt) for prompt in prompts]
        return {name: torch.cat([embeddings[name] for embeddings in each]).to(device) for name in each[0]}

    def _embeddings(self, prompt: Prompt) -> Embeddings:
        return self._cache.embeddings(prompt, self._encode)

    @torch.no_grad()
    def _encode(self, prompt: Prompt) -> Embeddings:
        self._set_loras(prompt.loras)
        embeddings, pooled, _ = self._pipeline.encode_prompt(prompt.text, None)
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def _set_loras(self, loras: Loras) -> None:
        """Have these LoRAs act, with their weights, and no others.

        Raises:
            ValueError: one of them does not fit FLUX.
        """
        for source, _ in loras:
            if source in self._unfit:
                raise ValueError(self._unfit[source])
        if loras == self._active:
            return
        if loras:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters([_name(source) for source, _ in loras], [weight for _, weight in loras])
        else:
            self._pipeline.disable_lora()
        self._active = loras


def _name(lora: Source) -> str:
    """A LoRA's name in the pipeline."""
    return f"job_{lora.digest}"
