"""Loading models for ``generate``, ``batch`` and ``encode``: on which device, in which type, with a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from ..character.encoders import CharacterEncoder
from ..files import folders
from ..files.download import adapter_file
from ..files.errors import first_line
from ..flux.fp8 import set_weight_dtype
from ..flux.load import FluxFiles, check_weight_dtype, load_flux
from ..flux.lora import load_lora
from ..flux.parallel import enable_context_parallel
from ..flux.pipeline import InstantCharacterPipeline
from ..model.adapter import CharacterAdapter
from ..model.character import Character
from ..offload.devices import default_device
from ..offload.streaming import on_device
from .errors import hub_errors
from .options import EncodeOptions, PictureOptions
from .progress import stage_bar


def choose_device(name: str | None) -> torch.device:
    """The device of this name; without a name CUDA, a Mac's GPU or the CPU, the first that the machine has.

    Raises:
        ValueError: the machine has no such device.
    """
    if name is None:
        return torch.device(default_device())
    try:
        torch.zeros(1, device=name).tolist()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {name}: there is no such device here ({first_line(error)}); expected cpu, cuda or mps"
        ) from error
    return torch.device(name)


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type of this name; without a name float32 on a CPU, bfloat16 on a GPU."""
    return getattr(torch, name or ("float32" if device.type == "cpu" else "bfloat16"))


def check_arithmetic(options: PictureOptions) -> None:
    """Raise ``ValueError`` for 8-bit arithmetic that the device or FLUX's file does not have; nothing is loaded yet."""
    check_weight_dtype(Path(options.model), options.weight_dtype, choose_device(options.device))


def load_adapter(options: EncodeOptions) -> CharacterAdapter:
    """The adapter in its file's dtype, memory-mapped: its parts are converted when they are used."""
    with stage_bar("adapter", 1) as start:
        start("loading")
        return CharacterAdapter.from_file(adapter_file(options.adapter))


def create_characters(
    adapter: CharacterAdapter, pictures: Sequence[Image.Image], options: EncodeOptions
) -> list[Character]:
    """A character of each picture.

    Raises:
        ValueError: a folded adapter.
    """
    characters = []
    with stage_bar("reference", 1 + len(pictures)) as start:
        start("loading the encoders")
        with character_encoding(adapter, options) as create:
            for picture in pictures:
                start("encoding a picture")
                characters.append(create(picture))
    return characters


@contextmanager
def character_encoding(
    adapter: CharacterAdapter, options: EncodeOptions
) -> Iterator[Callable[[Image.Image], Character]]:
    """Context manager: what makes a character of a picture. The encoders are freed afterwards.

    Raises:
        ValueError: a folded adapter.
    """
    adapter.check_whole("make a character")
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    with hub_errors(options.siglip, options.dinov2):
        encoder = CharacterEncoder.from_pretrained(options.siglip, options.dinov2, dtype="auto")
    with on_device(encoder, device, dtype), on_device(adapter.projector, device, dtype):
        yield lambda picture: adapter.create_character(encoder(picture, options.fit))


def load_pipeline(adapter: CharacterAdapter, options: PictureOptions) -> InstantCharacterPipeline:
    """FLUX with its LoRAs and the adapter; shared, offloaded and compiled as the options ask."""
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    with stage_bar("FLUX", 3) as start:
        start("loading")
        pipeline = _load_flux(options, dtype, device)
        if options.parallel:
            enable_context_parallel(pipeline.transformer)
        start("adding LoRAs")
        names = [f"style{i}" for i in range(len(options.lora))]
        for name, (path, _) in zip(names, options.lora):
            load_lora(pipeline, path, name)
        if names:
            pipeline.set_adapters(names, [weight for _, weight in options.lora])
        start("adding the character adapter")
        pipeline.set_character_adapter(adapter, device)
        adapter.projector.resampler.to(dtype)
    plan = pipeline.enable_character_offload(options.offload, options.vram, device)
    if options.verbose:
        print(plan, file=sys.stderr)
    if options.compile:
        pipeline.enable_character_compile()
    return pipeline


def _load_flux(options: PictureOptions, dtype: torch.dtype, device: torch.device) -> InstantCharacterPipeline:
    """FLUX from a file or a folder on disk, or from the hub."""
    model = Path(options.model)
    if model.exists():
        parts = options.flux_parts
        if model.is_file():
            clip, t5 = folders.tokenizers(model, *(path for path in parts.values() if path))
            parts |= {"clip_tokenizer": clip, "t5_tokenizer": t5}
        return load_flux(FluxFiles(model, **parts), dtype, options.weight_dtype, device)
    with hub_errors(options.model):
        pipeline = InstantCharacterPipeline.from_pretrained(options.model, torch_dtype=dtype)
    set_weight_dtype(pipeline.transformer, dtype, options.weight_dtype, device)
    return pipeline
